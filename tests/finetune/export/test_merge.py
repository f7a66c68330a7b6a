"""What is merged equals what peft merges, in every format, and is made once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.base_model.models import BaseModelRef
from finetune.export.merge import check_merge, merge_adapter
from finetune.export.models import MergedModel
from finetune.publishing import read_manifest
from tests.finetune.export.adapters import lora, weights
from tests.finetune.export.conftest import PROMPTS, MakeAdapter


def merged_by_peft(base: Path, adapter: Path) -> dict[str, Any]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    return dict(PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.mlp\.up_proj": 3}},
        {"target_modules": ["k_proj", "down_proj"]},
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True, "modules_to_save": ["norm", "v_proj"], "target_modules": ["q_proj"]},
    ],
    ids=["lora", "rslora", "patterns", "some modules", "dora", "dora and whole modules"],
)
def test_streaming_is_bitwise_equal_to_peft(
    base: BaseModelRef, make_adapter: MakeAdapter, tmp_path: Path, changes: dict[str, Any]
) -> None:
    import torch

    adapter = make_adapter(lora(**changes))
    merged = merge_adapter(base_model=base, adapter_path=adapter, output_dir=tmp_path / "m", run_id="r")
    assert merged.method == "streaming"
    expected, found = merged_by_peft(base.path, adapter), weights(merged.path)
    assert found.keys() == weights(base.path).keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert merged.merged_tensors == sum(not torch.equal(found[n], t) for n, t in weights(base.path).items()) > 0


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float64"])
def test_streaming_a_model_of_any_precision_is_bitwise_equal_to_peft(
    base: BaseModelRef, adapter: Path, tmp_path: Path, precision: str
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    half = tmp_path / "half"
    shutil.copytree(base.path, half, ignore=shutil.ignore_patterns("*.safetensors*"))
    AutoModelForCausalLM.from_pretrained(base.path, dtype=getattr(torch, precision)).save_pretrained(half)
    merged = merge_adapter(
        base_model=base.model_copy(update={"path": half}),
        adapter_path=adapter,
        output_dir=tmp_path / "m",
        run_id="r",
        validate_on=PROMPTS,
    )
    expected, found = merged_by_peft(half, adapter), weights(merged.path)
    assert found["model.layers.0.self_attn.q_proj.weight"].dtype is getattr(torch, precision)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_merge_holds_what_its_manifest_says(base: BaseModelRef, adapter: Path, tmp_path: Path) -> None:
    merged = merge_adapter(base_model=base, adapter_path=adapter, output_dir=tmp_path / "m", run_id="r")
    assert merged.method == "streaming"
    # The shards' hashes were taken while they were written.
    assert len(read_manifest(merged.path, verify="hashes").outputs) > 4


def test_a_full_disk_ends_a_merge_and_leaves_nothing(base: BaseModelRef, adapter: Path, tmp_path: Path) -> None:
    program = f"""
import resource, signal
from pathlib import Path
from finetune.base_model.models import BaseModelRef
from finetune.export.merge import merge_adapter
base = BaseModelRef.model_validate_json({base.model_dump_json()!r})
# A write beyond the limit fails as one on a full disk does, with another number.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
adapter, output = Path({str(adapter)!r}), Path({str(tmp_path / "m")!r})
merge_adapter(base_model=base, adapter_path=adapter, output_dir=output, run_id="r")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "File too large" in done.stderr
    assert done.returncode == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("dora", "tolerance"), [(False, 0), (True, 2e-6)], ids=["lora", "dora"])
def test_transposed_weights_are_merged_as_peft_does(tmp_path: Path, dora: bool, tolerance: float) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32, n_positions=16)).save_pretrained(
        tmp_path / "base"
    )
    config = LoraConfig(
        r=4,
        target_modules=["c_attn"],
        fan_in_fan_out=True,
        init_lora_weights=False,
        use_dora=dora,
        task_type="CAUSAL_LM",
    )
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    merged = merge_adapter(
        base_model=BaseModelRef(name="gpt2", path=tmp_path / "base", revision=None, fingerprint="0" * 32),
        adapter_path=tmp_path / "adapter",
        output_dir=tmp_path / "m",
        run_id="r",
    )
    assert merged.method == "streaming"
    expected, found = merged_by_peft(tmp_path / "base", tmp_path / "adapter"), weights(merged.path)
    assert not torch.equal(
        found["transformer.h.0.attn.c_attn.weight"], weights(tmp_path / "base")["transformer.h.0.attn.c_attn.weight"]
    )
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=0)


