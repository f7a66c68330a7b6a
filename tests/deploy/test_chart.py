"""Our chart: what it was rendered to, and what its values may be."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from lora_assets.settings import Settings, is_secret
from tests.deploy.manifests import CHART, ROOT, check, documents, load, merged, misspelt

RENDERED = sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml"))
NAMES = [path.stem for path in RENDERED]
# A resource of the Prometheus operator's, of which Kubernetes has no schema.
FOREIGN = {"ServiceMonitor"}


def manifests() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in RENDERED:
        for manifest in documents(path):
            yield f"{path.stem}:{manifest['kind']}/{manifest['metadata']['name']}", manifest


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    for where, manifest in manifests():
        spec = manifest.get("spec", {})
        spec = spec["jobTemplate"]["spec"] if manifest["kind"] == "CronJob" else spec
        if "template" in spec:
            yield where, spec["template"]["spec"]


def test_what_was_rendered_is_of_this_chart() -> None:
    """The hash is of what shapes the rendering; `deploy/kubernetes/README.md` tells how to render again."""
    sources = sorted([*CHART.glob("templates/*"), *CHART.glob("values*.yaml"), CHART / "Chart.yaml"])
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    assert NAMES == ["default", "everything", "gpu-spot", "h2o"]
    for path in RENDERED:
        told = re.match(r"# Rendered from the chart with sha256 ([0-9a-f]{64})", path.read_text(encoding="utf-8"))
        assert told is not None, path
        assert told[1] == digest, f"the chart changed since {path.name} was rendered"


def test_every_template_is_rendered_somewhere() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in RENDERED)
    templates = {path.name for path in CHART.glob("templates/*.yaml")}
    assert set(re.findall(r"^# Source: lora-assets/templates/(\S+)$", text, re.MULTILINE)) == templates


def test_kubernetes_takes_every_manifest() -> None:
    kinds = set()
    for where, manifest in manifests():
        if manifest["kind"] not in FOREIGN:
            try:
                check(manifest)
            except jsonschema.ValidationError as error:
                pytest.fail(f"{where}: {list(error.path)}: {error.message}")
        kinds.add(manifest["kind"])
    assert kinds >= {"CronJob", "Deployment", "Job", "NetworkPolicy", "PersistentVolumeClaim", "Role", *FOREIGN}


def test_kubernetes_refuses_a_manifest_with_a_letter_too_much() -> None:
    crons = [manifest for where, manifest in manifests() if where.startswith("everything:CronJob")]
    assert [cron["metadata"]["name"] for cron in crons] == ["lora-assets-drift", "lora-assets-run"]
    cron = crons[0]
    free = ("labels", "annotations", "requests", "limits", "nodeSelector")
    broken = [(where, each) for where, each in misspelt(cron) if not any(f".{name}." in where for name in free)]
    assert len(broken) > 60
    passed = []
    for where, each in broken:
        try:
            check(each)
        except (jsonschema.ValidationError, KeyError, FileNotFoundError):
            continue
        passed.append(where)
    assert passed == []


def test_no_pod_may_more_than_it_must() -> None:
    found = list(pods())
    assert len(found) >= 6
    for where, pod in found:
        assert pod["automountServiceAccountToken"] is False, where
        assert pod["securityContext"]["runAsNonRoot"] is True, where
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, where
            assert "memory" in container["resources"]["limits"], where
            assert re.search(r":[^:]+$", container["image"]), where
            assert not container["image"].endswith(":latest"), where
            assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}, where


def test_secrets_are_referred_to_and_never_made() -> None:
    secrets = {name.upper() for name, field in Settings.model_fields.items() if is_secret(field)}
    assert {"DATABASE_URL", "H2O_API_KEY", "HF_TOKEN"} <= secrets
    for where, manifest in manifests():
        assert manifest["kind"] != "Secret", where
        if manifest["kind"] == "ConfigMap":
            assert not secrets & set(manifest["data"]), where
    for where, pod in pods():
        for container in pod["containers"]:
            for variable in container.get("env", []):
                if re.search(r"KEY$|SECRET|TOKEN|PASSWORD", variable["name"]):
                    assert "secretKeyRef" in variable["valueFrom"], (where, variable["name"])


def test_the_role_grants_what_the_launcher_needs_and_nothing_else() -> None:
    rules = load(CHART / "files" / "run-role.yaml")
    roles = [manifest for _, manifest in manifests() if manifest["kind"] == "Role"]
    assert len(roles) == len(RENDERED)
    for role in roles:
        assert role["rules"] == rules
    assert {resource for rule in rules for resource in rule["resources"]} == {
        "jobs",
        "jobs/status",
        "pods",
        "pods/log",
        "events",
    }
    assert "*" not in str(rules)


def test_only_the_workers_of_runs_reach_the_clusters_api() -> None:
    policies = {m["metadata"]["name"]: m["spec"] for m in documents(ROOT / "deploy/kubernetes/default.yaml")
                if m["kind"] == "NetworkPolicy"}  # fmt: skip
    assert set(policies) == {"lora-assets-runs", "lora-assets-steps", "lora-assets-jobs", "lora-assets-code"}
    for name in ("lora-assets-runs", "lora-assets-steps", "lora-assets-jobs"):
        assert policies[name]["policyTypes"] == ["Ingress", "Egress"]
        assert policies[name]["ingress"] == []
        ports = {port["port"] for rule in policies[name]["egress"] for port in rule["ports"]}
        assert (6443 in ports) == (name == "lora-assets-runs")
        assert {53, 5432} <= ports


def test_the_workers_of_runs_and_steps_have_the_labels_that_the_policies_select() -> None:
    from dagster_k8s.job import DagsterK8sJobConfig, construct_dagster_k8s_job

    policies = [m for _, m in manifests() if m["kind"] == "NetworkPolicy"]
    config = DagsterK8sJobConfig(job_image="it:1", dagster_home="/opt/dagster/dagster_home")
    for component, policy in (("run_worker", "lora-assets-runs"), ("step_worker", "lora-assets-steps")):
        job = construct_dagster_k8s_job(config, args=[], job_name="it", component=component)
        [selector] = {
            tuple(sorted(each["spec"]["podSelector"]["matchLabels"].items()))
            for each in policies
            if each["metadata"]["name"] == policy
        }
        assert set(selector) <= set(job.spec.template.metadata.labels.items())


SCHEMA = load(CHART / "values.schema.json")
OVERLAYS: list[list[str]] = [[], ["h2o"], ["gpu-spot"], ["h2o", "gpu-spot"]]


def values(*overlays: str) -> dict[str, Any]:
    found = load(CHART / "values.yaml")
    for overlay in overlays:
        found = merged(found, load(CHART / f"values-{overlay}.yaml"))
    return dict(found)


@pytest.mark.parametrize("overlays", OVERLAYS)
def test_the_schema_takes_our_values_and_a_letter_too_much_in_any_name_fails(overlays: list[str]) -> None:
    validator = jsonschema.Draft7Validator(SCHEMA)
    assert list(validator.iter_errors(values(*overlays))) == []
    free = ("requests", "limits", "nodeSelector", "labels", "podAnnotations", "from")
    for where, broken in misspelt(values(*overlays)):
        if not set(where.split(".")[:-1]) & set(free):
            assert list(validator.iter_errors(broken)), where


@pytest.mark.parametrize(
    "broken",
    [
        {"images": {"slim": "lora-assets:latest"}},
        {"images": {"train": "lora-assets"}},
        {"data": {"size": "much"}},
        {"cronJob": {"schedule": "daily"}},
        {"networkPolicy": {"egressPorts": [0]}},
        {"settings": {"DATABASE_URL": "postgresql://me:password@host/db"}},
        {"settings": {"LORA_RANK": 8}},
        {"h2oGateway": {"gpus": []}},
    ],
)
def test_the_schema_refuses(broken: dict[str, Any]) -> None:
    found = merged(values(), broken)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(found, SCHEMA, jsonschema.Draft7Validator)


def test_the_schema_knows_every_setting_that_is_no_secret() -> None:
    settings = {name.upper() for name, field in Settings.model_fields.items() if not is_secret(field)}
    settings -= {"TRAIN_IMAGE"}  # images.train
    assert set(SCHEMA["properties"]["settings"]["properties"]) == settings, "add them to values.schema.json"


@pytest.mark.parametrize("overlays", OVERLAYS)
def test_our_values_are_good_settings(overlays: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    # Of the Secret.
    monkeypatch.setenv("DATABASE_URL", "postgresql://me@postgres/lora")
    for name, value in values(*overlays)["settings"].items():
        monkeypatch.setenv(name, value)
    Settings()
