"""What an ablation found: figures, verdicts, a sentence of conclusion, and all of it as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from finetune.planning.models import TrialConfig
from finetune.publishing import find_published, publish_directory
from finetune.reproduction.models import ExperimentManifest
from finetune.search.ablation.comparison import Difference, holm, mean_ci95, paired_difference
from finetune.search.ablation.plots import pictures
from finetune.search.ablation.spec import AblationSpec, Arm, Setting, shown, shown_value
from finetune.search.models import StepResult
from finetune.search.page import render_page, write_report

if TYPE_CHECKING:
    from finetune.evaluation.losses import RecordLosses

KIND = "ablation"
REPORT = "report.json"
_INPUTS = ("dataset_fingerprint", "base_model_fingerprint")
# The share of wrong verdicts that is taken, among all comparisons of an ablation together.
SIGNIFICANCE = 0.05
Verdict = Literal["base", "better", "worse", "same", "open", "failed"]


class ArmRun(BaseModel):
    """One training of a configuration and its evaluation, or the reason why there is none.

    `loss` is in nats per token, `gpu_hours` are of one device, CPU or GPU; ``evaluation`` is the report's directory,
    with the SHA-256 of its ``report.json``.
    """

    model_config = ConfigDict(frozen=True)

    seed: int
    run_id: str
    loss: float | None = None
    adapter: Path | None = None
    adapter_hash: str | None = None
    evaluation: Path | None = None
    evaluation_sha256: str | None = None
    gpu_hours: float = 0.0
    reason: str = ""


class ArmFigures(BaseModel):
    """A configuration's row: what `runs` gave, and how it compares with the base configuration.

    `mean` and its Student interval are over the seeds that ended, `difference` is `paired_difference`'s over the runs
    of both configurations, and `p_corrected` its p-value after Holm's correction for all comparisons.
    """

    model_config = ConfigDict(frozen=True)

    changed: dict[str, Setting]
    trial_config: TrialConfig
    runs: list[ArmRun]
    mean: float | None
    ci95: tuple[float, float] | None
    difference: Difference | None = None
    p_corrected: float | None = None
    verdict: Verdict
    note: str = ""

    @property
    def label(self) -> str:
        """As a person reads it."""
        return shown(self.changed)


class AblationResult(BaseModel):
    """All figures of an ablation; `dataset_fingerprint` and the runs' hashes tell what they were made from."""

    model_config = ConfigDict(frozen=True)

    name: str
    spec: AblationSpec
    dataset_fingerprint: str
    dataset_sha256: str
    base_model: str
    base_model_fingerprint: str
    # at which all were measured
    max_length: int
    records: int
    gpu_hours: float
    arms: list[ArmFigures]
    conclusion: str

    @property
    def base(self) -> ArmFigures:
        """The base configuration."""
        return self.arms[0]


def figures_of(
    arms: Sequence[Arm], runs: Sequence[Sequence[ArmRun]], losses: Mapping[str, RecordLosses]
) -> list[ArmFigures]:
    """Every configuration's row, the base configuration's first.

    Args:
        arms: the configurations, the base first.
        runs: of each.
        losses: of every run that ended, by its id, on the same records.
    """
    compared: dict[int, Difference] = {}
    base = runs[0]
    for index, ours in enumerate(runs):
        if index and all(run.loss is not None for run in (*base, *ours)):
            nats, base_nats = (np.array([losses[run.run_id].nats for run in each]) for each in (ours, base))
            compared[index] = paired_difference(nats, base_nats, np.array(losses[base[0].run_id].tokens))
    tested = {index: found.p_value for index, found in compared.items() if found.p_value is not None}
    corrected = dict(zip(tested, holm(list(tested.values())), strict=True))
    rows = []
    for index, (arm, ours) in enumerate(zip(arms, runs, strict=True)):
        ended = [run.loss for run in ours if run.loss is not None]
        verdict, note = _verdict(index, ours, compared.get(index), corrected.get(index))
        rows.append(
            ArmFigures(
                changed=dict(arm.changed),
                trial_config=arm.trial,
                runs=list(ours),
                mean=float(np.mean(ended)) if ended else None,
                ci95=mean_ci95(ended),
                difference=compared.get(index),
                p_corrected=corrected.get(index),
                verdict=verdict,
                note=note,
            )
        )
    return rows


def _verdict(
    index: int, ours: Sequence[ArmRun], found: Difference | None, p_value: float | None
) -> tuple[Verdict, str]:
    if failed := [run for run in ours if run.loss is None]:
        return "failed", f"{len(failed)} of {len(ours)} trainings failed: {failed[0].reason}"
    if index == 0:
        return "base", ""
    if found is None:
        return "open", "the base configuration has no results to compare with"
    if p_value is None:
        return "open", "every seed and record gives the same difference: there is no chance to test against"
    if found.p_value == 1 and found.ci95 == (0, 0):
        return "same", ""
    if p_value >= SIGNIFICANCE:
        return "open", ""
    return ("better" if found.mean < 0 else "worse"), ""


