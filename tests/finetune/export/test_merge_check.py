"""The comparison of a merged model with base + adapter, and what a quantized base cost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune.base_model.models import BaseModelRef
from finetune.errors import ExportError
from finetune.export.merge import check_merge, merge_adapter
from finetune.export.models import MergedModel
from finetune.export.prompts import greedy_tokens
from finetune.export.quantized_base import trained_on_quantized_base
from finetune.planning.models import TrialConfig
from tests.finetune.export.adapters import lora
from tests.finetune.export.conftest import PROMPTS, MakeAdapter


def load_names(file: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as stream:
        return set(stream.keys())


def corrupt_safetensors(file: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    tensors[name] = tensors[name] * -1
    save_file(tensors, file, metadata={"format": "pt"})


def test_validation_is_reported(merged: MergedModel) -> None:
    assert merged.max_logit_difference is not None
    assert merged.logit_tolerance is not None
    assert merged.max_logit_difference <= merged.logit_tolerance
    assert merged.greedy_tokens_equal is True


@pytest.mark.parametrize(
    ("tensor", "layer"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "layer 0"),
        ("model.layers.1.mlp.down_proj.weight", "layer 1"),
        ("model.embed_tokens.weight", "the embeddings"),
    ],
)
def test_the_check_names_the_first_layer_of_a_corrupted_model(
    base: BaseModelRef, adapter: Path, merged: MergedModel, tmp_path: Path, tensor: str, layer: str
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(merged.path, damaged)
    index = json.loads((damaged / "model.safetensors.index.json").read_text())["weight_map"]
    corrupt_safetensors(damaged / index[tensor], tensor)
    with pytest.raises(ExportError, match=f"first in {layer}"):
        check_merge(base_model=base, adapter_path=adapter, merged_path=damaged, prompts=PROMPTS)


def test_the_check_names_the_head_of_a_corrupted_model(
    base: BaseModelRef, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(lora(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    merged = merge_adapter(base_model=base, adapter_path=adapter, output_dir=tmp_path / "m", run_id="r")
    shard = next(file for file in merged.path.glob("*.safetensors") if "lm_head.weight" in load_names(file))
    corrupt_safetensors(shard, "lm_head.weight")
    with pytest.raises(ExportError, match="first in the output head"):
        check_merge(base_model=base, adapter_path=adapter, merged_path=merged.path, prompts=PROMPTS)


def test_a_differing_answer_is_a_difference_even_where_logits_are_close(
    base: BaseModelRef, adapter: Path, merged: MergedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.export import merge_check

    def as_if_damaged(model: Any, ids: list[int], count: int) -> list[int]:
        tokens = greedy_tokens(model, ids, count)
        return tokens if hasattr(model, "peft_config") else [tokens[0] ^ 1, *tokens[1:]]

    monkeypatch.setattr(merge_check, "greedy_tokens", as_if_damaged)
    with pytest.raises(ExportError, match="answers prompt 0 differently"):
        check_merge(base_model=base, adapter_path=adapter, merged_path=merged.path, prompts=PROMPTS)


def test_the_check_notices_a_cut_off_shard(
    base: BaseModelRef, adapter: Path, merged: MergedModel, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(merged.path, damaged)
    shard = next(damaged.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(ExportError, match="does not load"):
        check_merge(base_model=base, adapter_path=adapter, merged_path=damaged, prompts=PROMPTS)


def test_a_merge_that_fails_its_validation_is_not_published(
    base: BaseModelRef, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.export.updates import LoraPair

    struck = []

    def wrong(self: LoraPair, scratch: Any) -> Any:
        struck.append(self)
        return -self.scale * (self.b @ self.a)

    monkeypatch.setattr(LoraPair, "delta", wrong)
    with pytest.raises(ExportError, match="differs from base"):
        merge_adapter(base_model=base, adapter_path=adapter, output_dir=tmp_path / "m", run_id="r", validate_on=PROMPTS)
    assert struck
    assert list(tmp_path.iterdir()) == []


def test_merging_a_qlora_adapter_says_what_leaving_the_quantized_base_costs(
    base: BaseModelRef, adapter: Path, tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    trained = tmp_path / "adapter"
    shutil.copytree(adapter, trained)
    # As training notes it in the manifest of what it made.
    parameters = TrialConfig(trial_id="t", method="qlora").model_dump()
    (trained / "manifest.json").write_text(json.dumps({"parameters": parameters}))
    merged = merge_adapter(
        base_model=base, adapter_path=trained, output_dir=tmp_path / "m", run_id="r", validate_on=PROMPTS[:1]
    )
    cost = merged.quantization_cost
    assert cost is not None
    assert cost.divergence > 0
    assert 0 <= cost.greedy_agreement <= 1
    # The trained model's own answer, and its loss, once more by hand.
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(base.path, quantization_config=quantization)
    model = PeftModel.from_pretrained(model, trained).eval()
    prompt = AutoTokenizer.from_pretrained(base.path).apply_chat_template(
        PROMPTS[0], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    answered = model.generate(input_ids=prompt, do_sample=False, max_new_tokens=32)
    labels = answered.clone()
    labels[:, : prompt.shape[1]] = -100
    assert cost.tokens == answered.shape[1] - prompt.shape[1]
    with torch.no_grad():
        assert cost.loss_on_quantized_base == pytest.approx(float(model(answered, labels=labels).loss), abs=1e-4)
        whole = AutoModelForCausalLM.from_pretrained(merged.path)
        assert cost.loss_merged == pytest.approx(float(whole(answered, labels=labels).loss), abs=1e-4)


def test_only_qlora_adapters_are_compared_with_a_quantized_base(merged: MergedModel, tmp_path: Path) -> None:
    assert merged.quantization_cost is None
    assert not trained_on_quantized_base(tmp_path)
    (tmp_path / "experiment_manifest.json").write_text('{"inputs": {"plan": {"method": "qlora"}}}')
    assert trained_on_quantized_base(tmp_path)
