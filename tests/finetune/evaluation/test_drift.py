"""The champion on what arrived since its training: what counts as new, and what the figures say."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from finetune.base_model.models import BaseModelRef
from finetune.errors import ArtifactError, DatasetError
from finetune.evaluation.drift import DriftReport, measure_drift
from finetune.evaluation.models import ChampionRef
from finetune.evaluation.statistics import shift_ci95
from finetune.publishing import read_manifest


def record(prompt: str, answer: str) -> dict[str, str]:
    return {"instruction": prompt, "output": answer}


def write(path: Path, *records: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


KNOWN = [record(f"Known question {n}?", f"The known answer is {n}.") for n in range(8)]
NEW = [record(f"New question {n}?", "zxq " * (n + 3)) for n in range(8)]
TRAINED = "Trained caf\u00e9 question?"
# The same prompt, in other white space and with its accent apart.
TRAINED_AGAIN = [record(f" Trained   {cafe} question? ", cafe) for cafe in ("caf\u00e9", "cafe\u0301")]


@pytest.fixture(scope="module")
def champion(tiny_model: BaseModelRef, tmp_path_factory: pytest.TempPathFactory) -> ChampionRef:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    path = tmp_path_factory.mktemp("champion")
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model.path), config).save_pretrained(path)
    return ChampionRef(
        version="v1",
        adapter_path=path,
        adapter_hash="a",
        base_fingerprint=tiny_model.fingerprint,
        learned=[TRAINED],
    )


def drift(tmp_path: Path, base: BaseModelRef, champion: ChampionRef, *arrived: dict[str, str]) -> DriftReport:
    return measure_drift(
        base_model=base,
        champion=champion,
        known_eval=write(tmp_path / "eval.jsonl", *KNOWN),
        arrived=write(tmp_path / "arrived.jsonl", *arrived),
        output_dir=tmp_path / "drift",
        max_length=256,
    )


def test_what_arrived_since_is_measured_against_what_was_known(
    tmp_path: Path, tiny_model: BaseModelRef, champion: ChampionRef
) -> None:
    known_again = {field: f" {text.replace(' ', '  ')} " for field, text in KNOWN[0].items()}
    arrived = [known_again, *KNOWN[1:], *NEW, *TRAINED_AGAIN]
    report = drift(tmp_path, tiny_model, champion, *arrived)
    new = [json.loads(line) for line in (report.path / "new.jsonl").read_text().splitlines()]
    assert new == NEW, "neither what was known nor what was trained on"
    assert (report.records, report.known_records) == (8, 8)
    assert report.loss is not None
    assert report.known_loss is not None
    assert report.drift_ci95 is not None
    assert report.drift == pytest.approx(report.loss - report.known_loss)
    low, high = report.drift_ci95
    assert 0 < low < report.drift < high, "no model expects such answers"
    # An adapter that was never trained is its base model.
    assert report.delta_vs_base_loss == pytest.approx(0, abs=1e-6)
    assert report.base_drift == pytest.approx(report.drift, abs=1e-6)
    assert read_manifest(report.path, kind="drift", verify="hashes")
    assert drift(tmp_path, tiny_model, champion, *arrived) == report.model_copy(update={"reused": True})
    fewer = drift(tmp_path, tiny_model, champion, *KNOWN, *NEW[:7])
    assert (fewer.records, fewer.reused) == (7, False)
    wiser = champion.model_copy(update={"learned": [NEW[0]["instruction"]], "unknown": ["v0"]})
    fewer = drift(tmp_path, tiny_model, wiser, *KNOWN, *NEW[:7])
    assert (fewer.records, fewer.reused, fewer.unknown) == (6, False, ["v0"])


def test_where_nothing_arrived_there_is_nothing_to_measure(
    tmp_path: Path, tiny_model: BaseModelRef, champion: ChampionRef
) -> None:
    report = drift(tmp_path, tiny_model, champion, *KNOWN)
    assert (report.records, report.drift) == (0, None)


def test_a_line_that_is_no_record_is_named(tmp_path: Path, tiny_model: BaseModelRef, champion: ChampionRef) -> None:
    with pytest.raises(DatasetError, match="line 2 is no record: missing_field"):
        drift(tmp_path, tiny_model, champion, NEW[0], {"question": "without an answer"})
    assert not (tmp_path / "drift").exists()


def test_a_champion_of_another_base_model_is_refused(
    tmp_path: Path, tiny_model: BaseModelRef, champion: ChampionRef
) -> None:
    with pytest.raises(ArtifactError, match="another base model"):
        drift(tmp_path, tiny_model, champion.model_copy(update={"base_fingerprint": "x"}), *NEW)


def test_a_champion_whose_losses_are_no_numbers_is_named_with_the_record_and_leaves_no_report(
    tmp_path: Path, tiny_model: BaseModelRef, champion: ChampionRef
) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(champion.adapter_path, broken)
    weights = broken / "adapter_model.safetensors"
    save_file({name: tensor * float("nan") for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(ArtifactError, match=r"the champion v1 gives losses that are no numbers, first on line 1 of"):
        drift(tmp_path, tiny_model, champion.model_copy(update={"adapter_path": broken}), *NEW)
    assert not (tmp_path / "drift").exists()


def test_the_interval_of_a_shift_holds_the_true_one() -> None:
    chance = np.random.default_rng(0)
    inside = 0
    for trial in range(100):
        tokens = chance.integers(5, 50, size=60)
        before, after = ((mean + 0.3 * chance.standard_normal(60)) * tokens for mean in (1.0, 1.2))
        low, high = shift_ci95((before, tokens), (after, tokens), resamples=400, seed=trial)
        inside += low <= 0.2 <= high
    assert 88 <= inside <= 100
    assert shift_ci95((before, tokens), (after, tokens), resamples=400, seed=1) == shift_ci95(
        (before, tokens), (after, tokens), resamples=400, seed=1
    )
