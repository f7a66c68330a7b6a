"""lora-assets deployed on the cluster: deploy/dagster.yaml, a real daemon, a real code location, real PostgreSQL."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import dagster as dg
import yaml
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import GrpcServerTarget
from dagster_graphql.cli import execute_query

from finetune.base_model.models import BaseModelRef
from finetune.layout import DataLayout
from finetune.training.models import TrainingResult
from lora_assets.cli.demo import DEMO_SETTINGS, EXAMPLES
from tests.kubernetes.cluster import Cluster, PodHistory
from tests.kubernetes.database import Database
from tests.kubernetes.image import SLIM, TRAIN, Image
from tests.kubernetes.nodes import GPU_TAINT, Node
from tests.kubernetes.objects import Object

ROOT = Path(__file__).parents[2]
DATE = "2026-06-01"
IMAGE, TRAIN_IMAGE = "registry.test/lora-assets:slim", "registry.test/lora-assets:train"
ACCOUNT, NAMESPACE = "lora-assets", "lora"
RULES = yaml.safe_load((ROOT / "deploy/helm/lora-assets/files/run-role.yaml").read_text())
STEP = "brain__adapter"
LAUNCH = """mutation($selector: JobOrPipelineSelector!, $config: RunConfigData!, $metadata: ExecutionMetadata!) {
    launchPipelineExecution(executionParams: {
        selector: $selector, runConfigData: $config, executionMetadata: $metadata}) {
    __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""
Found = TypeVar("Found")


class Deployment:
    """A cluster with the platform on it.

    Args:
        root: an empty directory.
        model: the base model.
        settings: environment variables of lora-assets, beside the usual ones.
        secrets: more of the Secret.
    """

    def __init__(
        self, root: Path, model: BaseModelRef, settings: dict[str, str], secrets: dict[str, str] | None = None
    ) -> None:
        self.root, self.layout = root, DataLayout(root / "data")
        self.layout.exports.mkdir(parents=True)
        for file in EXAMPLES.glob(f"*{DATE}*"):
            shutil.copy(file, self.layout.exports)
        (self.layout.root / "base").mkdir()
        (self.layout.root / "base" / "tiny").symlink_to(model.path)
        self.database = Database(root / "postgres")
        gpu = {"gpus": 1, "labels": {"nvidia.com/gpu.present": "true"}, "taints": [GPU_TAINT]}
        nodes = [Node("cpu-0"), Node("gpu-0", **gpu), Node("gpu-1", **gpu)]
        self.cluster = Cluster(root / "cluster", nodes, {ACCOUNT: RULES}, NAMESPACE)
        self.home = root / "home"
        self.home.mkdir()
        self._port = _free_port()
        self._configure(settings, secrets or {})
        self._processes: list[subprocess.Popen[bytes]] = []

    def _configure(self, settings: dict[str, str], secrets: dict[str, str]) -> None:
        config = yaml.safe_load((ROOT / "deploy" / "dagster.yaml").read_text())
        # No pod here has the files of a service account: its token comes in a kubeconfig in the working directory.
        config["run_launcher"]["config"] |= {"load_incluster_config": False, "kubeconfig_file": "kubeconfig"}
        shutil.copy(self.cluster.kubelet.kubeconfigs[ACCOUNT], self.root / "kubeconfig")
        (self.home / "dagster.yaml").write_text(yaml.safe_dump(config))
        self.cluster.claims["lora-assets-data"] = self.layout.root
        self.cluster.config_maps["lora-assets"] = {
            **{name: value for name, value in DEMO_SETTINGS.items() if name != "OMP_NUM_THREADS"},
            "DATA_ROOT": "/data",
            "BASE_MODEL_NAME": "/data/base/tiny",
            "TRAIN_IMAGE": TRAIN_IMAGE,
            "TRAIN_DEVICE": "cpu",
            # The tests start runs themselves.
            "AUTOMATION_ON": "false",
            "DAGSTER_HOME": str(self.home),
            "DAGSTER_PG_HOST": "127.0.0.1",
            "DAGSTER_PG_PORT": str(self.database.port),
            "DAGSTER_PG_DB": "postgres",
            "DAGSTER_PG_USERNAME": "postgres",
            "DAGSTER_K8S_NAMESPACE": NAMESPACE,
            "DAGSTER_K8S_SERVICE_ACCOUNT": ACCOUNT,
            "DAGSTER_K8S_INSTANCE_CONFIG_MAP": "dagster-instance",
            **settings,
        }
        connection = {"DATABASE_URL": self.database.url, "DAGSTER_PG_PASSWORD": "unused"}
        self.cluster.secrets["lora-assets"] = connection | secrets
        # What images and this machine set in every container.
        self.cluster.environment |= {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "DAGSTER_STEP_DELEGATING_EXECUTOR_SLEEP_SECONDS": "0.3",
        }
        values = self.cluster.config_maps["lora-assets"] | self.cluster.secrets["lora-assets"]
        self.environment = self.cluster.environment | {
            **{name: value.replace("/data", str(self.layout.root), 1) for name, value in values.items()},
            "PATH": f"{Path(sys.executable).parent}:{os.defpath}",
            "KUBERNETES_SERVICE_HOST": "127.0.0.1",
            "DAGSTER_CURRENT_IMAGE": IMAGE,
        }

    @contextmanager
    def running(self) -> Iterator[None]:
        """The code location and the daemon, until the block ends."""
        workspace = self.root / "workspace.yaml"
        location = {"host": "127.0.0.1", "port": self._port, "location_name": "lora_assets"}
        workspace.write_text(yaml.safe_dump({"load_from": [{"grpc_server": location}]}))
        try:
            with self.cluster:
                for name, modules in ((IMAGE, SLIM), (TRAIN_IMAGE, TRAIN)):
                    self.cluster.kubelet.images[name] = Image(modules, dict(self.cluster.environment))
                module = ["-m", "lora_assets.definitions", "-h", "127.0.0.1", "-p", str(self._port)]
                self._start("code", "dagster", "api", "grpc", *module)
                self._wait_for_port()
                for image in self.cluster.kubelet.images.values():
                    assert image.ready.wait(300)
                self._start("daemon", "dagster-daemon", "run", "-w", str(workspace))
                with self._instance() as self.instance:
                    yield
        finally:
            for process in self._processes:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            self.database.close()

    def _start(self, name: str, *command: str) -> None:
        with (self.root / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command, env=self.environment, cwd=self.root, stdout=log, stderr=log, start_new_session=True
            )
        self._processes.append(process)

    def _wait_for_port(self) -> None:
        def listens() -> bool:
            assert self._processes[0].poll() is None, self.said("code")
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", self._port)) == 0

        self.until(listens, 300)

    @contextmanager
    def _instance(self) -> Iterator[dg.DagsterInstance]:
        """The deployment's instance as a reader sees it: its storage and its queue, without its launcher."""
        home = self.root / "reader"
        home.mkdir()
        config = {"storage": {"postgres": {"postgres_url": self.database.url}}, "telemetry": {"enabled": False}}
        (home / "dagster.yaml").write_text(yaml.safe_dump(config))
        with dg.DagsterInstance.from_config(str(home)) as instance:
            yield instance

    def launch(self, assets: Sequence[str] = (), **plan: Any) -> str:
        """Ask for the date's assets, as the UI would; returns the run's id.

        Args:
            assets: names; none means the whole graph.
            plan: configuration of the training's plan.
        """
        self.instance.add_dynamic_partitions("brain_dataset_dates", [DATE])
        target = GrpcServerTarget("127.0.0.1", self._port, None, "lora_assets")
        with WorkspaceProcessContext(self.instance, target) as workspace:
            job = {
                "repositoryLocationName": "lora_assets",
                "repositoryName": "__repository__",
                "pipelineName": "train_and_export",
            }
            selection = {"assetSelection": [{"path": ["brain", name]} for name in assets], "assetCheckSelection": []}
            variables = {
                "selector": job | (selection if assets else {}),
                "config": {"ops": {"brain__training_plan": {"config": plan}}} if plan else {},
                "metadata": {"tags": [{"key": "dagster/partition", "value": DATE}]},
            }
            answer = execute_query(workspace, LAUNCH, variables)
        return str(answer["data"]["launchPipelineExecution"]["run"]["runId"])

    def chain(self, run_id: str) -> list[dg.DagsterRun]:
        """A run and the runs that retried it, oldest first."""
        group = self.instance.get_run_group(run_id)
        return sorted(group[1], key=lambda run: int(run.tags.get("retry_number", 0))) if group else []

    def wait(self, run_id: str, seconds: float) -> list[dg.DagsterRun]:
        """Wait until the last of a run and its retries is over."""

        def over() -> list[dg.DagsterRun] | None:
            runs = self.chain(run_id) or [self.run(run_id)]
            last = runs[-1]
            # A moment after a run has failed, Dagster says whether it will be tried again.
            settled = last.status != dg.DagsterRunStatus.FAILURE or last.tags.get("dagster/will_retry") == "false"
            return runs if last.is_finished and settled else None

        return self.until(over, seconds)

    def run(self, run_id: str) -> dg.DagsterRun:
        run = self.instance.get_run_by_id(run_id)
        assert run is not None
        return run

    def until(self, condition: Callable[[], Found | bool | None], seconds: float) -> Found:
        """What the condition gives once that is true."""
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, f"it did not come to be in {seconds} s\n{self.report()}"
            time.sleep(0.1)
        return found  # type: ignore[return-value]  # it is true

    def training(self, run_id: str, after: int = 0) -> Object:
        """The pod that trains for a run, once it has a checkpoint beyond a step to go on from."""

        def found() -> Object | None:
            pods = self.cluster.pods(op=STEP, run_id=run_id)
            newest = max((int(path.parent.name.rpartition("-")[2]) for path in self._sealed()), default=0)
            return pods[0] if pods and self.cluster.kubelet.is_running(pods[0]) and newest > after else None

        return self.until(found, 300)

    def _sealed(self) -> list[Path]:
        """What completes each checkpoint that lies there, of a training that is not over."""
        return list(self.layout.root.glob("work/*/**/checkpoint-*/complete.json"))

    def result(self) -> TrainingResult:
        """What the training handed on."""
        path = self.layout.asset_values / "brain" / "adapter" / f"{DATE}.json"
        return TrainingResult.model_validate_json(path.read_bytes())

    def history(self, op: str) -> list[PodHistory]:
        """The pods of a step that ran, in order of time."""
        pods = [pod for pod in self.cluster.history.values() if pod.labels.get("dagster/op") == op and pod.start]
        return sorted(pods, key=lambda pod: pod.start or 0)

    def said(self, name: str) -> str:
        return (self.root / f"{name}.log").read_text(errors="replace")[-3000:]

    def report(self) -> str:
        """What a person would look at when something went wrong."""
        lines = [f"daemon:\n{self.said('daemon')}", f"refused: {self.cluster.server.refusals[-5:]}"]
        for run in self.instance.get_runs():
            lines.append(f"run {run.run_id}: {run.status}")
            for entry in self.instance.all_logs(run.run_id):
                if (entry.is_dagster_event and entry.level >= 30) or "Kubernetes" in entry.message:
                    lines.append(f"  {entry.step_key}: {entry.message[:600]}")
                    event = entry.dagster_event
                    if event and event.is_step_failure:
                        lines.append(f"    {event.step_failure_data.error}"[:3000])
        for pod in sorted(self.cluster.history.values(), key=lambda pod: pod.start or 0):
            phase = pod.pod["status"]["phase"]
            lines.append(f"pod {pod.name} {pod.labels.get('dagster/op', 'run')} {phase}")
            if phase == "Failed":
                lines.append(self.cluster.kubelet.log(pod.pod, "30").decode(errors="replace"))
        return "\n".join(lines)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
