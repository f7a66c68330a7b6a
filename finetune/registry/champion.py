"""Champion or challenger: a pure decision from an evaluation.

A candidate becomes champion if

1. it beats its base model: the whole 95 % confidence interval of the change in loss lies below zero by at least
   the least gain, so that a difference that is real but of no use to anyone changes nothing;
2. and it answers every regression prompt as expected;
3. and it beats the reigning champion in the same way, on the same held-out records: those whose prompts the champion
   was not trained on, which may be fewer than all if more is held out now than was then.

What cannot be compared is not promoted: an adapter on another base model than the champion's (their
losses per token mean different things), a report made against an earlier champion, or one over a handful of
records. They stay challengers, and a person may promote them.
"""

from __future__ import annotations

from pathlib import Path

from finetune.dataset.models import PreparedDataset
from finetune.errors import ArtifactError
from finetune.evaluation.models import ChampionRef, EvalReport
from finetune.layout import DataLayout
from finetune.registry.history import read_events, reigns
from finetune.registry.learned import datasets_behind, learned_prompts
from finetune.registry.models import Decision, RegisteredVersion
from finetune.registry.promotion import champion
from finetune.registry.store import get_version

# Of fewer records, even a gain on every one of them may be chance (two-sided sign test: 2 * 2^-5 = 0.06), and the
# bootstrap's interval over a single one has no width at all.
LEAST_RECORDS = 6


def rival_on(dataset: PreparedDataset, layout: DataLayout) -> ChampionRef | None:
    """The reigning champion, to be compared on what the dataset holds out, or None before the first promotion.

    Args:
        dataset: the candidate's.
        layout: where registry and datasets lie.

    Raises:
        ArtifactError: the history was altered, or what `as_rival` reads.
        DatasetError: a line of a dataset is no record.
    """
    reigning = champion(layout.registry)
    return None if reigning is None else as_rival(reigning, dataset, layout)


def as_rival(reigning: RegisteredVersion, dataset: PreparedDataset, layout: DataLayout) -> ChampionRef:
    """A champion, and what it has learned of that which the dataset holds out.

    Args:
        reigning: the champion.
        dataset: what it is evaluated on.
        layout: where registry and datasets lie.

    Raises:
        ArtifactError: the manifest of a version that it went on from, or one of the datasets' was altered.
        DatasetError: a line of a dataset is no record.
    """
    learned: list[str] = []
    unknown: list[str] = []
    for version, known in datasets_behind(reigning, layout):
        if known is None:
            unknown.append(version.version)
        else:
            learned += learned_prompts(known, dataset)
    return ChampionRef(
        version=reigning.version,
        adapter_path=reigning.stored_path,
        adapter_hash=reigning.adapter_hash,
        base_fingerprint=reigning.base_fingerprint or "",
        learned=learned,
        unknown=unknown,
    )


def champion_before(registry: Path, date: str) -> RegisteredVersion | None:
    """The last to reign of the versions that were trained on a date before this one, or None.

    Neither a date's own version counts, so that a date that is made again starts where it started, nor those of later
    dates, which know what the date must not.

    Args:
        registry: the registry's directory.
        date: an ISO date.

    Raises:
        ArtifactError: the history or a version's manifest was altered.
    """
    for name in reversed(reigns(read_events(registry))):
        version = get_version(registry, name)
        if str(version.lineage.get("date", "")) < date:
            return version
    return None


def decide(
    report: EvalReport, reigning: RegisteredVersion | None, *, adapter_hash: str, min_gain: float = 0.0
) -> Decision:
    """Whether the evaluated adapter becomes champion.

    Args:
        report: its evaluation.
        reigning: the version that reigns now, if any.
        adapter_hash: the candidate's.
        min_gain: by how much its loss must be lower, in nats per token, at the worse end of the interval.

    Raises:
        ArtifactError: the report speaks of another adapter.
    """
    if report.adapter_hash != adapter_hash:
        raise ArtifactError(
            f"the evaluation is of the adapter {report.adapter_hash[:12]}, not of {adapter_hash[:12]}",
            where=report.path,
            remedy="Evaluate the adapter again",
        )
    against = None if reigning is None else reigning.version

    def decision(champion: bool, reason: str) -> Decision:
        return Decision(champion=champion, reason=reason, against=against)

    if reigning is not None and reigning.adapter_hash == adapter_hash:
        return decision(True, f"it is the reigning champion {against} itself")
    on_base = _comparison("the base model", report.base_loss, report.eval_loss, report.delta_ci95)
    if fault := _fault(report, on_base, min_gain):
        return decision(False, fault)
    if reigning is None:
        return decision(True, f"the first champion: better than {on_base}")
    if reigning.base_fingerprint != report.base_fingerprint:
        return decision(
            False,
            f"better than {on_base}; but the champion {against} was trained on another base model, "
            "with which its loss cannot be compared: promote it by hand if it shall take its place",
        )
    rival = report.champion
    if rival is None or rival.adapter_hash != reigning.adapter_hash:
        return decision(
            False,
            f"better than {on_base}; but it was not compared with the champion {against}, "
            "which was promoted after the evaluation: evaluate it again",
        )
    compared = report.records - rival.left_out
    caveat = f"; {rival.caveat}" if rival.caveat else ""
    theirs, change, interval = rival.champion_loss, rival.delta_vs_champion, rival.delta_ci95
    if compared < LEAST_RECORDS or theirs is None or change is None or interval is None:
        return decision(
            False,
            f"better than {on_base}; but only {compared} held-out records are left to compare it with the champion "
            f"{against}, and it takes {LEAST_RECORDS} to show a difference: promote it by hand if it shall take its "
            f"place{caveat}",
        )
    on_champion = _comparison(f"the champion {against}", theirs, theirs + change, interval) + caveat
    if not _is_gain(interval, min_gain):
        return decision(False, f"not shown to be better{_by(min_gain)} than {on_champion}")
    return decision(True, f"better than {on_champion}")


def _fault(report: EvalReport, on_base: str, min_gain: float) -> str | None:
    """Why the adapter would not reign even if nobody did, or None."""
    if report.records < LEAST_RECORDS:
        return f"only {report.records} held-out records: it takes {LEAST_RECORDS} to show a difference"
    if not _is_gain(report.delta_ci95, min_gain):
        return f"not shown to be better{_by(min_gain)} than {on_base}"
    if report.failed_regressions:
        failed = ", ".join(f"{case.id} ({case.why})" for case in report.failed_regressions[:3])
        count = f"{len(report.failed_regressions)} of {report.regressions}"
        return f"better than {on_base}; but it fails {count} regression prompts, such as {failed}"
    return None


def _is_gain(interval: tuple[float, float], min_gain: float) -> bool:
    return interval[1] < 0 and interval[1] <= -min_gain


def _by(min_gain: float) -> str:
    return f" by at least {min_gain:g} nats per token" if min_gain else ""


def _comparison(rival: str, before: float, after: float, interval: tuple[float, float]) -> str:
    return (
        f"{rival}: loss {before:.4f} -> {after:.4f}, a change of {after - before:+.4f} nats per token "
        f"(95 % confidence interval {interval[0]:+.4f} to {interval[1]:+.4f})"
    )
