"""What the arrival sensor decides, as a table of what comes and as properties of any sequence of ticks."""

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.dataset.discovery import DONE, ExportFile, Listing, date_in_name, stat_fingerprint
from sensors.arrivals import MAX_DATES, MAX_WATCHED, Completeness, Cursor, Decision, decide, told

DATE = "2026-06-01"


def listing(
    files: dict[str, int], *, done: dict[str, int] | None = None, unreadable: str = "", broken: str = ""
) -> Listing:
    """Files by date or name, with their time; a marker's time by the same."""

    def named(key: str) -> str:
        return key if key.endswith(".jsonl") else f"brain_dataset_{key}.jsonl"

    found = [
        ExportFile(
            directory=Path("/exports"),
            name=named(key),
            date=date_in_name(key) or DATE,
            size=10,
            mtime_ns=time,
        )
        for key, time in files.items()
    ]
    return Listing(
        sorted(found, key=lambda file: (file.date, file.name)),
        unreadable={named(unreadable): "not allowed"} if unreadable else {},
        broken={named(broken): "too many links"} if broken else {},
        done={named(key): time for key, time in (done or {}).items()},
    )


def ticks(*listings: Listing, complete: Completeness = "still", limit: int = 20) -> list[Decision]:
    """Decide one tick after the other; the cursor travels as text, as in Dagster."""
    text, decisions = None, []
    for each in listings:
        decisions.append(decide(Cursor.decode(text), each, complete=complete, limit=limit))
        text = decisions[-1].cursor.encode()
    return decisions


def asked(decisions: list[Decision]) -> list[list[str]]:
    return [[ready.date for ready in decision.ready] for decision in decisions]


