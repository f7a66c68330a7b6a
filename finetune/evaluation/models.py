"""What an evaluation found."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from finetune.publishing import sha256_json


class Answer(BaseModel):
    """One held-out prompt answered greedily by base and adapter."""

    model_config = ConfigDict(frozen=True)

    prompt: str
    reference: str
    base: str
    adapter: str


class ChampionRef(BaseModel):
    """The reigning champion, to be compared on the same held-out records."""

    model_config = ConfigDict(frozen=True)

    version: str
    adapter_path: Path
    adapter_hash: str
    # of the base model that it was trained on
    base_fingerprint: str
    # held-out prompts on which it, or a version that it went on from, was trained
    learned: list[str] = []
    # which of these versions may know others, since their datasets are gone
    unknown: list[str] = []

    @property
    def fingerprint(self) -> str:
        """Equal where a comparison with it is the same comparison."""
        return sha256_json([self.adapter_hash, self.learned, self.unknown])


class ChampionComparison(BaseModel):
    """The candidate against the reigning champion; `delta_vs_champion` is negative when the candidate is better.

    Compared on the held-out records that the champion cannot know; where none is left, the figures are None.
    """

    model_config = ConfigDict(frozen=True)

    version: str
    adapter_hash: str
    champion_loss: float | None = None
    delta_vs_champion: float | None = None
    delta_ci95: tuple[float, float] | None = None
    # of the held-out records that were scored: those whose prompts the champion was trained on
    left_out: int = 0
    # versions of which nobody can tell whether they were
    unknown: list[str] = []
    # `ChampionRef.fingerprint` of what was compared with
    fingerprint: str = ""

    @property
    def caveat(self) -> str:
        """What was not compared and why, and what nobody can tell; empty where there is nothing to say."""
        told = []
        if self.left_out:
            told.append(
                f"left out of the comparison: {self.left_out} of the held-out records, on whose prompts {self.version} "
                "or a version that it went on from, was trained when the split was another one (EVAL_FRACTION)"
            )
        if self.unknown:
            told.append(
                "nobody can tell whether other held-out prompts were trained on: the dataset of "
                f"{', '.join(self.unknown)} is gone or damaged"
            )
        return "; ".join(told)


class Group(BaseModel):
    """Losses of one part of the held-out records: a format, a source, a range of lengths."""

    model_config = ConfigDict(frozen=True)

    name: str
    records: int
    tokens: int
    base_loss: float
    eval_loss: float


class Worsened(BaseModel):
    """A record that the adapter answers worse than the base; `line` counts from 1 in the held-out file."""

    model_config = ConfigDict(frozen=True)

    line: int
    prompt: str
    reference: str
    base_loss: float
    eval_loss: float


class FailedRegression(BaseModel):
    """A fixed prompt whose answer with the adapter is not as expected."""

    model_config = ConfigDict(frozen=True)

    id: str
    prompt: str
    answer: str
    why: str


class TaskScore(BaseModel):
    """A figure of a task of lm-eval, without and with the adapter."""

    model_config = ConfigDict(frozen=True)

    task: str
    metric: str
    base: float
    adapter: float


class EvalReport(BaseModel):
    """Base against adapter on held-out data; losses in nats per token of the assistant's side."""

    model_config = ConfigDict(frozen=True)

    path: Path
    run_id: str
    eval_loss: float
    eval_perplexity: float
    base_loss: float
    base_perplexity: float
    # eval_loss - base_loss: negative when the adapter is better
    delta_vs_base_loss: float
    # bootstrap 95 % confidence interval of the delta over records
    delta_ci95: tuple[float, float]
    token_accuracy: float
    base_token_accuracy: float
    # over the sampled answers whose reference is short
    exact_match: float | None
    base_exact_match: float | None
    records: int
    tokens: int
    seconds: float
    answers: list[Answer]
    chrf: float | None = None
    base_chrf: float | None = None
    # what was compared, so that a decision can tell whether the report speaks of it
    base_fingerprint: str = ""
    adapter_hash: str = ""
    dataset_sha256: str = ""
    # where they lay
    adapter_path: Path | None = None
    dataset: Path | None = None
    champion: ChampionComparison | None = None
    by_format: list[Group] = []
    by_source: list[Group] = []
    by_length: list[Group] = []
    worst: list[Worsened] = []
    # fixed prompts that were put to the adapter, and those that it failed
    regressions: int = 0
    failed_regressions: list[FailedRegression] = []
    tasks: list[TaskScore] = []
    # records that were cut at max_length, and those of which nothing was left to score
    truncated: int = 0
    skipped: int = 0
    reused: bool = False
