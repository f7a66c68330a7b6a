"""What must hold whatever went wrong: nothing ran twice, nothing is left open, everything published is whole."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import dagster as dg

from finetune.publishing import is_complete, read_manifest
from resources.run_log import RunLog
from resources.training_run import TrainingRun
from tests.kubernetes.cluster import PodHistory
from tests.kubernetes.deployment import Deployment


def rows(deployment: Deployment) -> list[TrainingRun]:
    """The run log, newest first."""
    log = RunLog(database_url=deployment.database.url, data_dir=str(deployment.layout.root))
    try:
        return log.recent(100)
    finally:
        log.close()


def assert_nothing_is_wrong(deployment: Deployment, runs: list[dg.DagsterRun]) -> None:
    """See to a deployment whose runs are over."""
    assert all(run.is_finished for run in runs)
    assert_no_step_ran_twice_at_once(deployment)
    deployment.until(lambda: not [row for row in rows(deployment) if row.status == "RUNNING"], 60)
    events = deployment.instance.event_log_storage
    deployment.until(lambda: not events.get_concurrency_info("gpu").claimed_slots, 60)
    assert not events.get_concurrency_info("gpu").pending_steps
    deployment.until(lambda: not deployment.cluster.pods(), 60)
    # What the Role forbids was never asked for, and what the API would refuse was never sent.
    assert [refusal for refusal in deployment.cluster.server.refusals if ": 404 " not in refusal] == []
    for path in published_directories(deployment):
        assert is_complete(path), f"{path} is half made"
        read_manifest(path, verify="hashes")
    assert list(deployment.layout.root.glob("**/.*.tmp-*")) == []


def published_directories(deployment: Deployment) -> list[Path]:
    root = deployment.layout.root
    return [*root.glob("prepared/brain/*/*"), *root.glob("adapters/brain/*"), *root.glob("models/*/*")]


def assert_no_step_ran_twice_at_once(deployment: Deployment) -> None:
    pods: dict[str, list[PodHistory]] = defaultdict(list)
    for pod in deployment.cluster.history.values():
        if pod.start is not None and "dagster/op" in pod.labels:
            pods[pod.labels["dagster/op"]].append(pod)
    for step, attempts in pods.items():
        attempts.sort(key=lambda pod: pod.start or 0)
        for earlier, later in pairwise(attempts):
            assert earlier.end is not None, f"{step}: {earlier.name} still runs beside {later.name}"
            assert earlier.end <= (later.start or 0), f"{step}: {earlier.name} and {later.name} ran at once"
