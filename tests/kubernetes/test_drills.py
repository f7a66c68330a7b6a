"""Fault drills (`make drills`): something of the cluster breaks while the GPU step trains, with the real waits.

One deployment with the settings of deploy/dagster.yaml outlives them all. Each drill trains by a plan of its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import dagster as dg
import pytest

from finetune.base_model.models import BaseModelRef
from tests.e2e.conftest import data_root
from tests.h2o_gateway.process import KEY, REAL, GatewayProcess
from tests.kubernetes.aftermath import assert_nothing_is_wrong, rows
from tests.kubernetes.deployment import STEP, TRAIN_IMAGE, Deployment
from tests.kubernetes.objects import Object

pytestmark = [pytest.mark.drill, pytest.mark.timeout(1800)]
SUCCESS, FAILURE = dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE
GPU_NODES = ("gpu-0", "gpu-1")
OUTAGE_SECONDS = 60
PATIENCE = 900


@pytest.fixture(scope="module")
def deployment(tiny_model: BaseModelRef) -> Iterator[Deployment]:
    settings = {"EXPORT_TARGETS": "vllm", "CHECKPOINT_SECONDS": "1", "TRAIN_EPOCHS": "2", "POD_START_SECONDS": "20"}
    with data_root() as root:
        deployed = Deployment(root, tiny_model, settings)
        with deployed.running():
            prepared = deployed.wait(deployed.launch(["merged_dataset", "dataset_profile"]), PATIENCE)
            assert [run.status for run in prepared] == [SUCCESS], deployed.report()
            yield deployed


class Drill:
    """One training, what broke in it, and what became of it."""

    def __init__(self, deployment: Deployment, name: str, **plan: float) -> None:
        self.deployment, self.cluster, self.name = deployment, deployment.cluster, name
        self.run_id = deployment.launch(["training_plan", "adapter", "eval_report"], **plan)
        self._struck = 0.0

    def struck(self) -> None:
        self._struck = self._struck or time.monotonic()

    def ends(self, *statuses: dg.DagsterRunStatus) -> list[dg.DagsterRun]:
        """Wait for the last run; see that the runs ended so, and that nothing is wrong."""
        runs = self.deployment.wait(self.run_id, PATIENCE)
        took = time.monotonic() - self._struck
        assert [run.status for run in runs] == list(statuses), self.deployment.report()
        assert_nothing_is_wrong(self.deployment, runs)
        attempts = len(self.attempts())
        print(f"\ndrill | {self.name} | {', '.join(status.value for status in statuses)} | {attempts} | {took:.0f} s")
        return runs

    def attempts(self) -> list[Object]:
        """The pods that trained for this run and its retries."""
        ids = {run.run_id for run in self.deployment.chain(self.run_id)} | {self.run_id}
        return [pod.pod for pod in self.deployment.history(STEP) if pod.labels["dagster/run-id"] in ids]

    def reasons(self) -> str:
        """Why the step was tried again, or failed."""
        kinds = {dg.DagsterEventType.STEP_UP_FOR_RETRY, dg.DagsterEventType.STEP_FAILURE}
        found = []
        for run in self.deployment.chain(self.run_id) or [self.deployment.run(self.run_id)]:
            for entry in self.deployment.instance.all_logs(run.run_id, of_type=kinds):
                event = entry.dagster_event
                assert event is not None
                data = event.step_failure_data if event.is_step_failure else event.step_retry_data
                error = data.error
                while error is not None:
                    found.append(error.message)
                    error = error.cause
        return "\n".join(found)

    def went_on(self) -> None:
        """See that the adapter was made from the checkpoint, and that its row says so."""
        assert self.deployment.result().resumed_from_step > 0
        [row] = [row for row in rows(self.deployment) if row.training_run_id == self.deployment.result().run_id]
        assert row.status == "COMPLETED"
        assert row.attempts is not None
        assert row.attempts > 1


def test_the_pod_that_trains_is_deleted(deployment: Deployment) -> None:
    drill = Drill(deployment, "pod deleted", seed=1)
    pod = deployment.training(drill.run_id)
    deployment.cluster.delete_pod(pod)
    drill.struck()
    drill.ends(SUCCESS)
    assert "deletionTimestamp" in pod["metadata"], "the fault struck"
    assert "asked to end" in drill.reasons()
    drill.went_on()


def test_the_node_that_trains_is_lost(deployment: Deployment) -> None:
    drill = Drill(deployment, "node lost", seed=2)
    pod = deployment.training(drill.run_id)
    node = pod["spec"]["nodeName"]
    try:
        deployment.cluster.lose_node(node)
        drill.struck()
        drill.ends(SUCCESS)
    finally:
        deployment.cluster.recover_node(node)
    first, second = drill.attempts()
    assert (first["spec"]["nodeName"], second["spec"]["nodeName"]) == (node, next(n for n in GPU_NODES if n != node))
    drill.went_on()


def test_memory_runs_out(deployment: Deployment) -> None:
    drill = Drill(deployment, "OOMKilled", seed=3)
    pod = deployment.training(drill.run_id)
    deployment.cluster.kill(pod, "OOMKilled")
    drill.struck()
    drill.ends(SUCCESS)
    [status] = pod["status"]["containerStatuses"]
    assert status["state"]["terminated"]["reason"] == "OOMKilled"
    assert "OOMKilled" in drill.reasons(), "a person is told why"
    drill.went_on()


def test_the_runs_worker_is_killed_at_the_first_and_at_the_second_attempt(deployment: Deployment) -> None:
    drill = Drill(deployment, "run worker killed twice", seed=4)
    trained, step = drill.run_id, 0
    for _ in range(2):
        pod = deployment.training(trained, after=step)
        step += 2
        # As a training that goes on for hours: it is at work when the run starts anew.
        deployment.cluster.freeze(pod)
        [worker] = [
            each for each in deployment.cluster.pods(run_id=trained) if "dagster/op" not in each["metadata"]["labels"]
        ]
        deployment.cluster.kill(worker)
        drill.struck()
        runs = deployment.until(lambda known=trained: retried(deployment, drill.run_id, known), PATIENCE)
        assert deployment.run(trained).status == FAILURE, "the fault struck"
        trained = runs[-1].run_id
    drill.ends(FAILURE, FAILURE, SUCCESS)
    assert len(drill.attempts()) == 3
    drill.went_on()


def retried(deployment: Deployment, root: str, known: str) -> list[dg.DagsterRun] | None:
    runs = deployment.chain(root)
    return runs if runs and runs[-1].run_id != known else None


def test_the_image_cannot_be_pulled_for_a_while(deployment: Deployment) -> None:
    deployment.cluster.kubelet.missing_images.add(TRAIN_IMAGE)
    try:
        drill = Drill(deployment, "image pull failing", seed=5)
        deployment.until(lambda: "ImagePullBackOff" in drill.reasons(), PATIENCE)
        drill.struck()
    finally:
        deployment.cluster.kubelet.missing_images.clear()
    drill.ends(SUCCESS)
    assert TRAIN_IMAGE in drill.reasons()


def test_no_gpu_can_be_had(deployment: Deployment) -> None:
    nodes = [deployment.cluster.nodes[name] for name in GPU_NODES]
    for node in nodes:
        node.gpus = 0
    try:
        drill = Drill(deployment, "no GPU schedulable", seed=6)
        deployment.until(lambda: deployment.cluster.pods(op=STEP), PATIENCE)
        drill.struck()
        drill.ends(FAILURE)
    finally:
        for node in nodes:
            node.gpus = 1
    assert drill.attempts() == [], "no pod ever ran"
    assert "Insufficient nvidia.com/gpu" in drill.reasons()
    assert "did not start within 20 seconds (POD_START_SECONDS)" in drill.reasons()


def test_the_api_server_is_away_for_a_minute(deployment: Deployment) -> None:
    drill = Drill(deployment, "API server away", seed=7)
    deployment.training(drill.run_id)
    server = deployment.cluster.server
    server.stop()
    drill.struck()
    try:
        time.sleep(OUTAGE_SECONDS)
    finally:
        server.start()
    runs = deployment.wait(drill.run_id, PATIENCE)
    drill.ends(*[FAILURE] * (len(runs) - 1), SUCCESS)
    assert asked_in_vain(deployment, runs), "the fault struck"


def asked_in_vain(deployment: Deployment, runs: list[dg.DagsterRun]) -> bool:
    log = (deployment.root / "daemon.log").read_text(errors="replace")
    said = [entry.message for run in runs for entry in deployment.instance.all_logs(run.run_id)]
    return "Connection refused" in log or any("Error while checking health" in message for message in said)


def test_the_database_is_away_for_a_minute(deployment: Deployment) -> None:
    drill = Drill(deployment, "database away", seed=8)
    deployment.training(drill.run_id)
    broken = deployment.database.broken
    deployment.database.go_away()
    drill.struck()
    try:
        time.sleep(OUTAGE_SECONDS)
    finally:
        deployment.database.come_back()
    assert deployment.database.broken > broken + 1, "the fault struck"
    runs = deployment.wait(drill.run_id, PATIENCE)
    drill.ends(*[FAILURE] * (len(runs) - 1), SUCCESS)


def test_a_plan_that_does_not_fit_the_card_is_refused_before_any_gpu_is_asked_for(deployment: Deployment) -> None:
    drill = Drill(deployment, "plan too large for the card", seed=9, vram_limit_gb=0.001)
    drill.struck()
    drill.ends(FAILURE)
    assert "of 0.001 GB" in drill.reasons() or "0.001 GB" in drill.reasons()
    asked = [job for job in deployment.cluster.jobs() if job["metadata"]["labels"]["dagster/run-id"] == drill.run_id]
    assert "nvidia.com/gpu" not in str(asked)
    assert len(asked) == 2, "the run's worker and the plan, once"


def test_a_training_that_h2o_does_runs_to_success_and_asks_for_a_gpu_in_evaluation_alone(
    tiny_model: BaseModelRef,
) -> None:
    with data_root() as root:
        model = f"{root}/data/base/tiny={tiny_model.path}"
        gateway = GatewayProcess(root.parent / "gateway", tiny_model.path, TRAIN_COMMAND=REAL, MODELS=model)
        settings = {
            "TRAINING_BACKEND": "h2o",
            "H2O_API_URL": gateway.url,
            "H2O_TIMING": json.dumps({"poll": 0.3, "poll_ceiling": 1}),
        }
        deployed = Deployment(root, tiny_model, settings, secrets={"H2O_API_KEY": KEY})
        try:
            with deployed.running():
                run_id = deployed.launch()
                # The pod that waits for the experiment is deleted: the next one finds it again.
                pod = deployed.until(lambda: gateway_trains(gateway) and deployed.cluster.pods(op=STEP), PATIENCE)[0]
                deployed.cluster.delete_pod(pod)
                runs = deployed.wait(run_id, PATIENCE)
                assert [run.status for run in runs] == [SUCCESS], deployed.report()
                assert len(deployed.history(STEP)) == 2, "the fault struck"
                assert_nothing_is_wrong(deployed, runs)
                asking = {
                    pod.labels["dagster/op"]
                    for pod in deployed.cluster.history.values()
                    if "nvidia.com/gpu" in str(pod.pod["spec"]["containers"])
                }
                assert asking == {"brain__eval_report"}
                [experiment] = gateway.http.get("/api/experiments").json()["experiments"]
                assert experiment["status"] == "finished"
                assert experiment["id"] == deployed.result().external_run_id
        finally:
            gateway.close()


def gateway_trains(gateway: GatewayProcess) -> bool:
    return bool(gateway.http.get("/api/experiments").json()["experiments"])
