"""Which dates are chosen; how a date's state is read is tested on the real graph in tests/e2e."""

import pytest

from lora_assets.freshness import DateState, choose_dates


def state(date: str, kind: str) -> DateState:
    return DateState.model_validate({"date": date, "state": kind, "reason": "", "files": 1, "size": 1})


STATES = [
    state("2026-06-01", "stale"),
    state("2026-06-02", "missing"),
    state("2026-06-03", "stale"),
    state("2026-06-04", "current"),
]


def test_by_default_all_missing_dates_and_the_newest_stale_one_are_made() -> None:
    assert choose_dates(STATES) == ["2026-06-02", "2026-06-03"]


def test_every_stale_date_is_made_on_request() -> None:
    assert choose_dates(STATES, every=True) == ["2026-06-01", "2026-06-02", "2026-06-03"]


@pytest.mark.parametrize("every", [True, False])
def test_the_latest_date_is_left_alone_when_it_is_current(every: bool) -> None:
    assert choose_dates(STATES, latest=True, every=every) == []
    assert choose_dates(STATES[:3], latest=True, every=every) == ["2026-06-03"]
