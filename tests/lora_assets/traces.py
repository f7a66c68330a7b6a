"""What the report of every experiment must be able to tell of itself."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema

from finetune.layout import DataLayout
from finetune.progress import ignore_progress
from finetune.reproduction.at_hand import Places, look_for_inputs
from finetune.reproduction.check import check, select
from finetune.reproduction.manifest import read_experiment_manifest
from finetune.reproduction.models import EXPERIMENT_MANIFEST, ExperimentManifest, manifest_schema
from finetune.reproduction.trace import trace


def traced(report: Path, layout: DataLayout, exports: Path | None = None) -> ExperimentManifest:
    """The manifest of a report, once every figure was followed to its data and all can be run again."""
    places = Places(layout=layout, exports=exports or layout.exports)
    found = trace(report, places)
    assert found.figures
    links = [link for chain in found.chains.values() for link in chain.links]
    assert found.broken == [], [link for link in links if link.state != "present"]
    assert {link.kind for link in links} >= {"evaluation", "records", "adapter", "training", "dataset", "export"}
    assert all(figure.runs for figure in found.figures.values())
    pictures = {name for name, figure in found.figures.items() if figure.value is None}
    assert {path.name for path in report.glob("*.png")} == pictures
    jsonschema.validate(json.loads((report / EXPERIMENT_MANIFEST).read_bytes()), json.loads(manifest_schema()))
    selection = select(report)
    at_hand = look_for_inputs(selection.manifest.inputs, places, weights=True, on_progress=ignore_progress)
    assert check(selection, at_hand, places).refusals == []
    manifest = read_experiment_manifest(report)
    assert isinstance(manifest, ExperimentManifest)
    return manifest
