"""Settings of the backend and of the base model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, SecretStr

from lora_assets.settings.values import SettingsGroup


class BackendSettings(SettingsGroup):
    """Where adapters are trained, and what they adapt."""

    training_backend: Literal["hf-peft", "h2o"] = Field(
        "hf-peft", description="Where adapters are trained: here with PEFT, or delegated to H2O LLM Studio."
    )
    base_model_name: str | None = Field(
        None,
        description="Local directory, hub name or short name (llama3-8b). Unset: the embedded tiny model; "
        "on Kubernetes it must be set.",
    )
    base_model_revision: str | None = Field(None, description="Branch, tag or commit of the hub repository.")
    hf_token: SecretStr | None = Field(None, description="Token of the hub, for gated repositories and for push.")
    trust_remote_code: bool = Field(False, description="Allow code from the base model's repository to run.")
