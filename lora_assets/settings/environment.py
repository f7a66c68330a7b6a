"""All groups of settings as one, read from the environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from finetune.dataset.parameters import PLAIN
from finetune.errors import ConfigurationError
from finetune.publishing import sha256_json
from finetune.redaction import Redactor
from lora_assets.settings.automation import AutomationSettings
from lora_assets.settings.backend import BackendSettings
from lora_assets.settings.databases import DatabaseSettings
from lora_assets.settings.dataset import DatasetSettings
from lora_assets.settings.evaluation import EvaluationSettings
from lora_assets.settings.exports import ExportSettings
from lora_assets.settings.h2o import H2OSettings
from lora_assets.settings.kubernetes import KubernetesSettings
from lora_assets.settings.locations import LocationSettings
from lora_assets.settings.operations import OperationsSettings
from lora_assets.settings.recorded import RECORDED, RECORDED_OF_LIBRARIES
from lora_assets.settings.training import TrainingSettings
from lora_assets.settings.values import on_kubernetes

ENV_FILE = ".env"


# Pydantic takes fields from the last base to the first: the group that docs/settings.md begins with stands last.
class Settings(
    KubernetesSettings,
    OperationsSettings,
    AutomationSettings,
    DatabaseSettings,
    ExportSettings,
    H2OSettings,
    EvaluationSettings,
    TrainingSettings,
    DatasetSettings,
    LocationSettings,
    BackendSettings,
    BaseSettings,
):
    """Every environment variable that lora-assets reads; a field's name in capitals is the variable's.

    Values come from the environment first, then from a file ``.env`` in the working directory. An empty
    variable counts as unset.
    """

    model_config = SettingsConfigDict(
        env_file=ENV_FILE, env_ignore_empty=True, extra="ignore", frozen=True, defer_build=False
    )

    @model_validator(mode="after")
    def _complete(self) -> Settings:
        if self.training_backend == "h2o" and not self.h2o_api_url:
            raise ValueError("H2O_API_URL must be set when TRAINING_BACKEND=h2o")
        if self.training_backend == "h2o" and self.init_from == "champion":
            raise ValueError("INIT_FROM=champion needs TRAINING_BACKEND=hf-peft: H2O begins with the base model")
        if on_kubernetes() and self.base_model_name is None:
            raise ValueError("BASE_MODEL_NAME must be set on Kubernetes: the embedded model is for trying out")
        if on_kubernetes() and self.database_url is None:
            raise ValueError("DATABASE_URL must be set on Kubernetes: an embedded PostgreSQL would end with its pod")
        return self

    @property
    def regressions(self) -> Path | None:
        """The directory of regression prompts; one that was named must exist, the usual one may be missing."""
        usual = self.data_root / "regressions"
        return self.regressions_dir or (usual if usual.is_dir() else None)

    @property
    def secrets(self) -> list[str]:
        """The values that must never be shown."""
        values = (getattr(self, name) for name in type(self).model_fields)
        return [value.get_secret_value() for value in values if isinstance(value, SecretStr)]

    @property
    def recorded(self) -> dict[str, str]:
        """What manifests tell of the environment, by variable: what is on a list and set, without secrets."""
        redact = Redactor(self.secrets)
        values = {name.upper(): getattr(self, name) for name in RECORDED}
        values |= {name: os.environ.get(name) for name in RECORDED_OF_LIBRARIES}
        return {name: redact(str(value)) for name, value in values.items() if value not in (None, "")}

    @property
    def recipe(self) -> str:
        """Hash of the settings that decide what is trained: another recipe makes a date stale."""
        names = (
            "training_backend",
            "base_model_name",
            "base_model_revision",
            "dataset_window",
            "eval_fraction",
            "max_line_bytes",
            "training_method",
            "training_task",
            "lora_rank",
            "train_epochs",
            "learning_rate",
            "max_length",
            "micro_batch",
            "accumulation",
            "vram_limit_gb",
            "seed",
        )
        recipe = {name: getattr(self, name) for name in names}
        if self.adopt_trial:
            recipe["adopt_trial"] = self.adopt_trial
        # Not who reigns: a new champion makes no date stale.
        if self.init_from != "base":
            recipe |= {"init_from": self.init_from, "replay_fraction": self.replay_fraction}
        # Options that are off leave dates as they are; the deletion list decides by its entries.
        parameters = self.prepare_parameters
        deciding = parameters.deciding(parameters.deletions())
        recipe |= {name: value for name, value in deciding.items() if name not in PLAIN}
        return sha256_json(recipe)[:16]


def load_settings() -> Settings:
    """Read and check the environment.

    Raises:
        ConfigurationError: names each variable that is wrong, its value unless secret, and what is allowed.
    """
    try:
        return Settings()
    except ValidationError as error:
        problems = "; ".join(_describe(problem) for problem in error.errors())
        raise ConfigurationError(
            problems, where="environment", remedy="docs/settings.md has a table of all variables"
        ) from error


def _describe(problem: Any) -> str:
    if not problem["loc"]:
        return str(problem["msg"]).removeprefix("Value error, ")
    name = str(problem["loc"][0])
    field: FieldInfo = Settings.model_fields[name.lower()]
    value = "" if is_secret(field) else f"={problem['input']}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "string_pattern_mismatch":
        # A pattern is no answer to what is allowed; the field's meaning is.
        message = f"not of the form that it must have. {field.description}"
    return f"{name.upper()}{value}: {message}"


def is_secret(field: FieldInfo) -> bool:
    """Whether the field's value must never be shown."""
    return "SecretStr" in str(field.annotation)


def sources(settings: Settings) -> dict[str, str]:
    """Where each value in force came from: ``environment``, ``.env`` or ``default``, by field name."""
    from dotenv import dotenv_values

    environment = {name.lower() for name, value in os.environ.items() if value}
    file = {name.lower() for name, value in dotenv_values(ENV_FILE).items() if value}
    return {
        name: "environment" if name in environment else ENV_FILE if name in file else "default"
        for name in type(settings).model_fields
    }
