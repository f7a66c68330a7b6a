"""A local training as a step: what a person sees while it runs, and how it is retried."""

import os
import signal
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dagster as dg

from finetune.base_model.models import BaseModelRef
from finetune.progress import ProgressEvent
from finetune.training.checkpoints import newest_complete
from finetune.training.models import TrainingResult
from lora_assets.assets.training import _observed, _train
from lora_assets.logs import TAGS
from lora_assets.outcome import failed_steps
from resources.peft_trainer import PeftTrainer
from resources.run_log import RunLog
from tests.resources.test_lease import request_for


def test_the_figures_of_a_running_training_are_on_its_asset() -> None:
    told: list[ProgressEvent] = []

    @dg.asset(partitions_def=dg.StaticPartitionsDefinition(["2026-06-01"]))
    def trained(context: dg.AssetExecutionContext) -> None:
        listen = _observed(context, "2026-06-01", told.append)
        listen(ProgressEvent("loading the base model", 0, None, "models"))
        for step in (1, 2):
            listen(ProgressEvent("training", step, 9, "steps", {"loss": 2.5 / step, "peak_memory_gb": 1.5}))

    with dg.DagsterInstance.ephemeral() as instance:
        assert dg.materialize([trained], partition_key="2026-06-01", instance=instance).success
        (record,) = instance.fetch_observations(trained.key, limit=10).records
    assert len(told) == 3
    observed = record.asset_observation
    assert observed is not None
    assert observed.partition == "2026-06-01"
    shown = {name: value.value for name, value in observed.metadata.items()}
    assert shown == {"step": 1, "total_steps": 9, "loss": 2.5, "peak_memory_gb": 1.5}


def test_a_step_that_is_told_to_end_saves_a_checkpoint_and_its_retry_goes_on_under_a_new_lease(
    tmp_path: Path, tiny_model: BaseModelRef
) -> None:
    request = request_for(tmp_path, tiny_model)
    results: list[TrainingResult] = []
    told: list[int] = []

    def end_once(event: ProgressEvent) -> None:
        if event.stage == "training" and not told:
            told.append(event.done)
            os.kill(os.getpid(), signal.SIGTERM)

    # The path of a unix socket must be short.
    with tempfile.TemporaryDirectory(prefix="la-", dir="/tmp") as short, dg.DagsterInstance.ephemeral() as instance:
        run_log = RunLog(data_dir=short)

        @dg.asset(retry_policy=dg.RetryPolicy(max_retries=1), partitions_def=dg.StaticPartitionsDefinition(["d"]))
        def adapter(context: dg.AssetExecutionContext) -> None:
            results.append(_train(context, PeftTrainer(), run_log, request, end_once))

        assert dg.materialize([adapter], partition_key="d", instance=instance).success
        (row,) = run_log.recent()
        with run_log.lease(request.run_id) as lease:
            token = lease.token
        run_log.close()
    assert told, "otherwise nobody told it to end"
    (result,) = results
    assert told[0] <= result.resumed_from_step < result.training_steps
    assert (row.status, row.attempts) == ("COMPLETED", 2)
    assert token == 3, "each attempt takes the lease once"


def test_a_command_that_is_told_to_end_saves_a_checkpoint_and_does_not_begin_again(
    tmp_path: Path, tiny_model: BaseModelRef
) -> None:
    request = request_for(tmp_path, tiny_model)
    told: list[int] = []

    def end(event: ProgressEvent) -> None:
        if event.stage == "training":
            told.append(event.done)
            os.kill(os.getpid(), signal.SIGTERM)

    with tempfile.TemporaryDirectory(prefix="la-", dir="/tmp") as short, dg.DagsterInstance.ephemeral() as instance:
        run_log = RunLog(data_dir=short)

        @dg.asset(retry_policy=dg.RetryPolicy(max_retries=1), partitions_def=dg.StaticPartitionsDefinition(["d"]))
        def adapter(context: dg.AssetExecutionContext) -> None:
            _train(context, PeftTrainer(), run_log, request, end)

        ended = dg.materialize([adapter], partition_key="d", instance=instance, tags=TAGS, raise_on_error=False)
        (row,) = run_log.recent()
        run_log.close()
    assert len(told) == 1, "otherwise it was not told to end, or began again"
    (failed,) = failed_steps(ended.all_events)
    assert failed.transient
    assert newest_complete(request.work_dir / "checkpoints") is not None
    assert (row.status, row.attempts) == ("FAILED", 1)
    assert "asked to end after step" in str(row.error_message)


def test_two_runs_that_were_started_for_the_same_training_train_once(tmp_path: Path, tiny_model: BaseModelRef) -> None:
    request = request_for(tmp_path, tiny_model)
    results: list[TrainingResult] = []
    said: list[str] = []

    with tempfile.TemporaryDirectory(prefix="la-", dir="/tmp") as short:
        run_log = RunLog(data_dir=short)
        run_log.recent()

        @dg.asset(partitions_def=dg.StaticPartitionsDefinition(["d"]))
        def adapter(context: dg.AssetExecutionContext) -> None:
            results.append(_train(context, PeftTrainer(), run_log, request, lambda event: said.append(event.stage)))

        def run() -> None:
            with dg.DagsterInstance.ephemeral() as instance:
                dg.materialize([adapter], partition_key="d", instance=instance)

        with ThreadPoolExecutor(2) as pool:
            for future in [pool.submit(run), pool.submit(run)]:
                future.result()
        rows = run_log.recent()
        run_log.close()
    assert [stage for stage in said if stage.startswith("waiting for process")], "otherwise they did not meet"
    assert sorted(result.reused for result in results) == [False, True]
    assert said.count("loading the base model") == 1
    assert [row.status for row in rows] == ["COMPLETED"]
