"""How Dagster and Dagster+ find the code: `workspace.yaml` and `dagster_cloud.yaml`."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deploy.dagster_chart import pod
from tests.deploy.manifests import ROOT, check, load, misspelt
from tests.e2e.conftest import Loop

BIN = Path(sys.executable).parent
CLOUD = load(ROOT / "dagster_cloud.yaml")

LOCATIONS = """query { workspaceOrError { ... on Workspace { locationEntries { name locationOrLoadError {
    __typename ... on PythonError { message }
    ... on RepositoryLocation { repositories { jobs { name } sensors { name } assetNodes { id } } } } } } } }"""


def test_the_webserver_loads_the_code_location_of_workspace_yaml(loop: Loop, tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    (tmp_path / "home").mkdir()
    log = tmp_path / "webserver.log"
    with log.open("w") as output:
        # From another directory: the code location is an installed package.
        server = subprocess.Popen(
            [BIN / "dagster-webserver", "-w", ROOT / "workspace.yaml", "-h", "127.0.0.1", "-p", str(port)],
            cwd=tmp_path,
            env=loop.environment | {"DAGSTER_HOME": str(tmp_path / "home")},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + 300
        while True:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            try:
                answer = httpx.post(f"http://127.0.0.1:{port}/graphql", json={"query": LOCATIONS}, timeout=30).json()
                break
            except httpx.TransportError:
                time.sleep(0.3)
    finally:
        os.killpg(server.pid, signal.SIGINT)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
    [entry] = answer["data"]["workspaceOrError"]["locationEntries"]
    assert entry["name"] == "lora_assets"
    assert entry["locationOrLoadError"]["__typename"] == "RepositoryLocation", entry
    [repository] = entry["locationOrLoadError"]["repositories"]
    assert "train_and_export" in {job["name"] for job in repository["jobs"]}
    assert "export_arrival" in {sensor["name"] for sensor in repository["sensors"]}
    assert len(repository["assetNodes"]) >= 12


def ci_check(directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / "dagster-cloud", "ci", "check", "--dagster-cloud-connect-check", "skip", "--project-dir", directory],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.environ["PATH"], "HOME": str(directory)},
        timeout=300,
    )


def test_dagster_plus_takes_dagster_cloud_yaml_and_tells_a_misspelt_field(tmp_path: Path) -> None:
    file = tmp_path / "dagster_cloud.yaml"
    shutil.copy(ROOT / "dagster_cloud.yaml", file)
    good = ci_check(tmp_path)
    assert good.returncode == 0, good.stdout + good.stderr
    file.write_text(file.read_text(encoding="utf-8").replace("container_context:", "container_contexts:"))
    bad = ci_check(tmp_path)
    assert bad.returncode == 1
    assert "container_contexts" in bad.stdout + bad.stderr


def context(config: Any) -> dict[str, Any]:
    """What the container context makes of pods, as Dagster's own parser reads it, as Kubernetes takes it."""
    from dagster_k8s.container_context import K8sContainerContext

    found = K8sContainerContext.create_from_config({"k8s": config})
    return {"run": found.run_k8s_config, "server": found.server_k8s_config}


def judge(config: dict[str, Any]) -> None:
    """See that Dagster takes a container context, and Kubernetes the pods that it makes."""
    found = context(config)
    assert found["run"].container_config["env_from"], "settings and secrets"
    for role in ("run_k8s_config", "server_k8s_config"):
        spec = config[role]["pod_spec_config"]
        assert set(spec) == {"securityContext"}
        check(
            pod(
                spec["securityContext"],
                config["volumes"],
                imagePullPolicy=config["image_pull_policy"],
                securityContext=config["security_context"],
                volumeMounts=config["volume_mounts"],
                **config[role]["container_config"],
            )
        )


def test_dagster_and_kubernetes_take_the_container_context() -> None:
    [location] = CLOUD["locations"]
    judge(location["container_context"]["k8s"])
    assert location["code_source"] == {
        "module_name": load(ROOT / "workspace.yaml")["load_from"][0]["python_module"]["module_name"]
    }


def test_a_letter_too_much_in_any_name_of_the_container_context_fails() -> None:
    [location] = CLOUD["locations"]
    passed = []
    for where, broken in misspelt(location["container_context"]["k8s"]):
        if ".requests." in where or ".limits." in where:
            continue
        try:
            judge(broken)
        except Exception:  # noqa: BLE001 - of Dagster's config, of pydantic or of the schemas
            continue
        passed.append(where)
    assert passed == []


def test_runs_on_dagster_plus_have_the_rights_and_volumes_of_runs_elsewhere() -> None:
    from tests.deploy.dagster_chart import Values

    launcher = Values.model_validate(load(ROOT / "deploy/helm/values.yaml")).runLauncher.config.k8sRunLauncher
    config = CLOUD["locations"][0]["container_context"]["k8s"]
    assert config["env_config_maps"] == [each.name for each in launcher.envConfigMaps]
    assert config["env_secrets"] == [each.name for each in launcher.envSecrets]
    assert config["volumes"] == launcher.volumes
    assert config["volume_mounts"] == launcher.volumeMounts
    assert config["security_context"] == launcher.securityContext
    run = config["run_k8s_config"]
    assert run["pod_spec_config"] == launcher.runK8sConfig.podSpecConfig.model_dump()
    assert run["job_spec_config"] == launcher.runK8sConfig.jobSpecConfig.model_dump()
    assert run["container_config"]["resources"] == launcher.resources


@pytest.mark.parametrize("path", ["workspace.yaml", "dagster_cloud.yaml"])
def test_the_location_has_the_same_name_everywhere(path: str) -> None:
    assert "location_name: lora_assets\n" in (ROOT / path).read_text(encoding="utf-8")
