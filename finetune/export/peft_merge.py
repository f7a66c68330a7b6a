"""Merging through peft itself: what cannot be merged tensor by tensor, and bases that are not safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.base_model.models import BaseModelRef
from finetune.base_model.remote_code import remedy_for
from finetune.errors import BaseModelError, ExportError
from finetune.evaluation.adapters import EMBEDDINGS, load_adapter

if TYPE_CHECKING:
    from torch.nn import Module

# Methods that add virtual tokens in front of the input: there is no weight to add them to.
_VIRTUAL_TOKENS = {"PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "ADAPTION_PROMPT"}


def refuse_unmergeable(config: Mapping[str, Any], adapter_path: Path) -> None:
    """Refuse adapters for which a merged model has no meaning.

    Raises:
        ExportError: prompt methods, and adapters that act on some tokens only.
    """
    peft_type = config["peft_type"]
    if peft_type in _VIRTUAL_TOKENS:
        raise ExportError(
            f"an adapter of type {peft_type} adds virtual tokens, not weights: merging it has no meaning",
            where=adapter_path,
            remedy="Serve base and adapter together through peft, or train with method lora, qlora or ia3",
        )
    if config.get("alora_invocation_tokens"):
        raise ExportError(
            "an activated LoRA acts only after its invocation tokens: merging it has no meaning",
            where=adapter_path,
            remedy="Serve base and adapter together, or train a plain LoRA",
        )


def merge_through_peft(base_model: BaseModelRef, adapter_path: Path, config: Mapping[str, Any], output: Path) -> int:
    """Load base and adapter, merge, and write safetensors with index and configuration into `output`.

    The base is loaded in its own precision, also for an adapter that was trained on a quantized base.
    Returns how many modules were merged.

    Raises:
        ArtifactError: the adapter is damaged or does not fit the base model.
        BaseModelError: the base model cannot be loaded.
        ExportError: peft cannot merge this adapter.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        base = AutoModelForCausalLM.from_pretrained(
            base_model.path, dtype="auto", local_files_only=True, trust_remote_code=base_model.trust_remote_code
        )
    except ValueError as error:
        raise BaseModelError(
            f"the base model {base_model.name} cannot be loaded: {error}",
            where=base_model.path,
            remedy=remedy_for(error, "Point BASE_MODEL_NAME at a whole model directory"),
        ) from error
    rows = _changed_rows(adapter_path, base.get_input_embeddings().weight.shape[0])
    if rows:
        base.resize_token_embeddings(rows, mean_resizing=False)
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    model = load_adapter(base, adapter_path)
    if (base.get_input_embeddings(), base.get_output_embeddings()) != (embeddings, head):
        _untie(embeddings, head)
    if not hasattr(model, "merge_and_unload"):
        raise ExportError(
            f"peft cannot merge an adapter of type {config['peft_type']}",
            where=adapter_path,
            remedy="Serve base and adapter together through peft",
        )
    count = sum(1 for module in model.modules() if hasattr(module, "merge") and hasattr(module, "get_base_layer"))
    with torch.no_grad():
        merged = model.merge_and_unload()
    broken = next((name for name, value in merged.named_parameters() if not torch.isfinite(value).all()), None)
    if broken:
        raise ExportError(
            f"merging {broken} gives numbers that are not finite",
            where=adapter_path,
            remedy="The adapter is broken: train it again with a lower learning rate",
        )
    head = merged.get_output_embeddings()
    if head is not None and head.weight is not merged.get_input_embeddings().weight:
        # transformers itself corrects the outer configuration only.
        merged.config.get_text_config().tie_word_embeddings = False
    merged.save_pretrained(output)
    return count


def _changed_rows(adapter_path: Path, rows: int) -> int | None:
    """The vocabulary's new size where the adapter was trained with another one."""
    from safetensors import safe_open

    with safe_open(adapter_path / "adapter_model.safetensors", "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a dict
            brought = tensors.get_slice(name).get_shape()[0]
            if EMBEDDINGS.search(name) and brought != rows:
                return int(brought)
    return None


def _untie(embeddings: Module, head: Module | None) -> None:
    """Give the head its own weight: what is merged into a shared one would change both ends of the model."""
    import torch

    if head is not None and head.weight is embeddings.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
