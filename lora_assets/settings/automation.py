"""Settings of automation."""

from __future__ import annotations

from typing import Literal
from zoneinfo import ZoneInfo

from pydantic import Field, field_validator

from lora_assets.settings.values import SettingsGroup, on_kubernetes
from sensors.arrivals import MAX_WATCHED, Completeness


class AutomationSettings(SettingsGroup):
    """What happens by itself, and when."""

    automation_on: bool = Field(
        default_factory=on_kubernetes,
        description="Whether the arrival sensor and the schedules are on from the start, or switched on in the UI.",
    )
    sensor_interval_seconds: int = Field(30, ge=1, description="Time between two looks at the exports directory.")
    arrivals_per_tick: int = Field(20, ge=1, le=MAX_WATCHED, description="The most dates that one look asks for.")
    exports_complete: Completeness = Field(
        "still",
        description="When a file without a marker NAME.done is complete: still (unchanged for two looks), "
        "rename (at once: its writer renames it into place) or marker (never).",
    )
    retrain: Literal["newest", "all"] = Field(
        "newest", description="Which dates train again when older data changed: the newest affected, or all."
    )
    time_zone: str = Field("UTC", description="Of CATCH_UP_CRON and DRIFT_CRON, such as Europe/Kyiv.")
    catch_up_cron: str = Field("0 2 * * *", description="When dates without a good adapter are asked for.")
    catch_up_gpu_hours: float | None = Field(
        None,
        gt=0,
        description="GPU-hours that one catch-up, or `lora-assets run` without --date, may ask for; unset: no limit.",
    )
    drift_cron: str = Field("0 4 * * 0", description="When the champion is evaluated on what arrived since.")
    drift_tolerance: float = Field(
        0.1, ge=0, description="Nats per token by which the champion's loss may be higher on what arrived since."
    )
    gpus: int = Field(
        1, ge=1, description="Steps on a GPU at once, over all runs on this machine: the limit of the pool gpu."
    )

    @field_validator("time_zone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (KeyError, ValueError, OSError) as error:
            raise ValueError("no time zone of that name; allowed: UTC, Europe/Kyiv, ...") from error
        return value
