"""Settings of exports of the merged model."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, field_validator

from lora_assets.settings.values import SettingsGroup

ExportTarget = Literal["ollama", "lmstudio", "gguf", "vllm"]
Quantization = Literal["F16", "BF16", "F32", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q2_K"]


class ExportSettings(SettingsGroup):
    """What the merged model is turned into, and where it is published."""

    gguf_quantization: Quantization = Field("Q4_K_M", description="Type of the GGUF that is served.")
    export_targets: str = Field(
        "ollama,lmstudio",
        description="Comma-separated: ollama, lmstudio, gguf, vllm (the merged model, which is always made).",
    )
    ollama_host: str | None = Field(None, description="Ollama server on which models are created; unset: none.")
    ollama_model_name: str = Field("predator-v21", description="Name of the created model, before :run_id.")
    lmstudio_publisher: str = Field("lora-assets", description="Folder above the model in LM Studio's layout.")

    hub_repo: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$",
        description="owner/name of the hub repository that `lora-assets push` writes to.",
    )
    hub_private: bool = Field(True, description="Whether a hub repository that push makes is private.")

    @field_validator("export_targets")
    @classmethod
    def _known_targets(cls, value: str) -> str:
        targets = [target.strip() for target in value.split(",") if target.strip()]
        allowed = get_args(ExportTarget)
        unknown = [target for target in targets if target not in allowed]
        if unknown:
            raise ValueError(f"unknown target {', '.join(unknown)}; allowed: {', '.join(allowed)}")
        return ",".join(targets)

    @property
    def targets(self) -> list[str]:
        """The serving exports asked for."""
        return [target for target in self.export_targets.split(",") if target]

    @property
    def needs_gguf(self) -> bool:
        """Whether any target is served from GGUF files."""
        return set(self.targets) != {"vllm"}
