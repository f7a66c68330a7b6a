"""The best trial's configuration as a file named by its content, which a plan adopts by that hash."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from finetune.errors import ArtifactError, ConfigurationError
from finetune.planning.models import Method, TrialConfig
from finetune.planning.overrides import PlanOverrides
from finetune.publishing import canonical_json, sha256_file, sha256_json, write_bytes_atomically


def configuration_hash(trial: TrialConfig) -> str:
    """The name of a configuration: SHA-256 of its canonical JSON."""
    return sha256_json(trial.model_dump(mode="json"))


def keep_configuration(directory: Path, trial: TrialConfig) -> str:
    """Write a configuration under its hash, which is returned; equal ones are one file."""
    name = configuration_hash(trial)
    path = directory / f"{name}.json"
    if not path.exists():
        write_bytes_atomically(path, canonical_json(trial.model_dump(mode="json")))
    return name


def read_configuration(directory: Path, name: str) -> TrialConfig:
    """The configuration of that hash.

    Raises:
        ConfigurationError: there is none.
        ArtifactError: the file was altered.
    """
    path = directory / f"{name}.json"
    if not path.is_file():
        raise ConfigurationError(
            "no configuration of this hash was kept here",
            where=path,
            remedy="Take the hash from an experiment's report: lora-assets experiment show NAME",
        )
    if sha256_file(path) != name:
        raise ArtifactError(
            "the configuration was altered: its SHA-256 is not its name",
            where=path,
            remedy="Delete it and run the experiment again: its trials are not repeated",
        )
    try:
        return TrialConfig.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ArtifactError(
            f"the configuration is of another version: {error}", where=path, remedy="Run a new experiment"
        ) from error


def as_overrides(trial: TrialConfig) -> tuple[Method, PlanOverrides]:
    """What a plan must be given to be exactly this configuration."""
    values = trial.model_dump(exclude={"trial_id", "method", "task"}, exclude_none=True)
    return trial.method, PlanOverrides.model_validate(values)
