from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.base_model.models import BaseModelRef
from finetune.errors import ArtifactError, BaseModelError, ExportError
from finetune.export.merge import check_merge, merge_adapter
from finetune.export.models import MergedModel
from finetune.export.prompts import greedy_tokens
from finetune.export.quantized_base import trained_on_quantized_base
from finetune.planning.models import TrialConfig
from finetune.publishing import read_manifest
from tests.finetune.export.conftest import PROMPTS, MakeAdapter


def lora(**changes: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes)


def weights(model: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for file in model.glob("*.safetensors") for name, tensor in load_file(file).items()}


def load_names(file: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as stream:
        return set(stream.keys())


def merged_by_peft(base: Path, adapter: Path) -> dict[str, Any]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    return dict(PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict())


def corrupt_safetensors(file: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    tensors[name] = tensors[name] * -1
    save_file(tensors, file, metadata={"format": "pt"})


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


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_added_tokens_travel_with_the_adapters_tokenizer(base: BaseModelRef, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base.path)
    before = len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    model = AutoModelForCausalLM.from_pretrained(base.path)
    model.resize_token_embeddings(len(tokenizer))
    torch.manual_seed(1)
    config = LoraConfig(
        r=4,
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    merged = merge_adapter(
        base_model=base,
        adapter_path=tmp_path / "adapter",
        output_dir=tmp_path / "m",
        run_id="r",
        validate_on=["What is <new>?"],
    )
    assert weights(merged.path)["model.embed_tokens.weight"].shape[0] == before + 1
    assert AutoTokenizer.from_pretrained(merged.path).encode("<new>", add_special_tokens=False) == [before]


@pytest.mark.parametrize("inside", [False, True], ids=["a file", "in the tokenizer's configuration"])
def test_a_tokenizer_of_the_adapters_brings_its_chat_template(base: BaseModelRef, tmp_path: Path, inside: bool) -> None:
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base.path)
    tokenizer.add_tokens(["<new>"])
    tokenizer.chat_template = "<new>{{ messages[0]['content'] }}"
    adapter = tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(base.path)
    model.resize_token_embeddings(len(tokenizer))
    torch.manual_seed(1)
    get_peft_model(model, lora(target_modules=["q_proj"])).save_pretrained(adapter)
    tokenizer.save_pretrained(adapter, save_jinja_files=not inside)
    assert (adapter / "chat_template.jinja").is_file() is not inside
    merged = merge_adapter(base_model=base, adapter_path=adapter, output_dir=tmp_path / "m", run_id="r")
    assert AutoTokenizer.from_pretrained(merged.path).chat_template == tokenizer.chat_template


def test_tokens_without_embeddings_are_refused(base: BaseModelRef, adapter: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base.path)
    rows = json.loads((base.path / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"<new {number}>" for number in range(rows - len(tokenizer) + 1)])
    grown = tmp_path / "adapter"
    shutil.copytree(adapter, grown)
    tokenizer.save_pretrained(grown)
    with pytest.raises(ArtifactError, match=f"has {rows + 1} tokens, but the merged model has {rows} rows"):
        merge_adapter(base_model=base, adapter_path=grown, output_dir=tmp_path / "m", run_id="r")
    assert not (tmp_path / "m").exists()


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
    ("index", "fault"),
    [
        ('{"weight_map": {"a": "gone.safetensors"}}', r"a file that the model's index names is missing.*gone"),
        ('{"weight_map"', "unreadable index"),
    ],
    ids=["a shard is missing", "the index is cut"],
)
def test_a_base_with_a_damaged_index_is_refused(
    base: BaseModelRef, adapter: Path, tmp_path: Path, index: str, fault: str
) -> None:
    model = tmp_path / "base"
    shutil.copytree(base.path, model, ignore=shutil.ignore_patterns("*.safetensors*"))
    (model / "model.safetensors.index.json").write_text(index)
    with pytest.raises(BaseModelError, match=fault):
        merge_adapter(
            base_model=base.model_copy(update={"path": model}),
            adapter_path=adapter,
            output_dir=tmp_path / "m",
            run_id="r",
        )


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


def test_prefix_tuning_is_refused(base: BaseModelRef, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING"}')
    with pytest.raises(ExportError, match="virtual tokens"):
        merge_adapter(base_model=base, adapter_path=adapter, output_dir=tmp_path / "m", run_id="r")
    assert not (tmp_path / "m").exists()


def test_everything_a_loader_reads_travels(base: BaseModelRef, merged: MergedModel) -> None:
    names = {file.name for file in base.path.iterdir()}
    assert "model.safetensors.index.json" in names
    assert "chat_template.jinja" in names
    assert {file.name for file in merged.path.iterdir()} == names | {"manifest.json"}
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in merged.path.iterdir())
    assert merged.total_parameters == sum(tensor.numel() for tensor in weights(base.path).values())


def test_validation_is_reported(merged: MergedModel) -> None:
    assert merged.max_logit_difference is not None
    assert merged.logit_tolerance is not None
    assert merged.max_logit_difference <= merged.logit_tolerance
    assert merged.greedy_tokens_equal is True


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


def test_an_adapter_of_infinities_is_refused(base: BaseModelRef, adapter: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "adapter"
    shutil.copytree(adapter, broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    tensors[next(iter(tensors))][0, 0] = float("inf")
    save_file(tensors, broken / "adapter_model.safetensors")
    with pytest.raises(ExportError, match="not finite"):
        merge_adapter(base_model=base, adapter_path=broken, output_dir=tmp_path / "m", run_id="r")


def test_an_incomplete_adapter_is_refused(base: BaseModelRef, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"adapter_config\.json is missing"):
        merge_adapter(base_model=base, adapter_path=tmp_path, output_dir=tmp_path / "m", run_id="r")
    shutil.copy(adapter / "adapter_config.json", tmp_path)
    with pytest.raises(ArtifactError, match=r"missing.*adapter_model\.safetensors"):
        merge_adapter(base_model=base, adapter_path=tmp_path, output_dir=tmp_path / "m", run_id="r")


def test_a_damaged_tokenizer_is_named(base: BaseModelRef, adapter: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "base"
    shutil.copytree(base.path, damaged)
    (damaged / "tokenizer.json").write_text("{}")
    other = base.model_copy(update={"path": damaged})
    with pytest.raises(ArtifactError, match=r"unreadable tokenizer.*tokenizer\.json"):
        merge_adapter(base_model=other, adapter_path=adapter, output_dir=tmp_path / "m", run_id="r")
    assert not (tmp_path / "m").exists()


def without_a_layer(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}


def of_other_names(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name.replace(".layers.", ".blocks."): tensor for name, tensor in tensors.items()}


def with_a_layer_more(tensors: dict[str, Any]) -> dict[str, Any]:
    return tensors | {
        name.replace(".layers.1.", ".layers.2."): tensor.clone()
        for name, tensor in tensors.items()
        if ".layers.1." in name
    }


def of_two_ranks(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor[:3].clone() if "lora_A" in name else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("validated", [True, False], ids=["validated", "not validated"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_layer, "does not fit the base model.*lacks 14 tensors"),
        (of_other_names, "does not fit the base model.*lacks 28 tensors"),
        (with_a_layer_more, r"does not fit the base model.*layers\.2\..* beside them"),
        (of_two_ranks, r"do not fit each other and rank 8: A \(3, "),
    ],
)
def test_an_adapter_of_another_model_is_refused(
    base: BaseModelRef, adapter: Path, tmp_path: Path, change: Any, message: str, validated: bool
) -> None:
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    tensors = load_file(other / "adapter_model.safetensors")
    save_file(change(tensors), other / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match=message):
        merge_adapter(
            base_model=base,
            adapter_path=other,
            output_dir=tmp_path / "m",
            run_id="r",
            validate_on=PROMPTS[:1] if validated else None,
        )
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "UNHEARD_OF"}, "no peft_type that PEFT knows: 'UNHEARD_OF'"),
        ({"r": 0}, "a rank is 0"),
        ({"r": None}, "a rank is None"),
        ({"rank_pattern": {"q_proj": "four"}}, "a rank is 'four'"),
        ({"lora_alpha": float("nan")}, "an alpha is nan"),
        ({"alpha_pattern": {"(": 3}}, "no regular expression"),
        ({"alpha_pattern": [3]}, "no object"),
    ],
)
def test_a_configuration_without_ranks_and_scales_is_refused(
    base: BaseModelRef, adapter: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    config = json.loads((other / "adapter_config.json").read_text()) | change
    (other / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=message) as raised:
        merge_adapter(base_model=base, adapter_path=other, output_dir=tmp_path / "m", run_id="r")
    assert str(other / "adapter_config.json") in str(raised.value)


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


def test_a_quantized_base_is_refused(base: BaseModelRef, adapter: Path, tmp_path: Path) -> None:
    quantized = tmp_path / "base"
    shutil.copytree(base.path, quantized)
    config = json.loads((quantized / "config.json").read_text()) | {"quantization_config": {"load_in_4bit": True}}
    (quantized / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match="quantized"):
        merge_adapter(
            base_model=base.model_copy(update={"path": quantized}),
            adapter_path=adapter,
            output_dir=tmp_path / "m",
            run_id="r",
        )


def test_a_cut_off_base_is_refused(base: BaseModelRef, adapter: Path, tmp_path: Path) -> None:
    cut = tmp_path / "base"
    shutil.copytree(base.path, cut)
    shard = max(cut.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(BaseModelError, match="cut short"):
        merge_adapter(
            base_model=base.model_copy(update={"path": cut}),
            adapter_path=adapter,
            output_dir=tmp_path / "m",
            run_id="r",
        )
