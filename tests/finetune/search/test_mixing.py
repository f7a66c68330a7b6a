"""Combinations of adapters by PEFT are the numbers that they should be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from finetune.adapter_files import CONFIG_NAME, WEIGHTS_NAME, read_adapter_config
from finetune.base_model.models import BaseModelRef
from finetune.errors import ConfigurationError, StorageFullError
from finetune.search.ensemble.mixing import mixing
from finetune.search.ensemble.spec import Combination, EnsembleSpec

if TYPE_CHECKING:
    import torch
    from torch.nn import Module
    from transformers import PreTrainedModel

MODULES = ["q_proj", "down_proj"]


def logits(model: Module) -> torch.Tensor:
    import torch

    with torch.inference_mode():
        return model(torch.arange(12).reshape(1, 12)).logits


def base_model() -> PreTrainedModel:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def adapter(directory: Path, seed: int, **config: Any) -> Path:
    """An adapter with random weights, as a training would leave it."""
    import torch
    from peft import LoraConfig, get_peft_model

    values = {"r": 4, "lora_alpha": 8, "target_modules": MODULES, "init_lora_weights": False} | config
    base = base_model()
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **values))
    model.save_pretrained(str(directory), save_embedding_layers=False)
    return directory


def factors(path: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of each module, and in A the scale."""
    from safetensors.torch import load_file

    config = read_adapter_config(path)
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    tensors = load_file(path / WEIGHTS_NAME)
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return {name: (scale * tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]) for name in names}


def updates(path: Path) -> dict[str, torch.Tensor]:
    """What the adapter adds to each weight."""
    return {name: b @ a for name, (a, b) in factors(path).items()}


def combined(tmp_path: Path, members: list[Path], weights: list[float], combination: Combination, **spec: Any) -> Path:
    """Combine members and write the result, which loads by PEFT alone."""
    import torch
    from peft import PeftModel

    base = BaseModelRef(name="small", path=tmp_path, revision=None, fingerprint="0" * 64)
    output = tmp_path / "combined"
    model = base_model()
    with mixing(model, members, EnsembleSpec(combination=combination, **spec)) as mixer:
        in_memory = logits(mixer.combined(weights))
        mixer.save(output, base)
    assert torch.equal(logits(model), logits(base_model())), "the base model is as it was"
    assert {each.name for each in output.iterdir()} == {"README.md", "adapter_config.json", WEIGHTS_NAME}
    loaded = PeftModel.from_pretrained(base_model(), str(output)).eval()
    assert torch.allclose(logits(loaded), in_memory, atol=1e-6)
    assert read_adapter_config(output)["base_model_name_or_path"] == "small"
    return output


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    import torch

    assert found.keys() == expected.keys()
    for name, update in found.items():
        assert torch.allclose(update, expected[name], atol=1e-5), (name, (update - expected[name]).abs().max())


@pytest.mark.parametrize(
    ("combination", "spec"), [("cat", {}), ("svd", {"svd_rank": 14})], ids=["cat", "svd of enough rank"]
)
def test_the_weighted_sum_of_updates_is_exact_whatever_the_ranks(
    tmp_path: Path, combination: Combination, spec: dict[str, Any]
) -> None:
    import torch

    members = [
        adapter(tmp_path / "a", 1),
        adapter(tmp_path / "b", 2, r=8, lora_alpha=4),
        adapter(tmp_path / "c", 3, r=2),
    ]
    weights = [0.5, 0.3, 0.2]
    output = combined(tmp_path, members, weights, combination, **spec)
    parts = [updates(member) for member in members]
    assert_equal(
        updates(output),
        {name: sum((w * p[name] for w, p in zip(weights, parts, strict=True)), torch.zeros(())) for name in parts[0]},
    )
    assert read_adapter_config(output)["r"] == 14


def test_members_without_weight_take_no_rank(tmp_path: Path) -> None:
    members = [adapter(tmp_path / name, seed) for seed, name in enumerate("abc")]
    output = combined(tmp_path, members, [0.5, 0.0, 0.5], "cat")
    assert read_adapter_config(output)["r"] == 8


