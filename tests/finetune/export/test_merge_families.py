"""Models of other families: their ends, their vocabularies, the layout of their weights."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.base_model.models import BaseModelRef
from finetune.evaluation.adapters import load_adapter
from finetune.export.merge import merge_adapter
from finetune.export.merge_plan import EMBEDDINGS, HEAD, plan_merge
from finetune.export.updates import LoraPair, Updates, read_updates
from tests.finetune.export.untrained import ADDED, VOCABULARY, load, logits, lora, train

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]


def test_the_families_whose_ends_are_known_tie_them_under_these_names() -> None:
    from transformers import BloomForCausalLM, GPT2LMHeadModel, LlamaForCausalLM, OPTForCausalLM

    families = (LlamaForCausalLM, GPT2LMHeadModel, BloomForCausalLM, OPTForCausalLM)
    assert [family._tied_weights_keys for family in families] == [{HEAD: name} for name in EMBEDDINGS]


def test_tied_ends_of_an_unknown_family_go_through_peft(tmp_path: Path) -> None:
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(tmp_path / "base")
    base = BaseModelRef(name="neox", path=tmp_path / "base", revision=None, fingerprint="0" * 32)
    train(
        base, lora(target_modules=["query_key_value"], modules_to_save=["embed_in"]), tmp_path / "adapter", VOCABULARY
    )
    merged = merge_adapter(base_model=base, adapter_path=tmp_path / "adapter", output_dir=tmp_path / "m", run_id="r")
    assert merged.method == "peft"
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(load(base.path), tmp_path / "adapter")
    torch.testing.assert_close(logits(load(merged.path)), logits(theirs), rtol=1e-4, atol=1e-4)


def test_embeddings_that_grow_and_part_are_never_whole_in_memory(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    rows, columns = 32_000, 512
    for name, added in (("base", 0), ("adapter", ADDED)):
        (tmp_path / name).mkdir()
        embeddings = torch.ones(rows + added, columns)
        tensors = {"model.embed_tokens.weight": embeddings, "model.norm.weight": torch.ones(columns)}
        if added:
            tensors = {f"base_model.model.{end}.weight": embeddings + 1 for end in ("model.embed_tokens", "lm_head")}
        save_file(tensors, tmp_path / name / ("adapter_model.safetensors" if added else "model.safetensors"))
    (tmp_path / "base" / "config.json").write_text(json.dumps({"vocab_size": rows, "tie_word_embeddings": True}))
    config = lora(modules_to_save=["embed_tokens"], target_modules=None)
    config.save_pretrained(tmp_path / "adapter")
    program = f"""
