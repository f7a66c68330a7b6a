"""The composition root: what exists, how it is made, when it runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import dagster as dg
from pydantic import ValidationError

from finetune.errors import ConfigurationError
from lora_assets.assets import (
    ablation,
    continual,
    curriculum,
    dataset,
    drift,
    ensemble,
    evaluation,
    export,
    search,
    training,
)
from lora_assets.cancellation import cancel_experiments
from lora_assets.checks import ALL_CHECKS, GGUF_CHECK
from lora_assets.jobs import champion_drift, train_and_export
from lora_assets.logs import console
from lora_assets.partitions import dataset_dates
from lora_assets.run_end import fail_dead_runs, reconcile, report_end
from lora_assets.schedules import build_schedules
from lora_assets.settings import Settings, load_settings, on_kubernetes
from resources.artifact_store import ArtifactStore, ValueStore
from resources.base_model import BaseModelSource
from resources.ollama import OllamaServer
from resources.run_log import RunLog
from resources.study import StudyStore
from resources.trainer import LoraTrainer
from resources.training_run import TrainingRun
from sensors.export_arrival import build_export_arrival_sensor
from sensors.run_failure import (
    build_cancellation_sensor,
    build_failure_sensor,
    build_reconciliation_sensor,
    build_success_sensor,
)

Values = TypeVar("Values", bound=dg.Config)


def secret(variable: str, value: object) -> str | None:
    """A reference to an environment variable, so that Dagster shows its name and never its value."""
    return dg.EnvVar(variable) if value else None


def build_base_model(settings: Settings) -> BaseModelSource:
    """The base model that BASE_MODEL_NAME names."""
    return BaseModelSource(
        name=settings.base_model_name,
        revision=settings.base_model_revision,
        cache_dir=str(settings.layout.base_models),
        token=secret("HF_TOKEN", settings.hf_token),
        trust_remote_code=settings.trust_remote_code,
    )


@contextmanager
def open_run_log(settings: Settings) -> Iterator[RunLog]:
    """The run log outside of Dagster's own handling of resources, closed with the block."""
    url = settings.database_url.get_secret_value() if settings.database_url else ""
    run_log = RunLog(database_url=url, data_dir=str(settings.data_root))
    try:
        yield run_log
    finally:
        run_log.close()


def close_rows(settings: Settings, dagster_run_id: str, reason: str) -> list[TrainingRun]:
    """Close the run log's rows of a Dagster run that is over; returns them as they were."""
    with open_run_log(settings) as run_log:
        return run_log.close_orphans(lambda owner: reason if owner == dagster_run_id else None)


def cancel_rows(settings: Settings, dagster_run_id: str, reason: str) -> list[TrainingRun]:
    """Close the rows of a Dagster run that was cancelled, and cancel the experiments that run elsewhere for them.

    Raises:
        RemoteError: the database stays away.
    """
    closed = close_rows(settings, dagster_run_id, reason)
    if closed:
        with open_run_log(settings) as run_log:
            cancel_remote_trainings(settings, run_log)
    return closed


def cancel_remote_trainings(settings: Settings, run_log: RunLog) -> list[str]:
    """Cancel what still runs elsewhere for cancelled runs; returns what is left of it, for a person to read.

    Raises:
        RemoteError: the database stays away.
    """
    if settings.training_backend == "hf-peft":
        return []
    trainer = build_trainer(settings).process_config_and_initialize()
    return cancel_experiments(trainer, run_log, settings.layout)


def close_what_was_killed(settings: Settings, instance: dg.DagsterInstance) -> list[str]:
    """End the runs, rows and remote trainings that were left behind; returns what they were, for a person to read.

    Raises:
        RemoteError: the database stays away.
    """
    closed = [f"closed run {run_id}" for run_id in fail_dead_runs(instance)]
    with open_run_log(settings) as run_log:
        closed += [f"closed row {row.id}" for row in reconcile(settings, instance, run_log)]
        return closed + cancel_remote_trainings(settings, run_log)


