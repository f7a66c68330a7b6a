"""What vLLM can serve, and the cards that say how."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune.base_model.models import BaseModelRef
from finetune.export.models import MergedModel
from finetune.export.serving import vllm_adapter_command, vllm_refusal

PLAIN = {"peft_type": "LORA", "r": 12, "lora_alpha": 24, "target_modules": ["q_proj"], "use_rslora": True}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"bias": "all"}, "biases"),
        ({"r": 1024}, "largest, 512"),
        ({"peft_type": "IA3"}, "LoRA adapters only"),
    ],
)
def test_what_vllm_would_refuse_or_serve_wrongly_is_named(change: dict[str, Any], reason: str) -> None:
    assert vllm_refusal(PLAIN) is None
    assert reason in str(vllm_refusal(PLAIN | change))


def test_the_rank_is_one_that_vllm_takes() -> None:
    assert "--max-lora-rank 16 --lora-modules run1=" in vllm_adapter_command("llama", "run1", PLAIN)


def test_the_merged_model_lies_as_vllm_wants_it(base: BaseModelRef, merged: MergedModel) -> None:
    """A directory of transformers: configuration, weights with their index, tokenizer, chat template, card."""
    from huggingface_hub import ModelCard
    from transformers import AutoConfig, AutoTokenizer

    assert AutoConfig.from_pretrained(merged.path).architectures == ["LlamaForCausalLM"]
    assert AutoTokenizer.from_pretrained(merged.path).chat_template
    index = json.loads((merged.path / "model.safetensors.index.json").read_bytes())
    assert {path.name for path in merged.path.glob("*.safetensors")} == set(index["weight_map"].values())
    card = ModelCard.load(merged.path / "README.md")
    assert (card.data.base_model, card.data.license, card.data.library_name) == (
        base.name,
        "apache-2.0",
        "transformers",
    )
    assert "vllm serve path/to/this/directory --served-model-name run1" in card.text
