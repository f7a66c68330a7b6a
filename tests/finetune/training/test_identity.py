from __future__ import annotations

import re
from pathlib import Path

from finetune.base_model.models import BaseModelRef
from finetune.planning.models import TrialConfig
from finetune.training.identity import training_run_id

MODEL = BaseModelRef(name="m", path=Path("/models/m"), revision=None, fingerprint="f")
TRIAL = TrialConfig(trial_id="one")


def run_id(
    *,
    date: str = "2026-06-01",
    dataset: str = "d",
    trial: TrialConfig = TRIAL,
    base_model: BaseModelRef = MODEL,
    backend: str = "hf-peft",
    init_adapter: str | None = None,
) -> str:
    return training_run_id(
        date=date,
        dataset_fingerprint=dataset,
        trial=trial,
        base_model=base_model,
        backend=backend,
        init_adapter=init_adapter,
    )


def test_the_id_is_stable_and_safe_as_an_ollama_tag() -> None:
    assert run_id() == run_id()
    assert re.fullmatch(r"20260601-[0-9a-f]{10}", run_id())


def test_whatever_decides_the_adapter_changes_the_id() -> None:
    ids = {
        run_id(),
        run_id(date="2026-06-02"),
        run_id(dataset="e"),
        run_id(trial=TRIAL.model_copy(update={"seed": 1})),
        run_id(base_model=MODEL.model_copy(update={"fingerprint": "g"})),
        run_id(backend="h2o"),
        run_id(init_adapter="a"),
        run_id(init_adapter="b"),
    }
    assert len(ids) == 8


def test_the_places_and_names_of_equal_things_do_not(tmp_path: Path) -> None:
    assert run_id(base_model=MODEL.model_copy(update={"path": tmp_path})) == run_id()
    assert run_id(trial=TRIAL.model_copy(update={"trial_id": "two"})) == run_id()


def test_trainings_that_begin_with_the_base_model_keep_the_ids_that_they_had() -> None:
    trial = TRIAL.model_copy(update={"optimizer": "adamw_torch"})
    assert run_id(trial=trial) == "20260601-ba1e634351"


def test_a_configuration_that_was_written_and_read_again_names_the_same_training() -> None:
    assert run_id(trial=TrialConfig.model_validate_json(TRIAL.model_dump_json())) == run_id()
