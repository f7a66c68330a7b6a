"""Base models and adapters that are damaged, or do not go together, are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune.base_model.models import BaseModelRef
from finetune.errors import ArtifactError, BaseModelError, ExportError
from finetune.export.merge import merge_adapter
from tests.finetune.export.conftest import PROMPTS


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


def test_prefix_tuning_is_refused(base: BaseModelRef, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING"}')
    with pytest.raises(ExportError, match="virtual tokens"):
        merge_adapter(base_model=base, adapter_path=adapter, output_dir=tmp_path / "m", run_id="r")
    assert not (tmp_path / "m").exists()


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
