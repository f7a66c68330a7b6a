"""Our values for Dagster's chart: each name is one that it has, and the instance is the one that is tested."""

from __future__ import annotations

from typing import Any

import dagster as dg
import jsonschema
import pytest
from pydantic import ValidationError

from lora_assets.logs import RunLines
from tests.deploy.dagster_chart import Values
from tests.deploy.manifests import CHART, HELM, ROOT, documents, load, merged, misspelt

OVERLAYS: list[list[str]] = [[], ["h2o"], ["gpu-spot"], ["h2o", "gpu-spot"]]


def values(*overlays: str) -> dict[str, Any]:
    found = load(HELM / "values.yaml")
    for overlay in overlays:
        found = merged(found, load(HELM / f"values-{overlay}.yaml"))
    return dict(found)


@pytest.mark.parametrize("overlays", OVERLAYS)
def test_every_value_is_one_that_the_chart_has(overlays: list[str]) -> None:
    Values.model_validate(values(*overlays))


@pytest.mark.parametrize("overlays", OVERLAYS)
def test_a_letter_too_much_in_any_name_fails(overlays: list[str]) -> None:
    broken = list(misspelt(values(*overlays)))
    assert len(broken) > 150
    passed = []
    for where, changed in broken:
        try:
            Values.model_validate(changed)
        except (ValidationError, jsonschema.ValidationError):
            continue
        passed.append(where)
    # Kubernetes knows no list of what can be requested.
    assert [where for where in passed if ".requests." not in where and ".limits." not in where] == []


@pytest.mark.parametrize("value", ["0", "many", None])
def test_a_value_of_another_type_fails(value: object) -> None:
    broken = merged(values(), {"dagsterDaemon": {"runMonitoring": {"maxResumeRunAttempts": value}}})
    with pytest.raises(ValidationError, match="maxResumeRunAttempts"):
        Values.model_validate(broken)


@pytest.mark.parametrize("overlays", OVERLAYS)
def test_a_dead_run_is_started_anew_and_gives_its_gpu_back(overlays: list[str]) -> None:
    found = Values.model_validate(values(*overlays))
    monitoring = found.dagsterDaemon.runMonitoring
    assert monitoring.enabled
    assert monitoring.maxResumeRunAttempts == 0
    assert monitoring.freeSlotsAfterRunEndSeconds > 0
    assert monitoring.startTimeoutSeconds > 0
    assert found.dagsterDaemon.runRetries.enabled
    assert found.concurrency.enabled
    job = found.runLauncher.config.k8sRunLauncher.runK8sConfig.jobSpecConfig
    assert job.backoffLimit == 0
    assert job.ttlSecondsAfterFinished >= 3600


def test_the_instance_is_the_one_that_the_tests_of_the_cluster_run() -> None:
    found = Values.model_validate(values())
    tested = load(ROOT / "deploy" / "dagster.yaml")
    for name, expected in found.instance().items():
        assert tested[name] == expected, name
    launcher = tested["run_launcher"]["config"]
    for name, expected in found.launcher().items():
        assert launcher[name] == expected, name


def test_the_log_lines_are_those_of_one_machine() -> None:
    on_one_machine = load(ROOT / "lora_assets/dagster.yaml")["python_logs"]
    assert Values.model_validate(values()).instance()["python_logs"] == on_one_machine
    # Dagster makes the handler by its name, in every run and step.
    with dg.DagsterInstance.local_temp(overrides={"python_logs": on_one_machine}) as instance:
        assert RunLines in [type(handler) for handler in instance.get_handlers()]


def test_the_queue_is_that_of_one_machine() -> None:
    queue = Values.model_validate(values()).dagsterDaemon.runCoordinator
    assert queue.enabled
    custom = queue.config.customRunCoordinator
    on_one_machine = load(ROOT / "lora_assets/dagster.yaml")["run_coordinator"]
    assert {"module": custom.module, "class": custom.name} == on_one_machine
    assert custom.config == {}


def test_both_charts_speak_of_the_same_things() -> None:
    found = Values.model_validate(values())
    ours = {(each["kind"], each["metadata"]["name"]) for each in documents(ROOT / "deploy/kubernetes/default.yaml")}
    launcher = found.runLauncher.config.k8sRunLauncher
    [code] = found.user_deployments.deployments
    for role in (launcher, code):
        assert [("ConfigMap", each.name) for each in role.envConfigMaps] == [("ConfigMap", "lora-assets")]
        assert [each.name for each in role.envSecrets] == ["lora-assets"]
        claims = [volume["persistentVolumeClaim"]["claimName"] for volume in role.volumes if volume["name"] == "data"]
        assert claims == ["lora-assets-data"]
    assert ("ConfigMap", "lora-assets") in ours
    assert ("PersistentVolumeClaim", "lora-assets-data") in ours
    assert ("ServiceAccount", found.serviceAccount.name) in ours
    assert not found.rbacEnabled
    assert not found.serviceAccount.create
    images = load(CHART / "values.yaml")["images"]
    for role in (found.dagsterWebserver, found.dagsterDaemon, code):
        assert f"{role.image.repository}:{role.image.tag}" == images["slim"]


def test_no_password_stands_in_the_values() -> None:
    found = values()
    assert "postgresqlPassword" not in found["postgresql"]
    assert found["global"]["postgresqlSecretName"]
    assert not found["generatePostgresqlPasswordSecret"]