def test_of_a_single_file_and_an_index_beside_it_the_file_counts_as_in_transformers(
    base: BaseModelRef, adapter: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import save_file

    model = tmp_path / "base"
    shutil.copytree(base.path, model, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(weights(base.path), model / "model.safetensors", metadata={"format": "pt"})
    old = {name: torch.zeros_like(tensor) for name, tensor in weights(base.path).items()}
    save_file(old, model / "old.safetensors", metadata={"format": "pt"})
    index = {"weight_map": dict.fromkeys(old, "old.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    stale = base.model_copy(update={"path": model})
    merged = merge_adapter(base_model=stale, adapter_path=adapter, output_dir=tmp_path / "m", run_id="r")
    expected, found = merged_by_peft(model, adapter), weights(merged.path)
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["own tied embeddings", "lora on tied embeddings", "own head on tied embeddings"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tied_ends_of_which_one_was_trained_part(
    base: BaseModelRef, make_adapter: MakeAdapter, tmp_path: Path, changes: dict[str, Any]
) -> None:
    adapter = make_adapter(lora(**changes))
    merged = merge_adapter(
        base_model=base, adapter_path=adapter, output_dir=tmp_path / "m", run_id="r", validate_on=PROMPTS
    )
    assert merged.method == "streaming"
    assert weights(merged.path).keys() - weights(base.path).keys() == {"lm_head.weight"}


@pytest.mark.parametrize(
    ("tied", "method"),
    [(True, "peft"), (False, "streaming"), (None, "peft")],
    ids=["said to be tied", "untied", "unsaid"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_own_embeddings_merge_where_both_ends_are_stored(
    base: BaseModelRef, tmp_path: Path, tied: bool | None, method: str
) -> None:
    import torch
    from peft import get_peft_model
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    tensors = weights(base.path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    model = tmp_path / "base"
    shutil.copytree(base.path, model, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text()) | {"tie_word_embeddings": tied}
    if tied is None:
        # Every family has a default of its own.
        del config["tie_word_embeddings"]
    (model / "config.json").write_text(json.dumps(config))
    loaded = AutoModelForCausalLM.from_pretrained(model)
    changed = get_peft_model(loaded, lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    for name, parameter in changed.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    changed.save_pretrained(tmp_path / "adapter")
    merged = merge_adapter(
        base_model=base.model_copy(update={"path": model}),
        adapter_path=tmp_path / "adapter",
        output_dir=tmp_path / "m",
        run_id="r",
        validate_on=PROMPTS,
    )
    assert merged.method == method


def test_ia3_merges(base: BaseModelRef, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    from peft import IA3Config

    config = IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    adapter = make_adapter(config)
    merged = merge_adapter(
        base_model=base, adapter_path=adapter, output_dir=tmp_path / "m", run_id="r", validate_on=PROMPTS
    )
    assert (merged.method, merged.merged_tensors) == ("streaming", 6)


def test_everything_a_loader_reads_travels(base: BaseModelRef, merged: MergedModel) -> None:
    names = {file.name for file in base.path.iterdir()}
    assert "model.safetensors.index.json" in names
    assert "chat_template.jinja" in names
    assert {file.name for file in merged.path.iterdir()} == names | {"manifest.json"}
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in merged.path.iterdir())
    assert merged.total_parameters == sum(tensor.numel() for tensor in weights(base.path).values())


def test_pytorch_format_holds_the_same_model(
    base: BaseModelRef, adapter: Path, merged: MergedModel, tmp_path: Path
) -> None:
    import torch

    legacy = merge_adapter(
        base_model=base,
        adapter_path=adapter,
        output_dir=tmp_path / "m",
        run_id="r",
        output_format="pytorch",
        validate_on=PROMPTS,
    )
    shards = sorted(legacy.path.glob("*.bin"))
    assert len(shards) > 1
    assert not list(legacy.path.glob("*.safetensors*"))
    expected = weights(merged.path)
    found = {name: tensor for shard in shards for name, tensor in torch.load(shard, weights_only=True).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    index = json.loads((legacy.path / "pytorch_model.bin.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}


def test_the_same_inputs_are_merged_once(base: BaseModelRef, adapter: Path, merged: MergedModel) -> None:
    before = (merged.path / "manifest.json").stat().st_mtime_ns
    again = merge_adapter(
        base_model=base, adapter_path=adapter, output_dir=merged.path, run_id="run1", validate_on=PROMPTS
    )
    assert again == merged.model_copy(update={"reused": True})
    assert (merged.path / "manifest.json").stat().st_mtime_ns == before


def test_another_adapter_is_merged_anew(
    base: BaseModelRef, adapter: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    first = merge_adapter(base_model=base, adapter_path=adapter, output_dir=tmp_path / "m", run_id="r")
    other = make_adapter(lora())
    second = merge_adapter(base_model=base, adapter_path=other, output_dir=tmp_path / "m", run_id="r")
    assert (first.reused, second.reused) == (False, False)
    check_merge(base_model=base, adapter_path=other, merged_path=second.path, prompts=PROMPTS)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({"target_modules": ["q_proj"]}, "streaming"),
        ({"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}, "peft"),
    ],
    ids=["attention", "fused experts"],
)
def test_a_mixture_of_experts_merges(base: BaseModelRef, tmp_path: Path, changes: dict[str, Any], method: str) -> None:
    from peft import get_peft_model
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(base.path)
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = MixtralForCausalLM(config)
    experts = tmp_path / "base"
    model.save_pretrained(experts)
    tokenizer.save_pretrained(experts)
    get_peft_model(model, lora(init_lora_weights=False, **changes)).save_pretrained(tmp_path / "adapter")
    merged = merge_adapter(
        base_model=BaseModelRef(name="experts", path=experts, revision=None, fingerprint="0" * 32),
        adapter_path=tmp_path / "adapter",
        output_dir=tmp_path / "m",
        run_id="r",
        validate_on=PROMPTS,
    )
    assert merged.method == method
    assert weights(merged.path).keys() == weights(experts).keys()
