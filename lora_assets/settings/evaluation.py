"""Settings of evaluation and promotion."""

from __future__ import annotations

from pydantic import Field

from lora_assets.settings.values import AbsolutePath, SettingsGroup


class EvaluationSettings(SettingsGroup):
    """What a champion must show."""

    min_champion_gain: float = Field(
        0.001,
        ge=0,
        description="Nats per token by which a new champion's loss must be lower at the worse end of its interval.",
    )

    regressions_dir: AbsolutePath | None = Field(
        None,
        description="Prompts (*.jsonl) that a champion must answer as expected; unset: DATA_ROOT/regressions.",
    )
    eval_tasks: str = Field("", description="Comma-separated tasks of lm-eval (extra lm-eval); unset: none.")
    eval_tasks_dir: AbsolutePath | None = Field(
        None, description="Directory of your own tasks' YAML files; unset: none."
    )

    @property
    def tasks(self) -> list[str]:
        """The tasks of lm-eval asked for."""
        return [task.strip() for task in self.eval_tasks.split(",") if task.strip()]