def conclusion_of(spec: AblationSpec, arms: Sequence[ArmFigures]) -> str:
    """The figures in a sentence."""
    base, others = arms[0], arms[1:]
    parts = []
    if base.verdict == "failed":
        parts.append(f"nothing can be told: of the base configuration {base.note}")
    else:
        judged = [arm for arm in others if arm.verdict in ("better", "worse")]
        parts += [_told(arm, base.trial_config) for arm in sorted(judged, key=_by_difference)]
        if same := [arm.label for arm in others if arm.verdict == "same"]:
            parts.append(f"{_and(same)} changed no loss at all")
        if unsure := [arm.label for arm in others if arm.verdict == "open"]:
            parts.append(f"no difference from the base configuration can be told for {_and(unsure)}")
    parts += [f"with {arm.label} {arm.note}" for arm in others if arm.verdict == "failed"]
    return f"{'; '.join(parts)} ({spec.seeds} seeds, corrected for all comparisons)."


def _told(arm: ArmFigures, base: TrialConfig) -> str:
    found = arm.difference
    if found is None or found.ci95 is None or arm.p_corrected is None:
        raise ValueError(f"{arm.label} was not compared")
    low, high = sorted(abs(end) for end in found.ci95)
    than = "the base configuration"
    if len(arm.changed) == 1:
        than = shown_value(getattr(base, next(iter(arm.changed))))
    return (
        f"{arm.label} is {arm.verdict} than {than} by {abs(found.mean):.4g} [{low:.4g}, {high:.4g}] nats per token, "
        f"{shown_p(arm.p_corrected)}"
    )


def _by_difference(arm: ArmFigures) -> float:
    return arm.difference.mean if arm.difference else 0.0


def shown_p(p_value: float) -> str:
    """A p-value as papers print it."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def publish_ablation(directory: Path, result: AblationResult, manifest: ExperimentManifest) -> None:
    """Publish ``report.json``, ``report.html``, pictures and manifest, in the place of an earlier report of the same.

    Raises:
        StorageFullError: the disk is full.
    """
    plots = pictures(result)
    page = render_page(
        "ablation/report.html.jinja",
        plots=plots,
        captions={file: captions_of(file) for file in plots},
        result=result,
        shown=shown,
        shown_value=shown_value,
        shown_p=shown_p,
    )
    with publish_directory(directory, kind=KIND) as staging:
        write_report(staging.path, plots=plots, page=page, result=result, manifest=manifest)
        staging.inputs = dict(zip(_INPUTS, (result.dataset_fingerprint, result.base_model_fingerprint), strict=True))
        staging.parameters = result.spec.model_dump(mode="json")
        staging.results = step_result(result, directory).metadata


def read_ablation(directory: Path, *of: str) -> AblationResult | None:
    """The report that is there already, if it is whole and no training failed: those are tried again.

    Args:
        directory: the ablation's.
        of: fingerprints of the dataset and of the base model.
    """
    published = find_published(directory, kind=KIND, inputs=dict(zip(_INPUTS, of, strict=True)))
    if published is None or published.results["failed_trainings"]:
        return None
    try:
        return AblationResult.model_validate_json((directory / REPORT).read_bytes())
    except ValidationError:
        return None


def captions_of(file: str) -> str:
    """What a picture shows."""
    return f"{file.removesuffix('.png')}: mean held-out loss with its 95 % interval over seeds; each point is a seed"


def step_result(result: AblationResult, directory: Path) -> StepResult:
    """What is handed back: all figures, the report's path, rows to read, and the figures to show."""
    return StepResult(
        data=result.model_dump(mode="json"),
        artifacts=[str(directory / "report.html")],
        output_text="\n".join([*map(_line, result.arms), result.conclusion]),
        metadata={
            "name": result.name,
            "conclusion": result.conclusion,
            "trainings": sum(len(arm.runs) for arm in result.arms),
            "failed_trainings": sum(bool(run.reason) for arm in result.arms for run in arm.runs),
            "gpu_hours_used": result.gpu_hours,
        },
    )


def _line(arm: ArmFigures) -> str:
    mean = "no loss" if arm.mean is None else f"{arm.mean:.4f} {_interval(arm.ci95)}"
    return f"{arm.label}: {mean} {arm.verdict}{': ' if arm.note else ''}{arm.note}"


def rows_of(result: AblationResult) -> list[dict[str, str | int | float | bool | None]]:
    """The table of a person: a row for each configuration."""
    return [
        {
            "configuration": arm.label,
            "mean": arm.mean,
            "ci95": _interval(arm.ci95),
            "difference": arm.difference.mean if arm.difference else None,
            "difference ci95": _interval(arm.difference.ci95 if arm.difference else None),
            "p": arm.p_corrected,
            "verdict": arm.verdict,
            "note": arm.note,
        }
        for arm in result.arms
    ]


def _interval(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"[{ends[0]:.4f}, {ends[1]:.4f}]"
