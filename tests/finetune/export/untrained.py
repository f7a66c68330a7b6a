"""Random models and adapters of a few numbers: as if they had been trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.base_model.models import BaseModelRef

VOCABULARY, ADDED = 40, 3
IDS = [[1, 2, 3, 5, 7, 38]]


def lora(**changes: Any) -> Any:
    from peft import LoraConfig

    common = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    return LoraConfig(**common | changes)


def load(path: Path, *, rows: int = VOCABULARY) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    if rows != VOCABULARY:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def train(base: BaseModelRef, config: Any, output: Path, rows: int) -> None:
    """As if it had been trained: with other numbers in all that is trained."""
    import torch
    from peft import get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(load(base.path, rows=rows), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(output)


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.float()