def test_linear_is_the_mean_of_the_factors(tmp_path: Path) -> None:
    members = [adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2)]
    output = combined(tmp_path, members, [0.25, 0.75], "linear")
    (one, two) = (factors(member) for member in members)
    expected = {
        name: (0.25 * one[name][1] + 0.75 * two[name][1]) @ (0.25 * one[name][0] + 0.75 * two[name][0]) for name in one
    }
    assert_equal(updates(output), expected)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("combination", ["cat", "svd", "linear"])
def test_equal_members_combine_to_what_each_of_them_is(
    tmp_path: Path, combination: Combination, use_rslora: bool
) -> None:
    members = [adapter(tmp_path / name, 1, use_rslora=use_rslora) for name in "abc"]
    output = combined(tmp_path, members, [0.2, 0.3, 0.5], combination)
    assert_equal(updates(output), updates(members[0]))


@pytest.mark.parametrize("combination", ["ties", "magnitude_prune"])
def test_equal_members_pruned_combine_to_one_pruned(tmp_path: Path, combination: Combination) -> None:
    members = [adapter(tmp_path / name, 1) for name in "abc"]
    output = combined(tmp_path, members, [1 / 3] * 3, combination, density=0.5)

    def pruned(tensor: torch.Tensor) -> torch.Tensor:
        kept = tensor.abs() >= tensor.abs().flatten().topk(tensor.numel() // 2).values.min()
        return tensor * kept

    expected = {name: pruned(b) @ pruned(a) for name, (a, b) in factors(members[0]).items()}
    assert_equal(updates(output), expected)


@pytest.mark.parametrize("combination", ["dare_linear", "dare_ties_svd"])
def test_what_is_dropped_by_chance_is_decided_by_the_seed(tmp_path: Path, combination: Combination) -> None:
    import torch

    members = [adapter(tmp_path / name, seed) for seed, name in enumerate("ab")]
    found = []
    for number, seed in enumerate((1, 1, 2)):
        place = tmp_path / str(number)
        place.mkdir()
        found.append(updates(combined(place, members, [0.5, 0.5], combination, seed=seed)))
    assert all(torch.equal(update, found[1][name]) for name, update in found[0].items())
    assert not any(torch.equal(update, found[2][name]) for name, update in found[0].items())


def test_one_mixer_tries_several_weightings_in_turn(tmp_path: Path) -> None:
    import torch
    from peft import PeftModel

    members = [adapter(tmp_path / name, seed) for seed, name in enumerate("ab")]
    with mixing(base_model(), members, EnsembleSpec()) as mixer:
        drawn = torch.get_rng_state()
        first = logits(mixer.combined([0.5, 0.5]))
        assert torch.equal(torch.get_rng_state(), drawn), "nobody else's draws change"
        other = logits(mixer.combined([1.0, 0.0]))
        again = logits(mixer.combined([0.5, 0.5]))
    alone = PeftModel.from_pretrained(base_model(), str(members[0])).eval()
    assert torch.equal(first, again)
    assert torch.allclose(other, logits(alone), atol=1e-6)
    assert not torch.allclose(first, other, atol=1e-3), "otherwise the test sees nothing"


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    members = [adapter(tmp_path / name, seed) for seed, name in enumerate("ab")]
    output = tmp_path / "combined"
    output.mkdir()
    # Every write to /dev/full fails with ENOSPC.
    (output / CONFIG_NAME).symlink_to("/dev/full")
    base = BaseModelRef(name="small", path=tmp_path, revision=None, fingerprint="0" * 64)
    with mixing(base_model(), members, EnsembleSpec()) as mixer:
        mixer.combined([0.5, 0.5])
        with pytest.raises(StorageFullError, match="no space left"):
            mixer.save(output, base)


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"bias": "lora_only"}, {"lora_bias": True}])
def test_what_peft_would_drop_without_a_word_is_refused(tmp_path: Path, kind: dict[str, Any]) -> None:
    import torch

    members = [adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2, **kind)]
    model = base_model()
    with pytest.raises(ConfigurationError, match="plain LoRA"), mixing(model, members, EnsembleSpec()):
        pytest.fail("it was combined")
    assert torch.equal(logits(model), logits(base_model())), "the base model is as it was"
