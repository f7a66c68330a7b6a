"""Records that are nearly the same: found, compared in full, told with their place, and dropped if asked for."""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from finetune.dataset import near
from finetune.dataset.models import PreparedDataset
from finetune.dataset.near import BANDS, NearDuplicate, bands, find_near_duplicates, jaccard, shingles
from finetune.layout import DataLayout

Prepare = Callable[..., PreparedDataset]
FIRST, SECOND = "brain_dataset_2026-06-01.jsonl", "brain_dataset_2026-06-02.jsonl"
WORDS = [f"слово{n}" if n % 2 else f"word{n}" for n in range(400)]


def lines(*records: dict[str, Any]) -> bytes:
    return b"".join(orjson.dumps(record) + b"\n" for record in records)


def read(*paths: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for path in paths for line in path.read_bytes().splitlines()]


def corpus(seed: int, originals: int = 40) -> list[dict[str, Any]]:
    """Records of 60 words; of every third one there are copies with 1, 3 or 15 words changed."""
    chance = random.Random(seed)
    found = []
    for number in range(originals):
        words = chance.choices(WORDS, k=60)
        found.append(words)
        if number % 3 == 0:
            for changes in (1, 3, 15):
                copy = list(words)
                for place in chance.sample(range(60), changes):
                    copy[place] = chance.choice(WORDS)
                found.append(copy)
    chance.shuffle(found)
    return [{"id": number, "text": " ".join(words)} for number, words in enumerate(found)]


def brute_force(
    sets: list[frozenset[str]], in_eval: list[bool], threshold: float, drop: bool
) -> tuple[dict[int, int], set[int]]:
    """Copies with what they are copies of, and held-out records that are near to one trained on."""
    copies: dict[int, int] = {}
    for record, other in itertools.product(range(len(sets)), repeat=2):
        compared = other < record and in_eval[record] == in_eval[other] and not {record, other} & copies.keys()
        if compared and jaccard(sets[record], sets[other]) >= threshold:
            copies[record] = other
    stay = [record for record in range(len(sets)) if not (drop and record in copies)]
    leaked = {
        record
        for record, other in itertools.product(stay, repeat=2)
        if in_eval[record] and not in_eval[other] and jaccard(sets[record], sets[other]) >= threshold
    }
    return copies, leaked


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_what_is_found_is_what_a_comparison_of_all_with_all_finds(seed: int, drop: bool) -> None:
    sets = [shingles([("text", record["text"])]) for record in corpus(seed)]
    chance = random.Random(seed)
    in_eval = [chance.random() < 0.4 for _ in sets]
    hashes = np.frombuffer(b"".join(map(bands, sets)), "<u8").reshape(-1, BANDS)

    found = find_near_duplicates(
        [hashes[:30], hashes[30:]],
        np.ones(len(sets), np.bool_),
        np.array(in_eval),
        sets.__getitem__,
        threshold=0.8,
        drop=drop,
    )

    copies, leaked = brute_force(sets, in_eval, 0.8, drop)
    assert copies
    assert leaked
    assert {pair.record: pair.other for pair in found if not pair.across} == copies
    assert {pair.record for pair in found if pair.across} == leaked
    assert all(pair.similarity == jaccard(sets[pair.record], sets[pair.other]) for pair in found)
    assert not any(in_eval[pair.other] for pair in found if pair.across)


def test_records_that_do_not_count_are_near_to_nothing() -> None:
    sets = [frozenset({"a b c", "b c d"})] * 3
    hashes = np.frombuffer(b"".join(map(bands, sets)), "<u8").reshape(-1, BANDS)
    kept, held = np.array([False, True, True]), np.zeros(3, np.bool_)
    assert find_near_duplicates([hashes], kept, held, sets.__getitem__, threshold=1, drop=True) == [
        NearDuplicate(2, 1, 1.0, across=False)
    ]


@pytest.mark.parametrize("drop", [False, True])
def test_a_record_that_was_dropped_leaks_nothing(drop: bool) -> None:
    sets = [frozenset({"a b c", "b c d"})] * 3
    hashes = np.frombuffer(b"".join(map(bands, sets)), "<u8").reshape(-1, BANDS)
    found = find_near_duplicates(
        [hashes], np.ones(3, np.bool_), np.array([False, True, True]), sets.__getitem__, threshold=1, drop=drop
    )
    leaks = [(1, 0)] if drop else [(1, 0), (2, 0)]
    assert [(pair.record, pair.other) for pair in found if pair.across] == leaks
    assert [(pair.record, pair.other) for pair in found if not pair.across] == [(2, 1)]


