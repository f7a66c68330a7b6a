"""What a real API server refuses of a Job: by Kubernetes' own schemas, strictly, and by the rules they cannot tell."""

from __future__ import annotations

import re
from typing import Any

import kubernetes_validate

from tests.kubernetes.objects import Object, RefusedError

VERSION = "1.36"
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?")
_LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|k|M|G|T|Ki|Mi|Gi|Ti|)")
_UNITS = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_UNITS |= {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_EFFECTS = (None, "", "NoSchedule", "PreferNoSchedule", "NoExecute")


def quantity(value: Any) -> float:
    """A resource quantity such as ``500m`` or ``2Gi`` in its base unit."""
    match = _QUANTITY.fullmatch(str(value))
    if match is None:
        raise _invalid("resources", f"quantities must match the regular expression: {value!r}")
    return float(match[1]) * _UNITS[match[2]]


def admit(job: Object) -> None:
    """See that a Job may be created in a namespace that enforces the Pod Security Standard "restricted".

    Raises:
        RefusedError: as the API server would.
    """
    try:
        kubernetes_validate.validate(job, VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        raise RefusedError(400, "BadRequest", f"strict decoding error: {_path(error)}: {error.message}") from None
    _metadata(job["metadata"])
    template = job["spec"]["template"]
    _metadata({"name": "template", **template.get("metadata", {})})
    pod = template["spec"]
    if pod.get("restartPolicy") not in ("Never", "OnFailure"):
        raise _invalid("spec.template.spec.restartPolicy", "Required value: valid values: OnFailure, Never")
    for toleration in pod.get("tolerations") or []:
        operator, effect = toleration.get("operator", "Equal"), toleration.get("effect")
        if operator not in ("Equal", "Exists") or effect not in _EFFECTS:
            raise _invalid("spec.template.spec.tolerations", f"Unsupported value: {toleration}")
        if operator == "Exists" and toleration.get("value"):
            raise _invalid("spec.template.spec.tolerations", "value must be empty when operator is Exists")
    volumes = {volume["name"] for volume in pod.get("volumes") or []}
    if len(volumes) < len(pod.get("volumes") or []):
        raise _invalid("spec.template.spec.volumes", "Duplicate value")
    for number, container in enumerate(pod["containers"]):
        at = f"spec.template.spec.containers[{number}]"
        if not container.get("image"):
            raise _invalid(f"{at}.image", "Required value")
        _mounts(container, volumes, at)
        _resources(container.get("resources") or {}, at)
        _restricted(pod.get("securityContext") or {}, container.get("securityContext") or {}, at)


def _path(error: Any) -> str:
    return ".".join(str(part) for part in error.path) or "body"


def _invalid(field: str, message: str) -> RefusedError:
    return RefusedError(422, "Invalid", f"{field}: {message}")


def _metadata(metadata: Object) -> None:
    if not _NAME.fullmatch(metadata["name"]):
        raise _invalid("metadata.name", f"Invalid value: {metadata['name']!r}")
    for name, value in (metadata.get("labels") or {}).items():
        if not _LABEL.fullmatch(value):
            raise _invalid("metadata.labels", f"Invalid value: {value!r} of {name}")


def _mounts(container: Object, volumes: set[str], at: str) -> None:
    mounts = container.get("volumeMounts") or []
    for mount in mounts:
        if mount["name"] not in volumes:
            raise _invalid(f"{at}.volumeMounts", f"Not found: {mount['name']!r}")
    if len({mount["mountPath"] for mount in mounts}) < len(mounts):
        raise _invalid(f"{at}.volumeMounts", "mountPath: must be unique")


def _resources(resources: Object, at: str) -> None:
    limits, requests = resources.get("limits") or {}, resources.get("requests") or {}
    for name in {*limits, *requests}:
        limit, request = limits.get(name), requests.get(name, limits.get(name))
        if limit is not None and quantity(request) > quantity(limit):
            raise _invalid(f"{at}.resources.requests", f"must be less than or equal to {name} limit")
        # Extended resources are whole, and cannot be overcommitted.
        if "/" in name and (limit is None or quantity(limit) % 1 or quantity(limit) != quantity(request)):
            raise _invalid(f"{at}.resources", f"{name}: must be an integer, limit and request must be equal")


def _restricted(pod: Object, container: Object, at: str) -> None:
    """The Pod Security Standard "restricted", as far as it asks for settings."""
    wrong = []
    if container.get("allowPrivilegeEscalation") is not False:
        wrong.append("allowPrivilegeEscalation != false")
    if "ALL" not in (container.get("capabilities") or {}).get("drop", []):
        wrong.append('unrestricted capabilities (must set capabilities.drop=["ALL"])')
    if (pod | container).get("runAsNonRoot") is not True:
        wrong.append("runAsNonRoot != true")
    if ((pod | container).get("seccompProfile") or {}).get("type") not in ("RuntimeDefault", "Localhost"):
        wrong.append("seccompProfile (must be RuntimeDefault or Localhost)")
    if wrong:
        raise RefusedError(403, "Forbidden", f'{at} violates PodSecurity "restricted:latest": {", ".join(wrong)}')
