from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import BaseModelError, ConfigurationError
from finetune.planning.model_config import FAMILIES, read_model_shape

SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "vocab_size": 120,
    "max_position_embeddings": 64,
}
CONFIGS: list[dict[str, Any]] = [
    {"model_type": "llama", "num_key_value_heads": 2},
    {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 20},
    {"model_type": "mistral", "num_key_value_heads": 1},
    {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    {"model_type": "qwen3", "num_key_value_heads": 2},
    {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 32},
    {"model_type": "gemma2", "num_key_value_heads": 2},
    {"model_type": "gemma3_text", "num_key_value_heads": 2, "head_dim": 16},
    {"model_type": "phi", "num_key_value_heads": 2},
    {"model_type": "phi", "qk_layernorm": True},
    {"model_type": "phi3", "num_key_value_heads": 2, "pad_token_id": 0},
    {"model_type": "gpt_neox"},
    {"model_type": "falcon"},
    {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
]


def write_config(directory: Path, config: dict[str, Any]) -> Path:
    (directory / "config.json").write_text(json.dumps({**SMALL, **config}))
    return directory


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: "-".join(map(str, config.values())))
def test_counts_equal_those_of_the_model_on_the_meta_device(tmp_path: Path, config: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = read_model_shape(write_config(tmp_path, config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    in_layers = {
        name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "0" in name
    }
    expected = {name.rsplit(".", 1)[-1]: (m.in_features, m.out_features) for name, m in in_layers.items()}
    assert {linear.name: (linear.inputs, linear.outputs) for linear in shape.linears} == expected


def test_every_family_is_tested() -> None:
    assert {config["model_type"] for config in CONFIGS} == set(FAMILIES)


def test_an_unknown_family_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"type t5 .*config\.json.*llama"):
        read_model_shape(write_config(tmp_path, {"model_type": "t5"}))


def test_a_configuration_without_a_size_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"no vocab_size.*config\.json"):
        read_model_shape(write_config(tmp_path, {"model_type": "llama", "vocab_size": None}))


def test_a_damaged_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BaseModelError, match=r"cannot be read.*config\.json"):
        read_model_shape(tmp_path)


def test_an_unknown_target_module_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    shape = read_model_shape(write_config(tmp_path, {"model_type": "llama"}))
    with pytest.raises(ConfigurationError, match=r"query.*q_proj"):
        shape.targets(["q_proj", "query"])
