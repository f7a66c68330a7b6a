"""Who reigns, and the history of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from finetune.errors import ArtifactError
from finetune.registry.history import read_events
from finetune.registry.models import Decision, RegisteredVersion
from finetune.registry.promotion import CHAMPION_POINTER, champion, promote, rebuild, rollback, settle
from finetune.registry.store import get_version


@pytest.fixture
def three(
    registry: Path,
    tmp_path: Path,
    make_adapter: Callable[..., Path],
    register: Callable[..., RegisteredVersion],
) -> Path:
    """A registry of three versions, none of which reigns."""
    for number in range(3):
        register(registry, make_adapter(tmp_path / f"adapter-{number}", seed=number))
    return registry


def pointer(registry: Path) -> str:
    return str(json.loads((registry / CHAMPION_POINTER).read_text(encoding="utf-8"))["version"])


def test_nobody_reigns_in_an_empty_registry(registry: Path) -> None:
    assert champion(registry) is None


def test_promotion_and_rollback_are_kept_in_the_history(three: Path) -> None:
    for version in ("v1", "v2", "v3"):
        promote(three, version, reason=f"{version} is better", by="anna")
    assert pointer(three) == "v3"
    assert rollback(three, reason="v3 answers rudely", by="boris").version == "v2"
    assert rollback(three, reason="v2 too", by="boris").version == "v1"
    reigning = champion(three)
    assert reigning is not None
    assert (reigning.version, reigning.status, reigning.reason) == ("v1", "champion", "v2 too")
    assert pointer(three) == "v1"
    assert get_version(three, "v3").status == "retired"
    assert "v3 answers rudely" in get_version(three, "v3").reason
    told = [(event.action, event.version, event.replaced, event.by) for event in read_events(three)]
    assert told == [
        ("promote", "v1", None, "anna"),
        ("promote", "v2", "v1", "anna"),
        ("promote", "v3", "v2", "anna"),
        ("rollback", "v2", "v3", "boris"),
        ("rollback", "v1", "v2", "boris"),
    ]
    with pytest.raises(ArtifactError, match="nothing to roll back to"):
        rollback(three, reason="further", by="boris")


def test_promoting_the_champion_again_adds_nothing(three: Path) -> None:
    promote(three, "v1", reason="first", by="anna")
    promote(three, "v1", reason="again", by="anna")
    assert len(read_events(three)) == 1


def test_a_refusal_is_noted_once_with_its_reason(three: Path) -> None:
    decision = Decision(champion=False, reason="not shown to be better", against=None)
    for _ in range(2):
        kept = settle(three, "v2", decision, by="run-2")
    assert (kept.status, kept.reason) == ("challenger", "not shown to be better")
    assert champion(three) is None
    assert len(read_events(three)) == 1


def test_a_version_that_was_rolled_back_returns_by_hand_only(three: Path) -> None:
    settle(three, "v1", Decision(champion=True, reason="first", against=None), by="run-1")
    better = Decision(champion=True, reason="better", against="v1")
    assert settle(three, "v2", better, by="run-2").status == "champion"
    rollback(three, reason="answers rudely", by="boris")
    kept = settle(three, "v2", better, by="run-2")
    assert kept.status == "retired"
    assert "v1 took its place by rollback (answers rudely)" in kept.reason
    assert settle(three, "v2", better, by="run-2") == kept
    assert promote(three, "v2", reason="it was the prompt", by="boris").status == "champion"


def test_a_version_that_was_outdone_does_not_return_by_running_its_date_again(three: Path) -> None:
    settle(three, "v1", Decision(champion=True, reason="first", against=None), by="run-1")
    settle(three, "v2", Decision(champion=True, reason="better", against="v1"), by="run-2")
    kept = settle(three, "v1", Decision(champion=True, reason="better on its own date", against="v2"), by="run-3")
    assert kept.status == "retired"
    assert "only a person promotes it again" in kept.reason


def test_a_decision_against_a_champion_that_no_longer_reigns_is_not_carried_out(three: Path) -> None:
    promote(three, "v1", reason="first", by="anna")
    promote(three, "v2", reason="second", by="anna")
    kept = settle(three, "v3", Decision(champion=True, reason="better", against="v1"), by="run-3")
    assert kept.status == "challenger"
    assert "compared with v1 while v2 reigns" in kept.reason


def test_the_pointer_is_rebuilt_from_the_history(three: Path) -> None:
    promote(three, "v2", reason="first", by="anna")
    (three / CHAMPION_POINTER).write_text("{}", encoding="utf-8")
    assert [version.status for version in rebuild(three)] == ["challenger", "champion", "challenger"]
    assert pointer(three) == "v2"


def test_a_missing_or_altered_entry_of_the_history_is_an_error(three: Path) -> None:
    for version in ("v1", "v2"):
        promote(three, version, reason="better", by="anna")
    first = three / "history" / "000001.json"
    whole = first.read_bytes()
    first.write_bytes(whole[:-20])
    with pytest.raises(ArtifactError, match="unreadable entry"):
        champion(three)
    first.unlink()
    with pytest.raises(ArtifactError, match=r"entry 1 .* is missing"):
        champion(three)


def test_an_event_whose_link_was_made_though_the_answer_was_lost_is_kept(
    three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def answer_lost(source: Path, target: Path) -> None:
        link(source, target)
        lost.append(target)
        raise FileExistsError(str(target))

    lost: list[Path] = []
    monkeypatch.setattr(os, "link", answer_lost)
    assert promote(three, "v1", reason="first", by="anna").status == "champion"
    assert len(lost) == len(read_events(three)) == 1


PROMOTER = """
import sys
from itertools import pairwise
from pathlib import Path
from finetune.registry.promotion import promote

for turn in range(6):
    promote(Path(sys.argv[1]), f"v{turn % 3 + 1}", reason="better", by=sys.argv[2])
"""


def test_promotions_at_once_agree_on_one_order(three: Path) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", PROMOTER, str(three), str(number)]) for number in range(6)]
    assert [process.wait(timeout=120) for process in processes] == [0] * 6
    events = read_events(three)
    assert [event.number for event in events] == list(range(1, len(events) + 1))
    for before, after in pairwise(events):
        assert after.replaced == before.version
    assert pointer(three) == events[-1].version
    assert [path.name for path in (three / "history").iterdir() if path.name.startswith(".")] == []
