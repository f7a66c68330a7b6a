from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from finetune.dataset.models import PreparedDataset
from finetune.dataset.prepare import PrepareParameters, load_prepared, prepare_dataset
from finetune.dataset.records import prompt_text
from finetune.errors import ArtifactError, DatasetError
from finetune.layout import DataLayout
from finetune.progress import ProgressEvent
from finetune.publishing import read_manifest

Prepare = Callable[..., PreparedDataset]
Pairs = Callable[..., bytes]


def records(path: Path) -> list[dict[str, object]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def kept(dataset: PreparedDataset) -> list[dict[str, object]]:
    return records(dataset.train_path) + records(dataset.eval_path)


def test_every_line_is_accounted_for_and_rejects_name_their_file(prepare: Prepare, pairs: Pairs) -> None:
    dataset = prepare(
        {
            "brain_dataset_2026-06-01.jsonl": pairs(*range(20)) + b"\n" + pairs(3, 4) + b"{bad\n",
            "brain_dataset_2026-06-02.jsonl": pairs(30, 5) + b"[]\n{}\n" + pairs(31) + b'{"instr',
        }
    )

    counts = dataset.counts
    assert (counts.lines, counts.kept, counts.duplicates, counts.rejected, counts.blank) == (30, 22, 3, 4, 1)
    assert dataset.rejects_by_reason == {
        "bad_json": 1,
        "half_line": 1,
        "missing_field": 1,
        "not_an_object": 1,
    }
    assert dataset.rejects_by_file == {"brain_dataset_2026-06-01.jsonl": 1, "brain_dataset_2026-06-02.jsonl": 3}
    assert dataset.records_by_file == {"brain_dataset_2026-06-01.jsonl": 20, "brain_dataset_2026-06-02.jsonl": 2}
    assert dataset.window_dates == ["2026-06-01", "2026-06-02"]
    assert [(r["file"], r["line"], r["reason"]) for r in records(dataset.rejects_path)] == [
        ("brain_dataset_2026-06-01.jsonl", 24, "bad_json"),
        ("brain_dataset_2026-06-02.jsonl", 3, "not_an_object"),
        ("brain_dataset_2026-06-02.jsonl", 4, "missing_field"),
        ("brain_dataset_2026-06-02.jsonl", 6, "half_line"),
    ]


def test_rejects_can_be_found_again_by_offset_and_length(prepare: Prepare, pairs: Pairs, layout: DataLayout) -> None:
    bad = ['{"instruction": "їжак"'.encode(), b"\xff\xfe", b"[1]"]
    content = pairs(*range(9)) + b"\n".join(bad) + b"\n" + pairs(10, 11)

    dataset = prepare({"brain_dataset_2026-06-01.jsonl": content}, range_bytes=64)

    found = [content[r["offset"] :][: r["length"]] for r in map(json.loads, dataset.rejects_path.open())]
    assert found == bad


def test_records_are_copied_byte_for_byte_in_the_order_of_files_and_lines(prepare: Prepare) -> None:
    odd = ['  {"text" :  "один\\u0020"}', '{"text":"два","id":1.50}', '{"id":2,"text":"\\ud83d\\ude00"}']
    lines = [line.encode() for line in odd] + [b'{"text":"%d"}' % n for n in range(30)]

    dataset = prepare(
        {
            "brain_dataset_2026-06-02.jsonl": b"\n".join(lines[10:]),
            "brain_dataset_2026-06-01.jsonl": b"\r\n".join(lines[:10]),
        }
    )

    train, held_out = (path.read_bytes().splitlines() for path in (dataset.train_path, dataset.eval_path))
    assert sorted(train + held_out) == sorted(lines)
    for side in (train, held_out):
        assert side == [line for line in lines if line in side]


def test_a_carriage_return_within_a_record_breaks_no_line(prepare: Prepare, pairs: Pairs) -> None:
    dataset = prepare({"brain_dataset_2026-06-01.jsonl": b'{"text":\r"a"}\n' + pairs(*range(9))})

    content = dataset.train_path.read_bytes() + dataset.eval_path.read_bytes()
    assert b"\r" not in content
    assert b'{"text": "a"}\n' in content


@pytest.mark.parametrize(
    "again",
    [
        '{"instruction":"Кафе  є","output":"Їжак\\n"}',
        '{"output":"Їжак","instruction":"Кафе є","id":7}',
        '{"prompt":"Кафе є","completion":"Їжак"}',
        '{"messages":[{"role":"user","content":"Кафе є"},{"role":"assistant","content":"Їжак"}]}',
        '{"conversations":[{"from":"human","value":"Кафе є"},{"from":"gpt","value":"Їжак"}]}',
        '{"instruction":"\\u041a\\u0430\\u0444\\u0435 \\u0454","input":"","output":"Їжак"}',
        unicodedata.normalize("NFD", '{"instruction":"Кафе є","output":"Їжак"}'),
    ],
)
def test_the_same_content_in_another_dress_is_a_duplicate(prepare: Prepare, pairs: Pairs, again: str) -> None:
    first = '{"instruction":"Кафе є","output":"Їжак"}'
    assert not unicodedata.is_normalized("NFD", first), "otherwise there is nothing to compose"
    dataset = prepare(
        {
            "brain_dataset_2026-06-01.jsonl": first.encode() + b"\n" + pairs(*range(9)),
            "brain_dataset_2026-06-02.jsonl": again.encode() + b"\n",
        }
    )

    assert dataset.counts.duplicates == 1
    assert json.loads(first) in kept(dataset)


@pytest.mark.parametrize(
    "other",
    [
        '{"instruction":"q","output":"A"}',
        '{"instruction":"q","output":"b"}',
        '{"instruction":"q","input":"i","output":"a"}',
        '{"system":"s","instruction":"q","output":"a"}',
        '{"text":"qa"}',
    ],
)
def test_other_content_is_no_duplicate(prepare: Prepare, pairs: Pairs, other: str) -> None:
    lines = b'{"instruction":"q","output":"a"}\n' + other.encode() + b"\n" + pairs(*range(9))

    assert prepare({"brain_dataset_2026-06-01.jsonl": lines}).counts.duplicates == 0


def test_of_equal_records_the_first_by_date_name_and_line_is_kept(prepare: Prepare, pairs: Pairs) -> None:
    def named(name: str) -> bytes:
        return orjson.dumps({"instruction": "same", "output": "same", "id": name}) + b"\n"

    dataset = prepare(
        {
            "brain_dataset_2026-06-02.jsonl": named("later") + pairs(*range(9)),
            "brain_dataset_2026-06-01_b.jsonl": named("b"),
            "brain_dataset_2026-06-01_a.jsonl": pairs(20) + named("a1") + named("a2"),
        }
    )

    assert [record["id"] for record in kept(dataset) if "id" in record] == ["a1"]
    assert dataset.counts.duplicates == 3


def test_records_with_one_prompt_stand_on_one_side(prepare: Prepare) -> None:
    lines = [
        orjson.dumps({"instruction": f"Question {n}" + " " * k, "output": f"Answer {k}", "system": "s" * k})
        for n in range(40)
        for k in range(4)
    ]
    dataset = prepare({"brain_dataset_2026-06-01.jsonl": b"\n".join(lines)})

    sides = [{prompt_text(r).strip() for r in records(p)} for p in (dataset.train_path, dataset.eval_path)]
    assert all(sides)
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 40


def test_the_held_out_share_is_about_what_was_asked(prepare: Prepare, pairs: Pairs) -> None:
    dataset = prepare({"brain_dataset_2026-06-01.jsonl": pairs(*range(5000))}, parameters={"eval_fraction": 0.1})

    # Four standard deviations of the binomial distribution.
    assert abs(dataset.counts.eval - 500) < 85


def test_another_salt_gives_another_split_of_the_same_records(prepare: Prepare, pairs: Pairs) -> None:
    files = {"brain_dataset_2026-06-01.jsonl": pairs(*range(200))}
    one, other = (prepare(files, parameters={"salt": salt}) for salt in ("", "other"))

    assert one.path != other.path
    assert one.eval_path.read_bytes() != other.eval_path.read_bytes()
    assert sorted(map(str, kept(one))) == sorted(map(str, kept(other)))


def test_the_window_decides_which_dates_are_trained_on(prepare: Prepare, pairs: Pairs) -> None:
    files = {f"brain_dataset_2026-06-0{day}.jsonl": pairs(*range(day * 100, day * 100 + 20)) for day in (1, 2, 3, 4)}

    def dates(window: str) -> list[str]:
        return prepare(files, date="2026-06-03", parameters={"window": window}).window_dates

    assert dates("all") == ["2026-06-01", "2026-06-02", "2026-06-03"]
    assert dates("last:2") == ["2026-06-02", "2026-06-03"]
    assert dates("date") == ["2026-06-03"]


def test_a_complete_dataset_is_found_and_not_made_again(prepare: Prepare, pairs: Pairs) -> None:
    files = {"brain_dataset_2026-06-01.jsonl": pairs(*range(20))}
    first = prepare(files)
    stamp = first.train_path.stat().st_mtime_ns

    second = prepare(files)

    assert (first.reused, second.reused) == (False, True)
    assert second.model_copy(update={"reused": False}) == first == load_prepared(first.path)
    assert second.train_path.stat().st_mtime_ns == stamp


def test_a_dataset_damaged_since_is_made_again(prepare: Prepare, pairs: Pairs) -> None:
    files = {"brain_dataset_2026-06-01.jsonl": pairs(*range(20))}
    first = prepare(files)
    content = first.train_path.read_bytes()
    first.train_path.write_bytes(content[:-1])

    second = prepare(files)

    assert second.path == first.path
    assert not second.reused
    assert second.train_path.read_bytes() == content


def test_of_two_preparations_at_once_the_first_to_finish_is_kept(prepare: Prepare, pairs: Pairs) -> None:
    files = {"brain_dataset_2026-06-01.jsonl": pairs(*range(20))}
    inner: list[PreparedDataset] = []
    stamps: list[int] = []

    def overtake(event: ProgressEvent) -> None:
        if event.stage == "write" and not inner:
            inner.append(prepare(files))
            stamps.append(inner[0].train_path.stat().st_ino)

    outer = prepare(files, on_progress=overtake)

    assert not inner[0].reused
    assert outer == inner[0] == load_prepared(outer.path)
    assert outer.train_path.stat().st_ino == stamps[0]


def test_only_new_files_are_validated_again(prepare: Prepare, pairs: Pairs) -> None:
    files = {f"brain_dataset_2026-06-0{day}.jsonl": pairs(*range(day * 50, day * 50 + 50)) for day in (1, 2)}
    prepare(files)
    new = pairs(*range(900, 950))
    validated: list[ProgressEvent] = []

    def listen(event: ProgressEvent) -> None:
        if event.stage == "validate":
            validated.append(event)

    prepare({**files, "brain_dataset_2026-06-03.jsonl": new}, on_progress=listen)

    assert validated[-1].total == len(new)
    # Neither another split nor another window needs a line parsed again.
    validated.clear()
    prepare(files, parameters={"eval_fraction": 0.3, "window": "last:1"}, on_progress=listen)
    assert not validated


def test_a_damaged_index_is_made_again(prepare: Prepare, pairs: Pairs, layout: DataLayout) -> None:
    files = {"brain_dataset_2026-06-01.jsonl": pairs(*range(50))}
    before = prepare(files).train_path.read_bytes()
    [index] = (layout.root / "prepared" / "brain" / ".index").iterdir()
    (index / "records.bin").write_bytes(b"short")

    after = prepare({**files, "brain_dataset_2026-05-01.jsonl": b""})

    assert after.counts.kept == 50
    assert after.train_path.read_bytes() == before


def test_lines_that_do_not_add_up_end_the_run(prepare: Prepare, pairs: Pairs, layout: DataLayout) -> None:
    files = {"brain_dataset_2026-06-01.jsonl": pairs(*range(50)) + b"\n{bad\n"}
    assert prepare(files).counts.lines == 52
    [manifest] = (layout.root / "prepared" / "brain" / ".index").glob("*/manifest.json")
    manifest.write_text(manifest.read_text().replace('"lines": 52', '"lines": 53'))

    with pytest.raises(AssertionError, match=r"lost or counted twice.*lines=53"):
        prepare(files, parameters={"salt": "other"})
    [alone] = (layout.root / "prepared" / "brain" / "2026-06-01").iterdir()
    assert load_prepared(alone).counts.lines == 52


def test_the_manifest_tells_what_went_in_and_what_came_out(prepare: Prepare, pairs: Pairs) -> None:
    content = pairs(*range(20)) + b"oops\n"
    dataset = prepare({"brain_dataset_2026-06-01.jsonl": content}, parameters={"salt": "pepper"})

    manifest = read_manifest(dataset.path, kind="prepared-dataset", verify="hashes")
    [file] = manifest.inputs["files"]
    assert file["sha256"] == hashlib.sha256(content).hexdigest()
    assert (file["name"], file["size"], file["lines"]) == ("brain_dataset_2026-06-01.jsonl", len(content), 21)
    assert file["reasons"] == {"bad_json": 1}
    assert manifest.parameters["salt"] == "pepper"
    assert set(manifest.outputs) == {"train.jsonl", "eval.jsonl", "rejects.jsonl"}


def test_a_window_without_exports_is_an_error(layout: DataLayout) -> None:
    with pytest.raises(DatasetError, match="no exports for the dataset of 2026-06-01"):
        prepare_dataset([], date="2026-06-01", layout=layout)


def test_exports_with_only_bad_lines_name_the_reasons_and_where_they_are(prepare: Prepare, layout: DataLayout) -> None:
    with pytest.raises(DatasetError) as caught:
        prepare({"brain_dataset_2026-06-01.jsonl": b"\nnope\nnope\n{}\n"})

    message = str(caught.value)
    assert "none of the 4 lines is a record" in message
    assert "bad_json 2, missing_field 1" in message
    assert "brain_dataset_2026-06-01.jsonl:2 bad_json" in message
    assert "brain_dataset_2026-06-01.jsonl:4 missing_field" in message
    [rejects] = (layout.root / "prepared" / "brain" / ".index").glob("*/rejects.jsonl")
    assert str(rejects.parent.parent) in message
    assert [record["line"] for record in records(rejects)] == [2, 3, 4]
    assert not (layout.root / "prepared" / "brain" / "2026-06-01").exists() or not any(
        (layout.root / "prepared" / "brain" / "2026-06-01").iterdir()
    )


@pytest.mark.parametrize(("fraction", "side"), [(1e-9, "evaluation"), (1 - 1e-9, "training")])
def test_a_split_with_an_empty_side_is_an_error(prepare: Prepare, pairs: Pairs, fraction: float, side: str) -> None:
    with pytest.raises(DatasetError, match=f"none is left for {side}.*EVAL_FRACTION"):
        prepare({"brain_dataset_2026-06-01.jsonl": pairs(1, 2, 3)}, parameters={"eval_fraction": fraction})


def test_a_damaged_dataset_is_not_loaded(prepare: Prepare, pairs: Pairs) -> None:
    dataset = prepare({"brain_dataset_2026-06-01.jsonl": pairs(*range(20))})
    dataset.train_path.write_bytes(b"")
    with pytest.raises(ArtifactError, match="0 bytes instead of"):
        load_prepared(dataset.path)


def test_a_manifest_of_another_shape_is_not_loaded(prepare: Prepare, pairs: Pairs) -> None:
    dataset = prepare({"brain_dataset_2026-06-01.jsonl": pairs(*range(20))})
    manifest = dataset.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"counts"', '"sums"'))
    with pytest.raises(ArtifactError, match="does not describe a dataset"):
        load_prepared(dataset.path)


@pytest.mark.parametrize(
    "wrong", [{"window": "last:0"}, {"eval_fraction": 0}, {"eval_fraction": 1}, {"max_depth": 1}, {"unknown": 1}]
)
def test_parameters_out_of_their_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PrepareParameters(**wrong)  # type: ignore[arg-type]