def build_trainer(settings: Settings) -> LoraTrainer:
    """The trainer that TRAINING_BACKEND names.

    Raises:
        ConfigurationError: H2O_PROTOCOL, H2O_TIMING or H2O_LIMITS holds a wrong name or value.
    """
    if settings.training_backend == "h2o":
        from resources.h2o.protocol import Limits, Protocol, Timing
        from resources.h2o_trainer import H2OTrainer

        return H2OTrainer(
            api_url=settings.h2o_api_url or "",
            api_key=secret("H2O_API_KEY", settings.h2o_api_key),
            ca_file=str(settings.h2o_ca_file) if settings.h2o_ca_file else None,
            protocol=from_json(Protocol, "H2O_PROTOCOL", settings.h2o_protocol),
            timing=from_json(Timing, "H2O_TIMING", settings.h2o_timing),
            limits=from_json(Limits, "H2O_LIMITS", settings.h2o_limits),
        )
    from resources.peft_trainer import PeftTrainer

    return PeftTrainer()


def from_json(kind: type[Values], variable: str, values: dict[str, Any]) -> Values:
    """The configuration whose values other than the defaults are those of a JSON object.

    Raises:
        ConfigurationError: names the variable, the field and what is wrong with it.
    """
    remedy = f"Its fields are {', '.join(kind.model_fields)}"
    if unknown := sorted(set(values) - set(kind.model_fields)):
        raise ConfigurationError(f"unknown field {', '.join(unknown)}", where=variable, remedy=remedy)
    try:
        return kind(**values)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise ConfigurationError(problems, where=variable, remedy=remedy) from error


def build_executor(settings: Settings) -> dg.ExecutorDefinition:
    """A pod per step on Kubernetes, else a process per step."""
    if on_kubernetes():
        from lora_assets.kubernetes_executor import pod_per_step

        return pod_per_step(settings)
    # A fork server that has Dagster loaded starts a step in a fraction of the time.
    return dg.multiprocess_executor.configured({"start_method": {"forkserver": {"preload_modules": ["dagster"]}}})


def build_definitions(settings: Settings) -> dg.Definitions:
    """Everything that Dagster shows and runs."""
    layout = settings.layout
    return dg.Definitions(
        assets=[
            dataset.brain_exports,
            dataset.merged_dataset,
            dataset.dataset_profile,
            training.training_plan,
            training.adapter,
            evaluation.eval_report,
            evaluation.registered_adapter,
            export.merged_model,
            *([export.gguf] if settings.needs_gguf else []),
            *([export.modelfile] if "ollama" in settings.targets else []),
            *([export.lmstudio_export] if "lmstudio" in settings.targets else []),
            drift.drift_report,
            search.hpo_study,
            ensemble.ensemble_adapter,
            curriculum.curriculum_adapter,
            ablation.ablation_report,
            continual.continual_report,
        ],
        asset_checks=[
            *(check for check in ALL_CHECKS if settings.needs_gguf or check is not GGUF_CHECK),
            drift.champion_drift,
        ],
        jobs=[train_and_export, champion_drift],
        schedules=build_schedules(settings),
        sensors=[
            build_export_arrival_sensor(
                job_name=train_and_export.name,
                partitions=dataset_dates,
                exports=dataset.brain_exports.key,
                directory=settings.exports,
                pattern=settings.pattern,
                complete=settings.exports_complete,
                interval_seconds=settings.sensor_interval_seconds,
                limit=settings.arrivals_per_tick,
                running=settings.automation_on,
            ),
            build_failure_sensor(
                lambda run_id, reason: [row.id for row in close_rows(settings, run_id, reason)],
                partial(report_end, settings),
            ),
            build_success_sensor(partial(report_end, settings)),
            build_reconciliation_sensor(partial(close_what_was_killed, settings)),
            build_cancellation_sensor(lambda run_id, reason: [row.id for row in cancel_rows(settings, run_id, reason)]),
        ],
        resources={
            "io_manager": ValueStore(directory=str(layout.asset_values)),
            "store": ArtifactStore(data_root=str(layout.root), pipeline=layout.pipeline),
            "base_model": build_base_model(settings),
            "trainer": build_trainer(settings),
            "run_log": RunLog(
                database_url=secret("DATABASE_URL", settings.database_url) or "", data_dir=str(layout.root)
            ),
            "studies": StudyStore(
                database_url=secret("DATABASE_URL", settings.database_url) or "", data_dir=str(layout.root)
            ),
            "ollama": OllamaServer(host=settings.ollama_host, timeout=600),
        },
        executor=build_executor(settings),
        loggers={"console": console},
    )


defs = build_definitions(load_settings())
