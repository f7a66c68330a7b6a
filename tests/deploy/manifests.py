"""YAML files of the deployment, and Kubernetes' own strict schemas."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from kubernetes_validate.utils import schema_contents
from referencing import Registry, Resource

ROOT = Path(__file__).parents[2]
HELM = ROOT / "deploy" / "helm"
CHART = HELM / "lora-assets"
SCHEMAS = "kubernetes-json-schema/v1.33.0-local-strict"


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document]


@functools.cache
def _validator(kind: str, api_version: str) -> jsonschema.Draft202012Validator:
    group, _, version = api_version.rpartition("/")
    name = "-".join([kind.lower(), *([group.split(".")[0]] if group else []), version])
    schema = schema_contents(f"{SCHEMAS}/{name}.json", "1.33")
    definitions = schema_contents(f"{SCHEMAS}/_definitions.json", "1.33")
    # Read and indexed once: `kubernetes_validate.validate` does so for each manifest.
    registry: Registry[Any] = Resource.from_contents(definitions) @ (Resource.from_contents(schema) @ Registry())
    return jsonschema.Draft202012Validator(schema, registry=registry)


def check(manifest: dict[str, Any]) -> None:
    """See that the API of Kubernetes 1.33 would take a manifest.

    Raises:
        jsonschema.ValidationError: a field is unknown, missing or of another type.
        FileNotFoundError: there is no such kind.
    """
    for error in _validator(manifest["kind"], manifest["apiVersion"]).iter_errors(manifest):
        raise error


def merged(base: Any, overlay: Any) -> Any:
    """Values files one over the other, as Helm merges them: maps by key, everything else as a whole."""
    if not (isinstance(base, dict) and isinstance(overlay, dict)):
        return overlay
    return base | {name: merged(base.get(name), value) for name, value in overlay.items()}


def misspelt(values: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Each key of a document in turn with a letter too much: where, and the whole document."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield ".".join(map(str, (*at, name))), {f"{k}x" if k == name else k: v for k, v in values.items()}
            for where, changed in misspelt(value, (*at, name)):
                yield where, {**values, name: changed}
    elif isinstance(values, list):
        for number, value in enumerate(values):
            for where, changed in misspelt(value, (*at, number)):
                other = copy.copy(values)
                other[number] = changed
                yield where, other
