from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.planning.memory import estimate_memory, trainable_parameters
from finetune.planning.model_config import ModelShape, read_model_shape
from finetune.planning.models import TrialConfig

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 256,
}


def trial_of(**fields: Any) -> TrialConfig:
    return TrialConfig(trial_id="", **fields)


LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
}
PHI_1_5 = {
    "model_type": "phi",
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "intermediate_size": 8192,
    "vocab_size": 51200,
}
STABLELM_ALPHA_3B = {
    "model_type": "gpt_neox",
    "hidden_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "intermediate_size": 16384,
    "vocab_size": 50688,
}
# Peaks in GB of LoRA of rank 8 on query and value in bf16, Alpaca's longest batch of 1304 tokens, on one A100:
# litgpt at 26857050fe, tutorials/resource-tables.md.
PUBLISHED = [
    (PHI_1_5, ["q_proj", "v_proj"], 1, 4.82),
    (PHI_1_5, ["q_proj", "v_proj"], 2, 6.76),
    (PHI_1_5, ["q_proj", "v_proj"], 4, 10.68),
    (STABLELM_ALPHA_3B, ["query_key_value"], 1, 9.69),
    (STABLELM_ALPHA_3B, ["query_key_value"], 2, 12.10),
    (STABLELM_ALPHA_3B, ["query_key_value"], 4, 16.92),
    (LLAMA_2_7B, ["q_proj", "v_proj"], 1, 21.30),
    (LLAMA_2_7B, ["q_proj", "v_proj"], 2, 29.07),
]


@pytest.mark.parametrize(("config", "modules", "batch", "measured"), PUBLISHED)
def test_the_estimate_is_near_what_others_measured(
    tmp_path: Path, config: dict[str, Any], modules: list[str], batch: int, measured: float
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    trial = trial_of(lora_rank=8, target_modules=modules, micro_batch=batch, max_length=1304, precision="bf16")
    estimate = estimate_memory(read_model_shape(tmp_path), trial, whole_logits=True)
    # They measured PyTorch's tensors, without the context.
    assert estimate.vram_gb - estimate.parts["overhead"] == pytest.approx(measured, rel=0.08)


TINY_LLAMA = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "intermediate_size": 5632,
    "vocab_size": 32000,
}


@pytest.mark.parametrize(
    ("config", "rank", "modules", "batch", "measured"),
    [
        (TINY_LLAMA, 8, "all-linear", 8, 16.24),
        (LLAMA_2_7B, 32, ["q_proj", "v_proj"], 2, 13.68),
        (STABLELM_ALPHA_3B, 32, ["query_key_value"], 1, 5.24),
    ],
)
def test_qlora_s_estimate_is_near_what_others_measured(
    tmp_path: Path, config: dict[str, Any], rank: int, modules: Any, batch: int, measured: float
) -> None:
    """Records of 512 tokens: litgpt at 26857050fe, config_hub/finetune/README.md."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    trial = trial_of(
        method="qlora", lora_rank=rank, target_modules=modules, micro_batch=batch, max_length=512, precision="bf16"
    )
    estimate = estimate_memory(read_model_shape(tmp_path), trial, whole_logits=True)
    assert estimate.vram_gb - estimate.parts["overhead"] == pytest.approx(measured, rel=0.12)


@pytest.fixture
def shape(tmp_path: Path) -> ModelShape:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return read_model_shape(tmp_path)


@pytest.mark.parametrize(
    "trial",
    [
        trial_of(lora_rank=4),
        trial_of(lora_rank=4, target_modules=["q_proj", "down_proj"]),
        trial_of(lora_rank=4, use_dora=True),
        trial_of(method="prefix", virtual_tokens=5),
        trial_of(method="ia3"),
    ],
    ids=["lora", "lora-two-modules", "dora", "prefix", "ia3"],
)
def test_trained_parameters_are_those_that_peft_makes(shape: ModelShape, tmp_path: Path, trial: TrialConfig) -> None:
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from finetune.training.adapters import peft_config

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    adapted = get_peft_model(model, peft_config(shape, trial))
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert trainable_parameters(shape, trial) == trained


def test_the_parts_add_up(shape: ModelShape) -> None:
    estimate = estimate_memory(shape, trial_of(micro_batch=64, max_length=2048), limit_gb=100)
    assert estimate.vram_gb == pytest.approx(sum(estimate.parts.values()), abs=0.01)
    assert estimate.fits is True
    assert list(estimate.parts) == [
        "weights",
        "adapter",
        "gradients",
        "optimizer",
        "activations",
        "logits",
        "overhead",
    ]


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"micro_batch": 1}, {"micro_batch": 2}),
        ({"max_length": 512}, {"max_length": 1024}),
        ({"gradient_checkpointing": True}, {"gradient_checkpointing": False}),
        ({"method": "qlora", "max_length": 8}, {"method": "lora", "max_length": 8}),
        ({"attention": "sdpa"}, {"attention": "eager"}),
        ({"optimizer": "paged_adamw_8bit"}, {"optimizer": "adamw_torch"}),
        ({"precision": "bf16"}, {"precision": "fp32"}),
        ({"method": "lora", "max_length": 8}, {"method": "full", "max_length": 8}),
    ],
)
def test_what_saves_memory_lowers_the_estimate(shape: ModelShape, less: dict[str, Any], more: dict[str, Any]) -> None:
    base = {"micro_batch": 4, "max_length": 1024}
    low = estimate_memory(shape, trial_of(**{**base, **less}))
    high = estimate_memory(shape, trial_of(**{**base, **more}))
    assert low.vram_gb < high.vram_gb
