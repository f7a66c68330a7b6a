"""Choices that exclude each other, in plans that are made and in those that were changed by hand."""

from __future__ import annotations

from finetune.errors import ConfigurationError
from finetune.planning.model_config import ModelShape
from finetune.planning.models import TrialConfig


def refuse_contradictions(trial: TrialConfig, shape: ModelShape) -> None:
    """Check that the choices of a configuration go together, and with the model.

    Raises:
        ConfigurationError: two of them exclude each other.
    """

    def refuse(what: str, where: str, remedy: str) -> None:
        raise ConfigurationError(what, where=where, remedy=remedy)

    if trial.method == "prefix" and trial.gradient_checkpointing:
        refuse("prefix tuning does not work with gradient checkpointing", "gradient_checkpointing", "Turn it off")
    if trial.method == "prefix" and trial.packing:
        refuse("prefix tuning does not work with packed records", "packing", "Turn it off")
    if trial.method == "qlora" and trial.use_pissa:
        refuse(
            "PiSSA starts from the base model's own singular vectors, which 4-bit weights no longer have",
            "use_pissa",
            "Use method lora with PiSSA, or qlora without",
        )
    if trial.use_pissa and (trial.use_rslora or trial.use_dora):
        refuse("PiSSA cannot be turned into a plain adapter together with rsLoRA or DoRA", "use_pissa", "Choose one")
    if shape.softcapped and trial.attention == "sdpa":
        refuse("models that bound their attention scores have no sdpa", "attention", "Use eager")