ONE = listing({DATE: 1})
CASES: dict[str, tuple[list[Listing], Completeness, list[list[str]]]] = {
    "a new file waits for the second look": ([ONE, ONE, ONE], "still", [[], [DATE], []]),
    "one that grows waits until it stands still": (
        [ONE, listing({DATE: 2}), listing({DATE: 3}), listing({DATE: 3})],
        "still",
        [[], [], [], [DATE]],
    ),
    "a changed file is asked for again, once": (
        [ONE, ONE, listing({DATE: 2}), listing({DATE: 2}), listing({DATE: 2})],
        "still",
        [[], [DATE], [], [DATE], []],
    ),
    "a second file of the date makes it new": (
        [ONE, ONE, *[listing({DATE: 1, f"{DATE}_b": 1})] * 2],
        "still",
        [[], [DATE], [], [DATE]],
    ),
    "a late date is asked for by itself": (
        [ONE, ONE, *[listing({DATE: 1, "2026-05-01": 9})] * 2],
        "still",
        [[], [DATE], [], ["2026-05-01"]],
    ),
    "a marker vouches at first sight": ([listing({DATE: 1}, done={DATE: 1})], "still", [[DATE]]),
    "a marker older than its file is of another file": (
        [listing({DATE: 2}, done={DATE: 1})] * 2,
        "still",
        [[], [DATE]],
    ),
    "of two files the one without a marker decides": (
        [
            listing({DATE: 1, f"{DATE}_b": 1}, done={DATE: 1}),
            listing({DATE: 1, f"{DATE}_b": 2}, done={DATE: 1}),
            listing({DATE: 1, f"{DATE}_b": 2}, done={DATE: 1}),
        ],
        "still",
        [[], [], [DATE]],
    ),
    "where markers are the rule, standing still is not enough": (
        [ONE, ONE, ONE, listing({DATE: 1}, done={DATE: 5})],
        "marker",
        [[], [], [], [DATE]],
    ),
    "a file that was renamed into place is complete": ([ONE, ONE, listing({DATE: 2})], "rename", [[DATE], [], [DATE]]),
    "an unreadable file holds its date back, not the others": (
        [listing({DATE: 1, "2026-06-02": 1}, unreadable=DATE)] * 2 + [listing({DATE: 1, "2026-06-02": 1})] * 2,
        "still",
        [[], ["2026-06-02"], [], [DATE]],
    ),
    "a broken file holds its date back, not the others": (
        [listing({f"{DATE}_b": 1, "2026-06-02": 1}, broken=DATE)] * 2,
        "still",
        [[], ["2026-06-02"]],
    ),
    "a date whose files are gone is asked for when it returns": (
        [listing({DATE: 1, "2026-06-02": 1})] * 2
        + [listing({"2026-06-02": 1})]
        + [listing({DATE: 1, "2026-06-02": 1})] * 2,
        "still",
        [[], ["2026-06-02", DATE], [], [], [DATE]],
    ),
    "a volume that is away for a while changes nothing": (
        [ONE, ONE, listing({}), ONE, ONE],
        "still",
        [[], [DATE], [], [], []],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_comes_and_what_is_asked_for(case: str) -> None:
    listings, complete, expected = CASES[case]
    assert asked(ticks(*listings, complete=complete)) == expected


def test_why_a_date_waits_is_told() -> None:
    [new] = ticks(ONE)
    assert new.waiting == {DATE: "new or still being written"}
    [held] = ticks(listing({DATE: 1}, unreadable=DATE))
    assert held.waiting == {DATE: f"brain_dataset_{DATE}.jsonl cannot be read: not allowed"}
    [unmarked] = ticks(ONE, complete="marker")
    assert "has no marker .done" in unmarked.waiting[DATE]
    [nameless] = ticks(listing({"2026-06-02": 1}, broken="brain_dataset_x.jsonl"))
    assert "too many links" in nameless.waiting["brain_dataset_x.jsonl"]
    assert len(told({str(n): "" for n in range(1000)})) == 21


def test_a_date_whose_files_are_gone_is_told_once() -> None:
    both, one = listing({DATE: 1, "2026-06-02": 1}), listing({"2026-06-02": 1})
    assert [decision.vanished for decision in ticks(both, both, one, one)] == [[], [], [DATE], []]


def test_a_broken_file_is_not_taken_for_a_deleted_one() -> None:
    both = listing({DATE: 1, "2026-06-02": 1})
    *_, broken, back = ticks(both, both, listing({"2026-06-02": 1}, broken=DATE), both)
    assert (broken.vanished, back.ready) == ([], [])


def test_an_empty_directory_where_dates_were_is_told_and_forgets_none() -> None:
    *_, empty, back = ticks(ONE, ONE, listing({}), ONE)
    assert empty.emptied
    assert not empty.vanished
    assert not back.ready


def test_many_at_once_are_asked_for_in_batches_the_newest_first() -> None:
    many = listing({f"2026-06-{day:02d}": 1 for day in range(1, 31)})
    first, second, third, fourth = asked(ticks(*[many] * 4, limit=20))
    assert (first, fourth) == ([], [])
    assert second == [f"2026-06-{day:02d}" for day in range(30, 10, -1)]
    assert third == [f"2026-06-{day:02d}" for day in range(10, 0, -1)]


def test_the_run_key_is_of_all_files_of_the_date() -> None:
    both = listing({DATE: 1, f"{DATE}_b": 1}, done={DATE: 1})
    ready = ticks(both, both)[1].ready[0]
    assert ready.fingerprint == stat_fingerprint(both.files)


@pytest.mark.parametrize("text", [None, "", "no cursor", '{"seen": {"2026-06-01": "a"}}', "eJxLAAAAAAA="])
def test_a_cursor_that_cannot_be_read_counts_as_none(text: str | None) -> None:
    assert Cursor.decode(text) == Cursor()


def test_the_cursor_stays_below_64_kilobytes_whatever_comes() -> None:
    chance = random.Random(0)

    def digests(count: int) -> dict[str, str]:
        dates = [f"{2000 + n // 336:04d}-{n // 28 % 12 + 1:02d}-{n % 28 + 1:02d}" for n in range(count)]
        return {date: f"{chance.getrandbits(48):012x}" for date in dates}

    full = Cursor(requested=digests(MAX_DATES), watched=digests(MAX_WATCHED))
    assert len(full.requested) == MAX_DATES
    assert len(full.encode()) < 64_000
    century = listing(dict.fromkeys(digests(33000), 1))
    assert len(century.files) == 33_000
    first, second = ticks(century, century)
    assert first.forgotten == 33_000 - MAX_DATES
    assert len(second.ready) == 20
    assert len(second.cursor.watched) <= MAX_WATCHED


def test_dates_too_old_to_be_remembered_are_not_asked_for_again_and_again() -> None:
    from datetime import date, timedelta

    days = [(date(2005, 1, 1) + timedelta(days=n)).isoformat() for n in range(MAX_DATES + 3)]
    known = Cursor(requested={day: stat_fingerprint(listing({day: 1}).files)[:12] for day in days[3:]})
    decision = decide(known, listing(dict.fromkeys(days, 1)), complete="rename", limit=20)
    assert (decision.forgotten, decision.ready, decision.vanished) == (3, [], [])
    assert decision.cursor == known


STATES = st.dictionaries(st.sampled_from([f"2026-06-{day:02d}" for day in range(1, 9)]), st.integers(1, 3), max_size=8)


@settings(max_examples=150, deadline=None)
@given(st.lists(STATES, max_size=8), STATES.filter(bool), st.integers(1, 4))
def test_whatever_came_before_each_date_that_is_left_is_asked_for_as_it_is(
    past: list[dict[str, int]], last: dict[str, int], limit: int
) -> None:
    settle = [listing(last)] * (2 + len(last))
    decisions = ticks(*(listing(state) for state in past), *settle, limit=limit)
    final = {date: stat_fingerprint(listing({date: time}).files) for date, time in last.items()}
    newest = {ready.date: ready.fingerprint for decision in decisions for ready in decision.ready}
    assert newest.items() >= final.items()
    assert not decisions[-1].ready, "what is settled is asked for no more"
    assert all(len(decision.ready) <= limit for decision in decisions)


@settings(max_examples=150, deadline=None)
@given(st.lists(STATES, min_size=1, max_size=10))
def test_only_what_stood_still_for_two_ticks_is_asked_for_and_in_a_row_never_twice(past: list[dict[str, int]]) -> None:
    before: dict[str, int] = {}
    last: dict[str, str] = {}
    for state, decision in zip(past, ticks(*(listing(state) for state in past)), strict=True):
        for ready in decision.ready:
            assert ready.date in before
            assert last.get(ready.date) != ready.fingerprint
        # A volume that is away leaves what was seen before it went.
        before = state if state or not last else before
        last = {date: f for date, f in last.items() if date in state or not state}
        last |= {ready.date: ready.fingerprint for ready in decision.ready}


def test_a_marker_ends_with_what_the_documentation_says() -> None:
    assert DONE == ".done"
