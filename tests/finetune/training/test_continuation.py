"""Versions that a dataset must not be gone on with, told without a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.adapter_files import CONFIG_NAME, WEIGHTS_NAME, adapter_hash
from finetune.base_model.models import BaseModelRef
from finetune.dataset.deletions import Deletions
from finetune.dataset.discovery import discover_exports
from finetune.dataset.models import PreparedDataset
from finetune.dataset.parameters import PrepareParameters
from finetune.dataset.prepare import prepare_dataset
from finetune.errors import ConfigurationError
from finetune.layout import DataLayout
from finetune.planning.models import TrainingPlan
from finetune.planning.overrides import PlanOverrides
from finetune.registry.models import RegisteredVersion
from finetune.registry.store import register_adapter
from finetune.training.continuation import continued_plan

BASE = BaseModelRef(name="base", path=Path("base"), revision=None, fingerprint="b")
OLD, NEW = "2026-06-01", "2026-06-02"


class _FitError(Exception):
    """Nothing forbids the version: its plan would be made now."""


def prepared(layout: DataLayout, date: str, **parameters: Any) -> PreparedDataset:
    """A date's dataset; the second date holds the first."""
    for number, day in enumerate((OLD, NEW)):
        rows = ({"prompt": f"What is {number}-{i}?", "completion": f"It is {i}."} for i in range(60))
        layout.exports.mkdir(parents=True, exist_ok=True)
        (layout.exports / f"brain_dataset_{day}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    files = discover_exports(layout.exports)
    return prepare_dataset(files, date=date, layout=layout, parameters=PrepareParameters(**parameters))


def version_of(layout: DataLayout, dataset: PreparedDataset, **lineage: Any) -> RegisteredVersion:
    from safetensors.numpy import save_file

    adapter = layout.adapter(f"{dataset.date}-{dataset.fingerprint}")
    adapter.mkdir(parents=True)
    save_file({"a": np.full(2, len(list(adapter.parent.iterdir())), np.float32)}, adapter / WEIGHTS_NAME)
    (adapter / CONFIG_NAME).write_text('{"peft_type": "LORA"}')
    return register_adapter(
        layout.registry,
        adapter_path=adapter,
        adapter_hash=adapter_hash(adapter),
        trial_id="t",
        run_id=adapter.name,
        metrics={},
        tags={},
        lineage={
            "date": dataset.date,
            "dataset_fingerprint": dataset.fingerprint,
            "base_model_fingerprint": BASE.fingerprint,
            **lineage,
        },
    )


def go_on(layout: DataLayout, version: RegisteredVersion, dataset: PreparedDataset) -> None:
    def make_plan(*_: Any, **__: Any) -> TrainingPlan:
        raise _FitError

    with pytest.MonkeyPatch.context() as patch:
        # Of no model's kind and size; what is asked here is decided before.
        patch.setattr("finetune.training.continuation.plan_like", make_plan)
        continued_plan(
            version,
            dataset=dataset,
            base_model=BASE,
            layout=layout,
            replay_fraction=0.25,
            method=None,
            overrides=PlanOverrides(),
            deletions=Deletions(),
            id_field="id",
            make_plan=make_plan,
        )


def test_a_version_that_was_trained_on_what_is_held_out_now_is_not_gone_on_with(tmp_path: Path) -> None:
    """Nor is one that went on from it: its held-out loss would be that of records it has learned."""
    layout = DataLayout(tmp_path)
    first = version_of(layout, prepared(layout, OLD, eval_fraction=0.2))
    later = prepared(layout, NEW, eval_fraction=0.5)
    with pytest.raises(ConfigurationError, match=r"v1 cannot be continued: v1 was trained on \d+ of the prompts"):
        go_on(layout, first, later)
    between = prepared(layout, OLD, eval_fraction=0.6)
    second = version_of(layout, between, continued={"version": first.version})
    with pytest.raises(ConfigurationError, match=r"v2 cannot be continued: v1 was trained on \d+ of the prompts"):
        go_on(layout, second, later)
    # An ancestor's dataset that is damaged stops no date.
    damaged = layout.prepared(OLD, str(first.lineage["dataset_fingerprint"])) / "train.jsonl"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1])
    with pytest.raises(_FitError):
        go_on(layout, second, later)
    damaged.write_bytes(whole)
    for same_or_less in (0.2, 0.1):
        with pytest.raises(_FitError):
            go_on(layout, first, prepared(layout, NEW, eval_fraction=same_or_less))


def test_a_version_that_was_trained_before_sensitive_data_were_hidden_is_not_gone_on_with(tmp_path: Path) -> None:
    layout = DataLayout(tmp_path)
    plain = version_of(layout, prepared(layout, OLD))
    hiding = prepared(layout, NEW, sensitive_data="mask")
    with pytest.raises(ConfigurationError, match="v1 was trained before sensitive data were looked for"):
        go_on(layout, plain, hiding)
    with pytest.raises(_FitError):
        go_on(layout, version_of(layout, prepared(layout, OLD, sensitive_data="reject")), hiding)