def test_records_of_one_template_are_not_all_compared_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def count(*pair: frozenset[str]) -> float:
        compared.append(pair)
        return jaccard(*pair)

    monkeypatch.setattr(near, "jaccard", count)
    size = 400
    sets = [frozenset({str(number)}) for number in range(size)]
    hashes = np.arange(size * BANDS, dtype=np.uint64).reshape(-1, BANDS)
    hashes[:, 3] = 1 << 40
    everyone, held = np.ones(size, np.bool_), np.zeros(size, np.bool_)

    assert find_near_duplicates([hashes], everyone, held, sets.__getitem__, threshold=0.8, drop=False) == []
    assert len(compared) == 100 * (size - 100) + 100 * 99 / 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One, TWO three: four!", {"one two three", "two three four"}),
        ("Straße два", {"strasse два"}),
        ("e\u0301te\u0301", {"été"}),
        ("?!", {"?!"}),
    ],
)
def test_shingles_are_three_words_without_case_and_punctuation(text: str, expected: set[str]) -> None:
    assert shingles([("user", text)]) == expected


def test_report_tells_every_pair_and_drops_nothing(prepare: Prepare) -> None:
    records = corpus(7)
    content = {FIRST: lines(*records[:40]), SECOND: lines(*records[40:])}
    plain, reported = prepare(content), prepare(content, parameters={"near_duplicates": "report"})

    assert reported.train_path.read_bytes() == plain.train_path.read_bytes()
    assert reported.eval_path.read_bytes() == plain.eval_path.read_bytes()
    pairs = read(reported.near_duplicates_path)
    relations = [pair["relation"] for pair in pairs]
    assert reported.near_duplicates_found == relations.count("same side") > 0
    assert reported.near_leaks == relations.count("held out and trained on") > 0
    assert reported.counts.near_duplicates == 0

    def at(place: dict[str, Any]) -> dict[str, Any]:
        record: dict[str, Any] = orjson.loads(content[place["file"]][place["offset"] :][: place["length"]])
        return record

    held, trained = read(plain.eval_path), read(plain.train_path)
    for pair in pairs:
        record, other = at(pair), at(pair["near"])
        similarity = jaccard(shingles([("text", record["text"])]), shingles([("text", other["text"])]))
        assert pair["similarity"] == round(similarity, 4) >= 0.8
        if pair["relation"] == "held out and trained on":
            assert record in held
            assert other in trained


def test_drop_keeps_the_first_of_each_side_and_counts_the_others(prepare: Prepare) -> None:
    records = corpus(7)
    content = {FIRST: lines(*records) + lines(records[0])}
    reported = prepare(content, parameters={"near_duplicates": "report"})
    dropped = prepare(content, parameters={"near_duplicates": "drop"})

    counts = dropped.counts
    assert counts.near_duplicates == dropped.near_duplicates_found == reported.near_duplicates_found > 0
    assert counts.duplicates == 1
    assert counts.lines == counts.accounted == counts.kept + counts.near_duplicates + 1
    for path in (dropped.train_path, dropped.eval_path):
        sets = [shingles([("text", record["text"])]) for record in read(path)]
        assert all(jaccard(*pair) < 0.8 for pair in itertools.combinations(sets, 2))
    # Between the sides they are told of, and stay.
    assert dropped.near_leaks > 0


def test_a_masked_record_is_compared_as_it_is_now(prepare: Prepare) -> None:
    words = " ".join(WORDS[:12])
    records = [{"text": f"user{n}@mail.org {words} user{n}@mail.org"} for n in range(2)]
    others = [{"text": f"{n} " + " ".join(WORDS[20 + n : 40 + n : 2])} for n in range(20)]
    options = {"near_duplicates": "report", "near_threshold": 0.9, "salt": "1"}
    content = {FIRST: lines({**records[0], "x": 1}, *others, {"text": records[1]["text"] + "!"})}

    assert prepare(content, parameters=options).near_duplicates_found == 0
    masked = prepare(content, parameters={**options, "sensitive_data": "mask"})
    assert masked.near_duplicates_found + masked.near_leaks == 1


def test_near_duplicates_are_the_same_for_any_number_of_workers_and_size_of_ranges(
    prepare: Prepare, layout: DataLayout
) -> None:
    records = corpus(3)
    content = {FIRST: lines(*records[:30]), SECOND: lines(*records[30:])}
    results = []
    for workers, range_bytes in ((1, 1 << 20), (2, 500)):
        shutil.rmtree(layout.root / "prepared", ignore_errors=True)
        options = {"near_duplicates": "drop"}
        dataset = prepare(content, parameters=options, workers=workers, range_bytes=range_bytes)
        results.append([path.read_bytes() for path in sorted(dataset.path.iterdir()) if path.suffix == ".jsonl"])
    assert results[0] == results[1]
