"""Settings of alerts, logs, metrics and garbage collection."""

from __future__ import annotations

import re

from pydantic import Field, SecretStr, field_validator

from finetune.logs import LogFormat
from lora_assets.settings.values import AbsolutePath, SettingsGroup


class OperationsSettings(SettingsGroup):
    """What people and monitoring are told, and what is removed."""

    alert_webhook_url: SecretStr | None = Field(
        None, description='Webhook that takes {"text": ...}, such as Slack\'s, for alerts; unset: none are sent.'
    )
    alert_interval_seconds: float = Field(3600, gt=0, description="The same trouble is told once in this time.")
    alert_limit: int = Field(20, ge=1, description="The most alerts in that time, whatever they tell.")
    dagster_ui_url: str | None = Field(
        None, pattern=r"^https?://[^@\s]+$", description="Address of the Dagster UI, for links in alerts."
    )
    log_format: LogFormat = Field("text", description="Log lines as text, or as json: one object a line.")
    metrics_textfile_dir: AbsolutePath | None = Field(
        None, description="Directory of node_exporter's textfile collector, for the metrics of runs; unset: none."
    )
    metrics_pushgateway_url: str | None = Field(
        None,
        pattern=r"^https?://[^@\s]+$",
        description="Prometheus Pushgateway, for the metrics of runs; unset: none.",
    )
    gc_days: float = Field(14, ge=1, description="What nothing refers to is removed by `gc` after so many days.")
    gc_keep: int = Field(5, ge=1, description="Versions, by number and by reign, whose exports `gc` leaves alone.")

    @field_validator("alert_webhook_url")
    @classmethod
    def _http(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not re.fullmatch(r"https?://[^\s/]+\S*", value.get_secret_value()):
            raise ValueError("not the address of a webhook: https://host/path")
        return value
