"""Settings of H2O LLM Studio."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import NoDecode

from lora_assets.settings.values import AbsolutePath, SettingsGroup

# Read by a validator of ours: a syntax error is told like any other wrong value.
JsonObject = Annotated[dict[str, Any], NoDecode]


class H2OSettings(SettingsGroup):
    """The server to which trainings are delegated, and how it is spoken to."""

    h2o_api_url: str | None = Field(None, description="H2O LLM Studio's address; needed with TRAINING_BACKEND=h2o.")
    h2o_api_key: SecretStr | None = Field(None, description="Bearer key for H2O_API_URL.")
    h2o_ca_file: AbsolutePath | None = Field(
        None, description="PEM file of the private certificate authority of H2O_API_URL; unset: the system's."
    )
    h2o_protocol: JsonObject = Field(
        {}, description="JSON object of the server's own routes, status names and field names (docs/h2o.md)."
    )
    h2o_timing: JsonObject = Field(
        {}, description="JSON object of time-outs, intervals and budgets in seconds (docs/h2o.md)."
    )
    h2o_limits: JsonObject = Field({}, description="JSON object of limits on what the server may send (docs/h2o.md).")

    @field_validator("h2o_protocol", "h2o_timing", "h2o_limits", mode="before")
    @classmethod
    def _json(cls, value: Any) -> Any:
        return json.loads(value) if isinstance(value, str) else value
