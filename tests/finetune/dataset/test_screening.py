"""What must not be learned: the deletion list, the quality asked for, secrets and personal data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from finetune.dataset.deletions import content_hash, find_deletable, read_deletions, versions_trained_on, with_contents
from finetune.dataset.discovery import discover_exports
from finetune.dataset.inspect import leaked_prompts
from finetune.dataset.models import PreparedDataset
from finetune.dataset.prepare import load_prepared
from finetune.dataset.sensitive import find_sensitive, masked
from finetune.errors import ConfigurationError, DatasetError
from finetune.layout import DataLayout
from finetune.progress import ProgressEvent
from finetune.publishing import read_manifest
from finetune.registry.models import RegisteredVersion

Prepare = Callable[..., PreparedDataset]
Pairs = Callable[..., bytes]
FIRST, SECOND = "brain_dataset_2026-06-01.jsonl", "brain_dataset_2026-06-02.jsonl"
# Assembled, so that nobody's scanner takes this file for a leak.
GITHUB = "ghp_" + "a1B2" * 9
AWS = "AKIA" + "IOSFODNN7EXAMPLE"
JWT = "eyJhbGciOiJIUzI1NiJ9" + ".eyJzdWIiOiIxIn0." + "c2lnbmF0dXJl"
KEY = "-----BEGIN RSA " + "PRIVATE KEY-----\nMIIabc\n-----END RSA PRIVATE KEY-----"


def lines(*records: dict[str, Any]) -> bytes:
    # The standard library writes numbers of any size.
    return "".join(json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n" for record in records).encode()


def numbered(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"id": f"r{n}", "instruction": f"Question {n}", "output": f"Answer {n}", **more} for n in range(count)]


def records(*paths: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for path in paths for line in path.read_bytes().splitlines()]


def kept(dataset: PreparedDataset) -> list[dict[str, Any]]:
    return records(dataset.train_path, dataset.eval_path)


def outputs(dataset: PreparedDataset) -> list[bytes]:
    return [path.read_bytes() for path in sorted(dataset.path.iterdir()) if path.name != "manifest.json"]


@pytest.fixture
def deletion_list(tmp_path: Path) -> Callable[..., Path]:
    def write(*entries: str) -> Path:
        path = tmp_path / "deletions.txt"
        path.write_text("# asked to be forgotten\n\n" + "".join(f"{entry}\n" for entry in entries), encoding="utf-8")
        return path

    return write


def test_with_everything_off_a_dataset_is_what_it_was_before_there_were_options(
    prepare: Prepare, layout: DataLayout, deletion_list: Callable[..., Path]
) -> None:
    content = b"".join(b'{"text":"t %d"}\n' % n for n in range(20))
    dataset = prepare({FIRST: content})

    assert dataset.fingerprint == "f927624012ced103"
    assert [path.name for path in (layout.root / "prepared" / "brain" / ".index").iterdir()] == [
        "ca091aec097e3b2f4b932000cb8c64eb"
    ]
    assert not dataset.findings_path.exists()
    # A list of nothing deletes nothing.
    assert prepare({FIRST: content}, parameters={"deletion_list": deletion_list()}).reused


def test_records_on_the_deletion_list_are_removed_by_id_and_by_content(
    prepare: Prepare, deletion_list: Callable[..., Path]
) -> None:
    all_records = [*numbered(30), {"id": 77, "text": "by number"}, {"text": "by  content"}]
    forget = deletion_list("r3", "id:r4", "77", f"content:{content_hash({'text': 'by content'}).upper()}", "r99")
    dataset = prepare({FIRST: lines(*all_records) + b"{bad\n"}, parameters={"deletion_list": forget})

    counts = dataset.counts
    assert (counts.lines, counts.kept, counts.removed, counts.rejected) == (33, 28, 4, 1)
    assert {record["id"] for record in kept(dataset)} == {f"r{n}" for n in range(30) if n not in (3, 4)}
    [file] = read_manifest(dataset.path).inputs["files"]
    assert file["removed"] == 4
    assert read_manifest(dataset.path).parameters["deletions"]["entries"] == 5
    assert load_prepared(dataset.path) == dataset


def test_what_an_id_names_is_not_learned_from_a_duplicate_either(
    prepare: Prepare, deletion_list: Callable[..., Path]
) -> None:
    again = {"id": "other", "prompt": "Question  5", "completion": "Answer 5"}
    options = {"deletion_list": deletion_list("other")}
    dataset = prepare({FIRST: lines(*numbered(20)), SECOND: lines(again)}, parameters=options)

    assert (dataset.counts.removed, dataset.counts.duplicates) == (2, 0)
    assert "r5" not in {record["id"] for record in kept(dataset)}


@pytest.mark.parametrize("number", [0, -7, 2**64 - 1, 2**64, -(2**63) - 1, 3**80])
def test_an_id_that_is_a_whole_number_of_any_size_is_deleted_and_found(
    prepare: Prepare, layout: DataLayout, deletion_list: Callable[..., Path], number: int
) -> None:
    # A number beyond 64 bits must not stand for its neighbour, which is the same as a fraction.
    named, neighbour = {"id": number, "text": "named"}, {"id": number + 1, "text": "neighbour"}
    files = {FIRST: lines(*numbered(20), named, neighbour)}
    prepare(files)
    listed = read_deletions(deletion_list(str(number)))

    [found] = find_deletable(layout, listed)
    assert len(found.train_lines + found.eval_lines) == 1
    with_content = with_contents(listed, discover_exports(layout.exports))
    assert with_content.contents == {bytes.fromhex(content_hash(named))}
    dataset = prepare(files, parameters={"deletion_list": deletion_list(str(number))})
    assert dataset.counts.removed == 1
    assert b"named" not in dataset.train_path.read_bytes() + dataset.eval_path.read_bytes()


def test_an_id_may_hold_what_only_some_take_for_a_line_break(
    prepare: Prepare, deletion_list: Callable[..., Path]
) -> None:
    odd = {"id": "a\u2028b\x85c", "text": "odd"}
    options = {"deletion_list": deletion_list("a\u2028b\x85c")}
    assert prepare({FIRST: lines(*numbered(20), odd)}, parameters=options).counts.removed == 1


def test_another_deletion_list_gives_another_dataset_but_no_line_is_read_again(
    prepare: Prepare, deletion_list: Callable[..., Path]
) -> None:
    files = {FIRST: lines(*numbered(20))}
    validated: list[ProgressEvent] = []

    def listen(event: ProgressEvent) -> None:
        if event.stage == "validate":
            validated.append(event)

    first = prepare(files, parameters={"deletion_list": deletion_list("r1")}, on_progress=listen)
    assert len(validated) == 1
    second = prepare(files, parameters={"deletion_list": deletion_list("r2", "r1")}, on_progress=listen)
    assert len(validated) == 1
    assert (first.counts.removed, second.counts.removed) == (1, 2)
    assert second.path != first.path
    # The same entries in another order are the same list.
    assert prepare(files, parameters={"deletion_list": deletion_list("r1", "r2")}).reused


@pytest.mark.parametrize(
    ("entries", "told"),
    [(["content:123"], "line 3 of the deletion list holds no content hash"), (None, "deletion list cannot be read")],
)
def test_without_a_readable_deletion_list_nothing_is_prepared(
    prepare: Prepare, deletion_list: Callable[..., Path], entries: list[str] | None, told: str
) -> None:
    path = deletion_list(*entries or [])
    if entries is None:
        path.unlink()
    with pytest.raises(ConfigurationError, match=told):
        prepare({FIRST: lines(*numbered(20))}, parameters={"deletion_list": path})


def version(number: int, dataset: PreparedDataset) -> RegisteredVersion:
    return RegisteredVersion.model_validate(
        {
            "version": f"v{number}",
            "adapter_hash": "0" * 64,
            "stored_path": "/registry",
            "created_at": "2026-06-01T00:00:00Z",
            "run_id": "r",
            "trial_id": "t",
            "metrics": {},
            "tags": {},
            "lineage": {"dataset_fingerprint": dataset.fingerprint},
            "status": "retired",
            "reason": "",
        }
    )


def test_versions_that_learned_what_was_deleted_since_are_listed(
    prepare: Prepare, layout: DataLayout, deletion_list: Callable[..., Path]
) -> None:
    files = {FIRST: lines(*numbered(20)), SECOND: lines(*numbered(40)[20:])}
    old = prepare(files, date="2026-06-01")
    both = prepare(files)
    trained = [record["id"] for record in records(both.train_path)]
    held = [record["id"] for record in records(both.eval_path)]
    late = next(name for name in trained if int(name[1:]) >= 20)
    versions = [version(2, old), version(10, both), version(9, both)]

    def found(*entries: str) -> list[str]:
        path = deletion_list(*entries)
        return versions_trained_on(find_deletable(layout, read_deletions(path), versions))

    assert found(late) == ["v9", "v10"]
    assert found(next(name for name in trained if int(name[1:]) < 20)) == ["v2", "v9", "v10"]
    assert found(f"content:{content_hash(records(both.train_path)[-1])}") == ["v9", "v10"]
    # Held out is not learned.
    assert found(held[-1]) == []
    assert find_deletable(layout, read_deletions(deletion_list(held[-1])), versions)[0].eval_lines == [len(held)]
    after = prepare(files, parameters={"deletion_list": deletion_list(late)})
    assert after.path not in [each.path for each in find_deletable(layout, read_deletions(deletion_list(late)))]


def test_a_version_that_learned_a_duplicate_under_another_id_is_found_through_the_exports(
    prepare: Prepare, layout: DataLayout, deletion_list: Callable[..., Path]
) -> None:
    again = {"id": "other", "prompt": "Question  5", "completion": "Answer 5"}
    bad = b'{"id":"other","prompt":""}\n{bad\n'
    dataset = prepare({FIRST: lines(*numbered(20)), SECOND: lines(again) + bad})
    assert "other" not in {record["id"] for record in kept(dataset)}
    listed = read_deletions(deletion_list("other"))

    assert find_deletable(layout, listed) == []
    [found] = find_deletable(layout, with_contents(listed, discover_exports(layout.exports)))
    [line] = found.train_lines + found.eval_lines
    assert records(dataset.train_path if found.train_lines else dataset.eval_path)[line - 1]["id"] == "r5"


def test_records_below_the_quality_asked_for_are_filtered_and_a_better_duplicate_is_kept(prepare: Prepare) -> None:
    poor, good = numbered(12, meta={"quality": 0.2}), numbered(12, meta={"quality": 0.7})
    unrated = [{"text": "unrated"}, {"text": "no number", "meta": {"quality": "high"}}, {"text": "x", "meta": 1}]
    options = {"min_quality": 0.7, "quality_field": "meta.quality"}
    dataset = prepare({FIRST: lines(*poor, *unrated), SECOND: lines(*good, good[0])}, parameters=options)

    counts = dataset.counts
    assert (counts.lines, counts.kept, counts.filtered, counts.duplicates) == (28, 12, 15, 1)
    assert all(record["meta"]["quality"] == 0.7 for record in kept(dataset))


def test_a_quality_field_that_no_record_has_is_an_error_that_says_so(prepare: Prepare) -> None:
    with pytest.raises(DatasetError, match=r"none of the 20 lines.*too little quality, or without a number.*20"):
        prepare({FIRST: lines(*numbered(20))}, parameters={"min_quality": 0})


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (f"use {GITHUB}!", "use [GITHUB_TOKEN]!"),
        (f"use {GITHUB}andmore", "use [GITHUB_TOKEN]"),
        (f"{AWS} and {AWS}", "[AWS_ACCESS_KEY] and [AWS_ACCESS_KEY]"),
        (f"token {JWT}, he said", "token [JSON_WEB_TOKEN], he said"),
        (f"a\n{KEY}\nb", "a\n[PRIVATE_KEY]\nb"),
        (KEY[:50], "[PRIVATE_KEY]"),
        ("пишіть на olena.k+x@пошта.укр.", "пишіть на [EMAIL_ADDRESS]."),
        ("call +380 (44) 123-45-67 now", "call [PHONE_NUMBER] now"),
        ("card 4111 1111-1111 1111.", "card [PAYMENT_CARD]."),
        ("IBAN GB82 WEST 1234 5698 7654 32", "IBAN [IBAN]"),
    ],
)
def test_secrets_and_personal_data_are_found_and_masked_whole(text: str, clean: str) -> None:
    assert masked(text, find_sensitive(text)) == clean


@pytest.mark.parametrize(
    "text",
    [
        "password = 'hunter2' is a bad password",
        "card 4111 1111 1111 1112",
        "GB83 WEST 1234 5698 7654 32",
        "2026-06-01T15:24:12Z, 1 + 1 = 2, 3.14159265358979",
        "f(x)@decorator and user@localhost",
        "commit 5a3f77318afce05a8c85b4b1ee6786a9e3f5cbd1",
    ],
)
def test_ordinary_texts_are_left_alone(text: str) -> None:
    assert find_sensitive(text) == []


SENSITIVE = [
    {"id": "s1", "instruction": "Who is root@example.org?", "output": "Olena"},
    {"id": "s2", "instruction": "My token?", "output": f"It is {GITHUB}.", "n": 123456789012345678901234567890},
    {"id": "s3", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"{AWS} a@b.io"}]},
]


def test_sensitive_data_is_reported_without_being_repeated(prepare: Prepare) -> None:
    content = lines(*numbered(20), *SENSITIVE)
    dataset = prepare({FIRST: content}, parameters={"sensitive_data": "report"}, range_bytes=64)

    assert dataset.counts.kept == 23
    assert dataset.sensitive_by_kind == {"email_address": 2, "github_token": 1, "aws_access_key": 1}
    assert dataset.masked == 0
    found = records(dataset.findings_path)
    assert [(each["file"], each["line"]) for each in found] == [(FIRST, 21), (FIRST, 22), (FIRST, 23)]
    assert [each["fields"] for each in found] == [
        {"instruction": ["email_address"]},
        {"output": ["github_token"]},
        {"messages[1].content": ["aws_access_key", "email_address"]},
    ]
    assert [json.loads(content[each["offset"] :][: each["length"]])["id"] for each in found] == ["s1", "s2", "s3"]
    assert GITHUB.encode() not in dataset.findings_path.read_bytes()
    assert read_manifest(dataset.path).results["sensitive_by_kind"] == dataset.sensitive_by_kind


def test_masked_records_hold_nothing_sensitive_and_all_else_is_copied_as_it_was(prepare: Prepare) -> None:
    plain = numbered(20)
    content = lines(*plain[:10], *SENSITIVE, *plain[10:])
    dataset = prepare({FIRST: content}, parameters={"sensitive_data": "mask"})

    assert (dataset.counts.kept, dataset.masked) == (23, 3)
    by_id = {record["id"]: record for record in kept(dataset)}
    assert by_id["s1"]["instruction"] == "Who is [EMAIL_ADDRESS]?"
    assert by_id["s2"]["output"] == "It is [GITHUB_TOKEN]."
    assert by_id["s3"]["messages"][1]["content"] == "[AWS_ACCESS_KEY] [EMAIL_ADDRESS]"
    written = b"".join(outputs(dataset))
    assert all(secret.encode() not in written for secret in (GITHUB, AWS, "example.org"))
    assert b'"n":123456789012345678901234567890' in written
    lines_of = [path.read_bytes().splitlines() for path in (dataset.train_path, dataset.eval_path)]
    for side in lines_of:
        order = [json.loads(line)["id"] for line in content.splitlines() if json.loads(line)["id"] in by_id]
        ids = [json.loads(line)["id"] for line in side]
        assert ids == [each for each in order if each in ids]
    assert {line for line in content.splitlines() if b'"id":"r' in line} <= {line for side in lines_of for line in side}


def test_records_that_masking_makes_equal_are_duplicates_and_no_prompt_stands_on_both_sides(prepare: Prepare) -> None:
    same = [{"prompt": f"Who is user{n}@mail.org?", "completion": "Someone"} for n in range(30)]
    answers = [{"prompt": f"Write to user{n}@mail.org", "completion": f"Done {n}"} for n in range(30)]
    content = lines(*numbered(20), *same, *answers)
    dataset = prepare({FIRST: content}, parameters={"sensitive_data": "mask"})

    assert (dataset.counts.kept, dataset.counts.duplicates) == (51, 29)
    assert leaked_prompts(dataset.train_path, dataset.eval_path) == []


def test_a_masked_record_can_still_be_deleted_by_the_content_that_arrived_or_the_masked_one(
    prepare: Prepare, deletion_list: Callable[..., Path]
) -> None:
    files = {FIRST: lines(*numbered(20), *SENSITIVE)}
    clean = {"instruction": "Who is [EMAIL_ADDRESS]?", "output": "Olena"}
    forget = deletion_list(f"content:{content_hash(SENSITIVE[1])}", f"content:{content_hash(clean)}")
    dataset = prepare(files, parameters={"sensitive_data": "mask", "deletion_list": forget})

    assert dataset.counts.removed == 2
    assert {"s1", "s2", "s3"} & {record.get("id") for record in kept(dataset)} == {"s3"}


def test_records_with_sensitive_data_are_rejected_without_showing_it(prepare: Prepare) -> None:
    dataset = prepare({FIRST: lines(*SENSITIVE, *numbered(20))}, parameters={"sensitive_data": "reject"})

    assert (dataset.counts.kept, dataset.counts.rejected) == (20, 3)
    assert dataset.rejects_by_reason == {"sensitive_data": 3}
    [first, *_] = records(dataset.rejects_path)
    assert (first["line"], first["field"], first["head"]) == (1, "instruction", "")
    assert len(records(dataset.findings_path)) == 3
    assert GITHUB.encode() not in b"".join(outputs(dataset))


@pytest.mark.parametrize("mode", ["report", "mask", "reject"])
def test_screening_gives_the_same_bytes_for_any_number_of_workers_and_size_of_ranges(
    prepare: Prepare, layout: DataLayout, deletion_list: Callable[..., Path], mode: str
) -> None:
    rated = [{**record, "quality": n % 5} for n, record in enumerate(numbered(60))]
    files = {
        FIRST: lines(*rated[:30], *({**each, "quality": 4} for each in SENSITIVE)) + b"\xef\xbb\xbf" + lines(rated[5]),
        SECOND: lines(*rated[20:]),
    }
    options = {"sensitive_data": mode, "min_quality": 1, "deletion_list": deletion_list("r7", "r8")}
    results = []
    for workers, range_bytes in ((1, 1 << 20), (1, 97), (2, 400)):
        shutil.rmtree(layout.root / "prepared", ignore_errors=True)
        dataset = prepare(files, parameters=options, workers=workers, range_bytes=range_bytes)
        results.append(outputs(dataset))
        counts = dataset.counts
        assert counts.lines == counts.accounted == sum(content.count(b"\n") for content in files.values())
        assert (counts.removed, counts.filtered > 0, counts.duplicates > 0) == (2, True, True)
    assert results[0] == results[1] == results[2]
