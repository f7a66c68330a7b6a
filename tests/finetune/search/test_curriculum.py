"""A curriculum's specification, its stages' records, and what is said of the outcome; nothing is trained."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.base_model.models import BaseModelRef
from finetune.chat.encode import RecordEncoder
from finetune.dataset.chosen import choose_records
from finetune.dataset.discovery import discover_exports
from finetune.dataset.inspect import leaked_prompts
from finetune.dataset.models import PreparedDataset
from finetune.dataset.parameters import PrepareParameters
from finetune.dataset.prepare import prepare_dataset
from finetune.dataset.profile import profile_dataset
from finetune.errors import ArtifactError, ConfigurationError, DatasetError
from finetune.evaluation.losses import RecordLosses
from finetune.layout import DataLayout
from finetune.planning.cost import refuse_above
from finetune.progress import ignore_progress
from finetune.publishing import read_manifest
from finetune.search.candidates import Bench, plan_of
from finetune.search.curriculum import base_losses
from finetune.search.curriculum.base_losses import BaseLosses
from finetune.search.curriculum.difficulty import Records, read_facts
from finetune.search.curriculum.lessons import Lessons, lay_out, stages_by_difficulty, stages_of_exports
from finetune.search.curriculum.report import change, verdict_of
from finetune.search.curriculum.spec import CurriculumSpec, read_curriculum
from finetune.search.curriculum.stage_files import prepare_stage_files
from finetune.search.spec import spec_of
from finetune.training.data import training_order

DATE = "2026-06-02"
FIXED = {"micro_batch": 2, "accumulation": 2, "max_length": 64, "epochs": 1}


def record(number: int, **fields: Any) -> dict[str, Any]:
    answer = " ".join(["word"] * (1 + number % 17))
    return {"id": f"r{number}", "instruction": f"Question {number}?", "output": f"Answer {answer}.", **fields}


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


def spec_with(**fields: Any) -> CurriculumSpec:
    stages = [{"name": "easy"}, {"name": "hard"}]
    return spec_of({"by": "length", "stages": stages, "fixed": FIXED, **fields}, CurriculumSpec, where="test")


@pytest.fixture
def layout(tmp_path: Path) -> DataLayout:
    return DataLayout(tmp_path / "root")


@pytest.fixture
def dataset(layout: DataLayout) -> PreparedDataset:
    """Two exports of 40 records each; about a tenth is held out."""
    scores = np.random.default_rng(7).permutation(80).tolist()
    for day, start in (("01", 0), ("02", 40)):
        records = [record(number, quality=scores[number] / 10) for number in range(start, start + 40)]
        write(layout.exports / f"brain_dataset_2026-06-{day}.jsonl", records)
    return prepare_dataset(discover_exports(layout.exports), date=DATE, layout=layout)


@pytest.fixture
def encoder(tiny_model: BaseModelRef) -> RecordEncoder:
    return RecordEncoder.load(tiny_model.path)


@pytest.fixture
def bench(dataset: PreparedDataset, encoder: RecordEncoder, tiny_model: BaseModelRef) -> Bench:
    profile = profile_dataset(dataset, encoder=encoder)
    return Bench(dataset, profile, tiny_model, "cpu", tokens_per_second=1000, price_per_gpu_hour=2)


Laid = Callable[..., tuple[Records, Lessons]]


@pytest.fixture
def laid(bench: Bench, encoder: RecordEncoder) -> Laid:
    """The lessons of a specification on the dataset."""

    def lessons(**fields: Any) -> tuple[Records, Lessons]:
        spec = spec_with(**fields)
        records = read_facts(bench.dataset.train_path, spec, encoder, None, ignore_progress, partly=True)
        exports = spec.source == "exports"
        stage_of = stages_of_exports(spec, bench.dataset) if exports else stages_by_difficulty(spec, records)
        return records, lay_out(spec, records, stage_of, plan_of(spec, bench, {}), bench)

    return lessons


def two(**fields: Any) -> list[dict[str, Any]]:
    return [{"name": "easy"}, {"name": "hard", **fields}]


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"stages": [{"name": "all"}]}, r"stages: List should have at least 2"),
        ({"stages": [{"name": "a"}, {"name": "a"}]}, r"stages: name a stands there twice"),
        ({"stages": [{"name": "a/b"}, {"name": "b"}]}, r"stages.0.name: String should match"),
        ({"stages": [{"name": "shuffled"}, {"name": "b"}]}, r"stages: name shuffled is that of the training which"),
        ({"stages": two(replay=1.5)}, r"stages.1.replay: .*less than or equal to 1"),
        ({"stages": two(epochs=0)}, r"stages.1.epochs: .*greater than 0"),
        ({"stages": two(learning_rate="fast")}, r"stages.1.learning_rate: .*valid number"),
        ({"stages": two(lr=1)}, r"stages.1.lr: .*not permitted"),
        ({"stages": [{"name": "a", "replay": 0.5}, {"name": "b"}]}, r"stages: replay of a: nothing comes before"),
        ({"stages": two(share=0.5)}, r"stages: share: every stage has it, or none"),
        ({"stages": [{"name": "a", "share": 0.5}, {"name": "b", "share": 0.4}]}, r"share: all together are 0.9"),
        ({"stages": two(files=["x.jsonl"])}, r"stages: files: every stage has it, or none"),
        ({"by": None}, r"by: say length, base_loss or score"),
        ({"by": "difficulty"}, r"by: Input should be 'length', 'base_loss' or 'score'"),
        ({"by": "score"}, r"score: the column goes with by: score"),
        ({"score": "quality"}, r"score: the column goes with by: score"),
        ({"fixed": {"max_steps": 9}}, r"fixed.max_steps: the steps of a stage follow"),
        ({"fixed": {"use_pissa": True}}, r"fixed.use_pissa: the second stage starts from"),
        (
            {
                "stages": [
                    {"name": "a", "files": ["x"], "exports": ["y"]},
                    {"name": "b", "files": ["z"], "exports": ["w"]},
                ]
            },
            r"stages: files and exports exclude each other",
        ),
        (
            {"stages": [{"name": "a", "files": ["x"]}, {"name": "b", "files": ["x"]}]},
            r"stages: files x stands there twice",
        ),
        (
            {"stages": [{"name": "a", "files": ["x"]}, {"name": "b", "files": ["y"]}]},
            r"by, descending and share are for",
        ),
    ],
)
def test_a_wrong_curriculum_is_refused_by_the_name_of_its_field(fields: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigurationError, match=fault):
        spec_with(**fields)


def test_a_curriculum_is_read_from_yaml_with_files_beside_it_and_named_by_their_contents(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(
        "stages:\n- {name: easy, files: [a.jsonl]}\n"
        "- {name: hard, files: [b.jsonl], epochs: 2, learning_rate: 1.0e-4}\n"
    )
    spec = read_curriculum(tmp_path / "spec.yaml")
    assert [stage.files for stage in spec.stages] == [[tmp_path / "a.jsonl"], [tmp_path / "b.jsonl"]]
    assert (spec.stages[1].epochs, spec.stages[1].learning_rate) == (2.0, 1e-4)
    moved = spec.model_copy(
        update={"stages": [s.model_copy(update={"files": [Path("/elsewhere") / s.files[0].name]}) for s in spec.stages]}
    )
    contents = {"a.jsonl": "1" * 64, "b.jsonl": "2" * 64}

    def named(of: CurriculumSpec, **other: str) -> str:
        digests = {file: {**contents, **other}[file.name] for stage in of.stages for file in stage.files}
        return of.pinned(digests).identity("dataset")

    assert named(moved) == named(spec)
    assert named(spec.model_copy(update={"goal": "another"})) == named(spec)
    assert named(spec, **{"b.jsonl": "3" * 64}) != named(spec)


def test_difficulty_deals_every_training_record_to_one_stage_by_given_shares(
    laid: Laid, dataset: PreparedDataset
) -> None:
    stages = [{"name": "short", "share": 0.5}, {"name": "middle", "share": 0.3}, {"name": "long", "share": 0.2}]
    records, lessons = laid(stages=stages)
    count = dataset.counts.train
    assert sum(len(lesson.rows) for lesson in lessons.stages) == count
    assert sorted(np.concatenate([lesson.rows for lesson in lessons.stages]).tolist()) == list(range(count))
    assert [len(lesson.rows) for lesson in lessons.stages] == np.diff(
        np.round(np.array([0, 0.5, 0.8, 1]) * count)
    ).tolist()
    spans = [lesson.span for lesson in lessons.stages if lesson.span]
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    assert lessons.left_out == 0
    by_score = laid(stages=stages, by="score", score="quality", descending=True)[1]
    spans = [lesson.span for lesson in by_score.stages if lesson.span]
    assert all(before[0] >= after[1] for before, after in itertools.pairwise(spans))
    assert records.lengths.max() > records.lengths.min()


def test_exports_make_stages_and_a_record_of_no_stage_is_left_out_of_both_trainings(
    laid: Laid, dataset: PreparedDataset, layout: DataLayout
) -> None:
    one, other = sorted(dataset.records_by_file)
    write(layout.exports / "brain_dataset_2026-06-03.jsonl", [record(number) for number in range(100, 110)])
    stages = [{"name": "late", "exports": [other]}, {"name": "early", "exports": [one]}]
    records, lessons = laid(by=None, stages=stages)
    lines = dataset.train_path.read_text().splitlines()
    numbers = [[int(json.loads(lines[row])["id"][1:]) for row in lesson.rows] for lesson in lessons.stages]
    assert all(number >= 40 for number in numbers[0])
    assert all(number < 40 for number in numbers[1])
    assert len(numbers[0]) + len(numbers[1]) == len(records)
    with pytest.raises(
        ConfigurationError, match=r"no export brain_dataset_2026-06-03.jsonl .*It has brain_dataset_2026"
    ):
        laid(
            by=None,
            stages=[{"name": "a", "exports": [one]}, {"name": "b", "exports": ["brain_dataset_2026-06-03.jsonl"]}],
        )


def test_records_of_exports_that_no_stage_names_are_counted(bench: Bench, encoder: RecordEncoder) -> None:
    spec = spec_with()
    records = read_facts(bench.dataset.train_path, spec, encoder, None, ignore_progress)
    stage_of = stages_by_difficulty(spec, records)
    stage_of[:5] = -1
    lessons = lay_out(spec, records, stage_of, plan_of(spec, bench, {}), bench)
    assert lessons.left_out == 5
    assert not set(range(5)) & set(np.concatenate([lesson.rows for lesson in lessons.trainings]).tolist())


def test_replay_takes_a_share_of_all_earlier_records_by_their_content(laid: Laid) -> None:
    stages = [{"name": "a"}, {"name": "b", "replay": 0.25}, {"name": "c", "replay": 1.0}]
    _, lessons = laid(stages=stages)
    own = [len(lesson.rows) - lesson.replayed for lesson in lessons.stages]
    assert [lesson.replayed for lesson in lessons.stages] == [0, round(0.25 * own[0]), own[0] + own[1]]
    again = lessons.stages[1].rows[own[1] :]
    assert set(again.tolist()) < set(lessons.stages[0].rows.tolist())
    assert laid(stages=stages)[1].stages[1].rows.tolist() == lessons.stages[1].rows.tolist()
    # Another seed, another sample.
    other = laid(stages=stages, fixed={**FIXED, "seed": 1})[1].stages[1]
    assert set(other.rows[own[1] :].tolist()) != set(again.tolist())


@pytest.mark.parametrize("epochs", [1, 2, 1.5])
def test_the_shuffled_training_sees_each_record_as_often_as_the_stages_in_as_many_steps(
    laid: Laid, epochs: float
) -> None:
    stages = [{"name": "a", "epochs": 2 * epochs}, {"name": "b", "epochs": epochs, "replay": 0.5}]
    _, lessons = laid(stages=stages)
    seen: Counter[int] = Counter()
    for lesson in lessons.stages:
        order = training_order(len(lesson.rows), lesson.plan.trial_config)
        seen.update(lesson.rows[order].tolist())
    trial = lessons.shuffled.plan.trial_config
    assert trial.steps(len(lessons.shuffled.rows)) == sum(lesson.plan.estimated_steps for lesson in lessons.stages)
    whole = Counter({row: count * int(trial.epochs) for row, count in Counter(lessons.shuffled.rows.tolist()).items()})
    assert whole == seen
    # What stages' last steps are short of, it sees beyond that: less than a step for each stage.
    tokens = sum(lesson.plan.estimated_tokens or 0 for lesson in lessons.stages)
    assert tokens <= (lessons.shuffled.plan.estimated_tokens or 0)
    assert trial.records_seen(len(lessons.shuffled.rows)) - seen.total() < len(stages) * trial.effective_batch


def test_stages_have_their_own_epochs_and_rates_and_the_plan_s_batch(laid: Laid) -> None:
    _, lessons = laid(stages=[{"name": "a", "learning_rate": 1e-3}, {"name": "b", "epochs": 3}])
    first, second, shuffled = (lesson.plan.trial_config for lesson in lessons.trainings)
    assert (first.learning_rate, first.epochs, second.epochs) == (1e-3, 1, 3)
    assert second.learning_rate == shuffled.learning_rate != first.learning_rate
    assert first.effective_batch == second.effective_batch == shuffled.effective_batch == 4
    assert len({trial.trial_id for trial in (first, second, shuffled)}) == 3


def test_the_price_of_all_stages_and_of_the_comparison_is_refused_above_the_limit(laid: Laid) -> None:
    _, lessons = laid()
    hours = [lesson.plan.cost.gpu_hours for lesson in lessons.trainings if lesson.plan.cost]
    tokens = [lesson.plan.estimated_tokens for lesson in lessons.trainings]
    assert hours == [pytest.approx((count or 0) / 1000 / 3600) for count in tokens]
    cost = lessons.total().cost
    assert cost is not None
    assert cost.gpu_hours == pytest.approx(sum(hour or 0 for hour in hours))
    assert cost.price == pytest.approx(2 * (cost.gpu_hours or 0))
    refuse_above(lessons.total(), (cost.gpu_hours or 0) * 1.01)
    with pytest.raises(ConfigurationError, match=rf"in {lessons.total().estimated_steps} steps, .*MAX_GPU_HOURS"):
        refuse_above(lessons.total(), (cost.gpu_hours or 0) * 0.99)
    # What is trained already costs nothing.
    last = lessons.total([lessons.shuffled])
    assert (last.estimated_steps, last.cost) == (lessons.shuffled.plan.estimated_steps, lessons.shuffled.plan.cost)


def test_base_losses_that_are_yet_to_be_measured_are_priced_as_a_third_of_a_training(laid: Laid) -> None:
    records, lessons = laid(by="base_loss")
    assert records.difficulty is None
    assert lessons.measuring is not None
    # As trained, cut at max_length.
    tokens = int(np.minimum(records.lengths, FIXED["max_length"]).sum())
    assert lessons.measuring.gpu_hours == pytest.approx(round(tokens / 3) / 1000 / 3600)
    assert sum(len(lesson.rows) for lesson in lessons.stages) == len(records)


def test_records_without_a_score_are_named(encoder: RecordEncoder, tmp_path: Path) -> None:
    records = [
        record(0, quality=1),
        record(1),
        record(2, quality="good"),
        record(3, quality=True),
        record(4, quality=2),
    ]
    path = write(tmp_path / "train.jsonl", records)
    with pytest.raises(
        DatasetError,
        match=r"3 of 5 records have no number in quality: line 2 \(id r1\), line 3 \(id r2\), line 4 \(id r3\)",
    ):
        read_facts(path, spec_with(by="score", score="quality"), encoder, None, ignore_progress)


def test_equal_scores_and_too_few_records_make_no_stages(encoder: RecordEncoder, bench: Bench, tmp_path: Path) -> None:
    spec = spec_with(by="score", score="quality")
    path = write(tmp_path / "train.jsonl", [record(number, quality=1) for number in range(4)])
    records = read_facts(path, spec, encoder, None, ignore_progress)
    with pytest.raises(ConfigurationError, match="all 4 records have the same quality, 1: there is no order"):
        stages_by_difficulty(spec, records)
    few = read_facts(write(path, [record(1)]), spec_with(), encoder, None, ignore_progress)
    with pytest.raises(DatasetError, match="stage easy has none of the 1 training records"):
        lay_out(spec_with(), few, np.array([1]), plan_of(spec, bench, {}), bench)


def test_files_are_prepared_like_exports_and_hold_neither_held_out_nor_earlier_records(
    dataset: PreparedDataset, layout: DataLayout, tmp_path: Path
) -> None:
    held_out = [json.loads(line) for line in dataset.eval_path.read_text().splitlines()]
    trained = [json.loads(line) for line in dataset.train_path.read_text().splitlines()]
    easy = write(tmp_path / "easy.jsonl", [*trained[:10], held_out[0]])
    # The same prompt with another answer, white space and case of a field aside, is the same question.
    leak = {**held_out[1], "output": "Something else.", "instruction": f"  {held_out[1]['instruction']} "}
    hard = write(tmp_path / "hard.jsonl", [trained[3], leak, *trained[10:16]])
    hard.write_text(hard.read_text() + "no record\n\n")
    spec = spec_with(by=None, stages=[{"name": "easy", "files": [str(easy)]}, {"name": "hard", "files": [str(hard)]}])
    found = prepare_stage_files(spec, dataset, layout, PrepareParameters(), ignore_progress)
    first, second = found.files
    assert (first.lines, first.train, first.held_out, first.held_out_at) == (11, 10, 1, ["easy.jsonl:11"])
    assert (second.train, second.duplicates, second.held_out, second.rejected, second.blank) == (6, 1, 1, 1, 1)
    assert second.held_out_at == ["hard.jsonl:2"]
    for file in found.files:
        accounted = (file.train, file.duplicates, file.held_out, file.rejected, file.blank, file.left_out)
        assert file.lines == sum(accounted)
    assert [json.loads(line) for line in found.dataset.train_path.read_text().splitlines()] == trained[:16]
    assert found.stage_of.tolist() == [0] * 10 + [1] * 6
    assert leaked_prompts(found.dataset.train_path, dataset.eval_path) == []
    assert found.dataset.eval_path.read_bytes() == dataset.eval_path.read_bytes()
    assert prepare_stage_files(spec, dataset, layout, PrepareParameters(), ignore_progress).dataset.reused
    # What must not be learned is not learned by way of a file.
    (tmp_path / "deletions.txt").write_text(f"{trained[0]['id']}\n")
    parameters = PrepareParameters(deletion_list=tmp_path / "deletions.txt")
    without = prepare_stage_files(spec, dataset, layout, parameters, ignore_progress)
    assert (without.files[0].train, without.files[0].left_out) == (9, 1)
    assert trained[0]["id"] not in without.dataset.train_path.read_text().split('"')


def test_a_stage_of_nothing_but_held_out_records_is_refused_with_the_counts(
    dataset: PreparedDataset, layout: DataLayout, tmp_path: Path
) -> None:
    trained = write(tmp_path / "a.jsonl", [json.loads(line) for line in dataset.train_path.read_text().splitlines()])
    leaking = tmp_path / "b.jsonl"
    leaking.write_bytes(dataset.eval_path.read_bytes())
    spec = spec_with(by=None, stages=[{"name": "a", "files": [str(trained)]}, {"name": "b", "files": [str(leaking)]}])
    count = dataset.counts.eval
    with pytest.raises(
        DatasetError, match=rf"stage b has no record to train on: of {count} lines {count} are held out"
    ):
        prepare_stage_files(spec, dataset, layout, PrepareParameters(), ignore_progress)
    listed = tmp_path / "deletions.txt"
    listed.write_text("".join(f"{json.loads(line)['id']}\n" for line in trained.read_text().splitlines()))
    parameters = PrepareParameters(deletion_list=listed)
    with pytest.raises(DatasetError, match=rf"stage a .* {dataset.counts.train} are on the deletion list or left out"):
        prepare_stage_files(spec, dataset, layout, parameters, ignore_progress)
    gone = spec_with(by=None, stages=[{"name": "a", "files": ["/no/a.jsonl"]}, {"name": "b", "files": [str(leaking)]}])
    with pytest.raises(DatasetError, match=r"a stage's file cannot be read: No such file.*/no/a.jsonl"):
        prepare_stage_files(gone, dataset, layout, PrepareParameters(), ignore_progress)
    relative = spec_with(by=None, stages=[{"name": "a", "files": ["a.jsonl"]}, {"name": "b", "files": ["b.jsonl"]}])
    with pytest.raises(ConfigurationError, match=r"a\.jsonl says nothing about where it begins"):
        prepare_stage_files(relative, dataset, layout, PrepareParameters(), ignore_progress)


def test_chosen_records_are_a_dataset_of_their_own_made_again_where_it_was_damaged(
    dataset: PreparedDataset, layout: DataLayout, encoder: RecordEncoder
) -> None:
    records = read_facts(dataset.train_path, spec_with(), encoder, None, ignore_progress)
    rows = np.array([5, 0, 5])
    chosen = choose_records(dataset, rows, records.offsets, layout)
    lines = dataset.train_path.read_bytes().splitlines(keepends=True)
    assert chosen.train_path.read_bytes() == lines[5] + lines[0] + lines[5]
    assert chosen.eval_path.read_bytes() == dataset.eval_path.read_bytes()
    assert chosen.counts.train == sum(chosen.records_by_file.values()) == 3
    assert read_manifest(chosen.path, verify="hashes").inputs["dataset"] == dataset.fingerprint
    assert choose_records(dataset, rows, records.offsets, layout).reused
    assert choose_records(dataset, rows[:2], records.offsets, layout).fingerprint != chosen.fingerprint
    chosen.train_path.write_bytes(b"{}\n")
    again = choose_records(dataset, rows, records.offsets, layout)
    assert (again.path, again.reused) == (chosen.path, False)
    assert again.train_path.read_bytes() == lines[5] + lines[0] + lines[5]


def test_a_base_loss_is_measured_once_whatever_file_the_record_is_in(
    tiny_model: BaseModelRef, encoder: RecordEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    load = base_losses.load_base

    def counted(model: BaseModelRef) -> Any:
        loads.append(model.name)
        return load(model)

    monkeypatch.setattr(base_losses, "load_base", counted)

    def losses(max_length: int = 64) -> BaseLosses:
        return BaseLosses(
            tmp_path, tiny_model, max_length=max_length, pad_token_id=encoder.pad_token_id, on_progress=ignore_progress
        )

    encoded = encoder.encode([record(number) for number in range(6)])
    assert np.isnan(losses().kept(encoded)).all()
    assert loads == [], "nothing is measured by looking"
    measured = losses()(encoded)
    assert np.isfinite(measured).all()
    assert len(set(measured.tolist())) > 1
    assert losses().kept(encoded).tolist() == measured.tolist()
    assert losses()(encoded[::-1]).tolist() == measured[::-1].tolist()
    assert loads == [tiny_model.name], "the second time nothing was measured"
    more = losses()(encoder.encode([record(number) for number in (2, 50)]))
    assert more[0] == measured[2]
    assert len(loads) == 2
    # What is cut before its answer has no loss.
    assert np.isnan(losses(max_length=2)(encoded)).all()
    (kept, *_) = tmp_path.glob("*/*.npy")
    kept.write_bytes(kept.read_bytes()[:40])
    with pytest.raises(ArtifactError, match="losses of the base model cannot be read"):
        losses()(encoded)


def test_the_verdict_is_undecided_where_the_interval_holds_zero_or_is_of_too_few_records() -> None:
    assert [verdict_of(ci95, 6) for ci95 in ((-0.2, -0.1), (0.1, 0.2), (-0.1, 0.2), (0.0, 0.1))] == [
        "better",
        "worse",
        "undecided",
        "undecided",
    ]
    assert verdict_of((-0.2, -0.1), 5) == "undecided"
    ours = RecordLosses(lines=[1, 2, 3], tokens=[10, 20, 30], base_nats=[9, 9, 9], nats=[10.0, 30.0, 30.0])
    difference, (low, high) = change([15.0, 40.0, 45.0], ours, seed=0)
    assert difference == pytest.approx(-0.5)
    assert (low, high) == (pytest.approx(-0.5), pytest.approx(-0.5)), "each record improves by as much per token"
