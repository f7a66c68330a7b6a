"""The estimate against published measurements: `make bench-memory` prints each line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from statistics import mean

import pytest

from benchmarks.memory.bench import held_out_rows, measured_rows
from finetune.planning.model_config import read_model_shape

MODELS = Path(__file__).parents[3] / "benchmarks" / "memory" / "models"


def test_the_estimate_is_near_what_others_measured() -> None:
    numeric = [row for row in measured_rows() if row.measured is not None]
    counted = [row for row in numeric if not row.reason]
    errors = {row.name: row.error for row in counted}
    assert len(numeric) == 103
    assert len(counted) >= 85
    assert mean(abs(row.error) for row in counted) < 0.12
    assert all(abs(error) <= 0.3 for error in errors.values()), errors


def test_what_ran_out_of_memory_is_estimated_not_to_fit_and_what_ran_to_fit() -> None:
    rows = measured_rows()
    assert sum(row.measured is None for row in rows) == 15
    for row in rows:
        if row.limit_gb is not None and not row.reason:
            assert (row.needed_gb <= row.limit_gb) == (row.measured is not None), row.name


def test_every_published_line_is_there_and_each_one_left_out_says_why() -> None:
    with (MODELS.parent / "measured.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    rows = measured_rows()
    assert len(lines) == len(rows) == 118
    assert all(len(row.reason) > 20 for row in rows if row.reason)


def test_tables_that_no_constant_was_chosen_by_are_near_too() -> None:
    rows = held_out_rows()
    assert not {row.source for row in rows} & {row.source for row in measured_rows()}
    by_peft = [abs(row.error) for row in rows if row.source.startswith("huggingface/peft")]
    assert len(rows) > 50
    assert max(by_peft) < 0.12
    assert mean(abs(row.error) for row in rows) < 0.15


def names() -> list[str]:
    return sorted(path.name for path in MODELS.iterdir())


@pytest.mark.parametrize("name", names())
def test_public_models_have_as_many_parameters_as_on_the_meta_device(tmp_path: Path, name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = read_model_shape(MODELS / name)
    content = json.loads((MODELS / name / "config.json").read_text())

    def built(layers: int) -> int:
        (tmp_path / "config.json").write_text(json.dumps(content | {"num_hidden_layers": layers}))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
        return sum(parameter.numel() for parameter in model.parameters())

    # A layer is like the next one, and large models have many.
    assert shape.parameters == built(1) + (shape.layers - 1) * (built(2) - built(1))
