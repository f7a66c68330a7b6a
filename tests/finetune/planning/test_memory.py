from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.base_model.models import BaseModelRef
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


def test_weights_of_qlora_are_those_that_bitsandbytes_holds(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from finetune.training.adapters import load_base_model

    config = {**TINY, "hidden_size": 512, "intermediate_size": 1536}
    (tmp_path / "config.json").write_text(json.dumps(config))
    trial = trial_of(method="qlora", precision="bf16")
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).save_pretrained(tmp_path)
    base = BaseModelRef(name="small", path=tmp_path, revision=None, fingerprint="0" * 32)
    model = load_base_model(base, trial)
    held = 0
    for parameter in model.parameters():
        held += parameter.untyped_storage().nbytes()
        if state := getattr(parameter, "quant_state", None):
            held += state.absmax.nbytes + state.state2.absmax.nbytes
    assert estimate_memory(read_model_shape(tmp_path), trial).parts["weights"] * 1e9 == pytest.approx(held, rel=0.01)


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
        ({"attention": "flash_attention_2"}, {"attention": "sdpa"}),
        ({"packing": True}, {"packing": False}),
        ({"packing": False, "attention": "eager"}, {"packing": True, "attention": "eager"}),
        ({"method": "prefix", "virtual_tokens": 5}, {"method": "prefix", "virtual_tokens": 50}),
        ({"method": "ia3"}, {"method": "lora"}),
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