import resource
from pathlib import Path
from finetune.base_model.models import BaseModelRef
from finetune.export.merge import merge_adapter
import safetensors.torch
root = Path({str(tmp_path)!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
base = BaseModelRef(name="tall", path=root / "base", revision=None, fingerprint="0" * 32)
merged = merge_adapter(base_model=base, adapter_path=root / "adapter", output_dir=root / "m", run_id="r")
print(merged.method, merged.total_parameters, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    method, parameters, kilobytes = done.stdout.split()
    assert (method, int(parameters)) == ("streaming", 2 * (rows + ADDED) * columns + columns)
    # Each end alone has 64 000.
    assert int(kilobytes) < 40_000


def gpt2(output: Path, precision: str = "float32") -> BaseModelRef:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=1, n_head=2, n_embd=16, vocab_size=VOCABULARY, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    model = GPT2LMHeadModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.to(getattr(torch, precision)).save_pretrained(output)
    return BaseModelRef(name="gpt2", path=output, revision=None, fingerprint="0" * 32)


def square_lora() -> Any:
    return lora(target_modules=["attn.c_proj", "lm_head"])


def square_ia3() -> Any:
    from peft import IA3Config

    return IA3Config(task_type="CAUSAL_LM", target_modules=["attn.c_proj", "lm_head"], feedforward_modules=[])


@pytest.mark.parametrize("make_config", [square_lora, square_ia3], ids=["lora", "ia3"])
def test_square_weights_of_two_layouts_are_told_apart_though_peft_names_one(
    tmp_path: Path, make_config: Callable[[], Any]
) -> None:
    import torch

    base, adapter = gpt2(tmp_path / "base"), tmp_path / "adapter"
    train(base, make_config(), adapter, VOCABULARY)
    assert json.loads((adapter / "adapter_config.json").read_text())["fan_in_fan_out"] is False
    merged = merge_adapter(base_model=base, adapter_path=adapter, output_dir=tmp_path / "m", run_id="r")
    wanted = logits(load_adapter(load(base.path), adapter))
    torch.testing.assert_close(logits(load(merged.path)), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [VOCABULARY + ADDED, VOCABULARY - 1], ids=["added tokens", "one less"])
@pytest.mark.parametrize(("precision", "method"), [("float32", "streaming"), ("float64", "peft")])
def test_another_vocabulary_merges_and_is_evaluated_whatever_the_embeddings_name(
    tmp_path: Path, precision: str, method: str, rows: int
) -> None:
    import torch

    base, adapter = gpt2(tmp_path / "base", precision), tmp_path / "adapter"
    train(base, lora(target_modules=["c_attn"]), adapter, rows)
    merged = merge_adapter(base_model=base, adapter_path=adapter, output_dir=tmp_path / "m", run_id="r")
    assert merged.method == method
    model = load(merged.path)
    assert model.config.vocab_size == rows
    wanted = logits(load_adapter(load(base.path, rows=rows), adapter))
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)


def test_a_model_with_images_is_said_to_be_parted_where_its_ends_are(tmp_path: Path) -> None:
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    small = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    text = small | {"vocab_size": VOCABULARY, "num_hidden_layers": 1, "num_key_value_heads": 2, "head_dim": 8}
    images = small | {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=images, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    base = BaseModelRef(name="gemma", path=tmp_path / "base", revision=None, fingerprint="0" * 32)
    train(base, lora(modules_to_save=["embed_tokens"]), tmp_path / "adapter", VOCABULARY)
    merged = merge_adapter(base_model=base, adapter_path=tmp_path / "adapter", output_dir=tmp_path / "m", run_id="r")
    model = load(merged.path)
    assert not model.config.tie_word_embeddings
    assert not model.config.get_text_config().tie_word_embeddings
    wanted = logits(load_adapter(load(base.path), tmp_path / "adapter"))
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)


def test_ends_of_an_unknown_family_are_found_by_the_vocabulary_of_its_text_part(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    name = "model.language_model.embed_tokens.weight"
    save_file({name: torch.zeros(VOCABULARY, 16)}, tmp_path / "model.safetensors")
    pair = LoraPair(torch.zeros(4, VOCABULARY), torch.zeros(16, 4), 1.0, fan_in_fan_out=True)
    updates = Updates({name: pair}, {}, frozenset(), ensure_weight_tying=False, fan_in_fan_out=False)
    for vocabulary, planned in ((VOCABULARY, False), (VOCABULARY + 1, True)):
        settings = {"model_type": "x", "text_config": {"vocab_size": vocabulary}}
        (tmp_path / "config.json").write_text(json.dumps(settings))
        assert (plan_merge(tmp_path, updates) is not None) is planned


def test_an_adapter_stays_in_its_file_until_a_tensor_is_merged(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    megabytes = 64
    sides = {side: torch.ones(megabytes << 18, dtype=torch.bfloat16) for side in "AB"}
    tensors = {"lora_A": sides["A"].view(4096, -1), "lora_B": sides["B"].view(-1, 4096)}
    save_file(
        {f"base_model.model.layer.{side}.weight": tensor for side, tensor in tensors.items()},
        tmp_path / "adapter_model.safetensors",
    )

    def own_memory() -> int:
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])

    before = own_memory()
    updates = read_updates(tmp_path, {"peft_type": "LORA", "r": 4096, "lora_alpha": 1})
    assert updates is not None
    assert own_memory() - before < megabytes << 8
