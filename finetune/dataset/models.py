"""What dataset preparation hands to the steps after it."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict


class Counts(BaseModel):
    """Where every line went: each of them is counted once, and `lines` is the sum of all the others.

    `removed` are on the deletion list, `filtered` are below the quality asked for, `near_duplicates` were dropped.
    """

    model_config = ConfigDict(frozen=True)

    lines: int
    train: int
    eval: int
    duplicates: int
    rejected: int
    blank: int
    removed: int = 0
    filtered: int = 0
    near_duplicates: int = 0

    @property
    def accounted(self) -> int:
        """The sum that must be `lines`."""
        left_out = self.duplicates + self.near_duplicates + self.removed + self.filtered
        return self.kept + left_out + self.rejected + self.blank

    @property
    def kept(self) -> int:
        """Records that training or evaluation will see."""
        return self.train + self.eval


class PreparedDataset(BaseModel):
    """A published directory with ``train.jsonl``, ``eval.jsonl`` and ``rejects.jsonl``."""

    model_config = ConfigDict(frozen=True)

    path: Path
    date: str
    fingerprint: str
    window_dates: list[str]
    counts: Counts
    rejects_by_reason: dict[str, int]
    rejects_by_file: dict[str, int]
    # Kept records of each export.
    records_by_file: dict[str, int] = {}
    # Records in which each kind of sensitive data was found, duplicates included; empty where nobody looked.
    sensitive_by_kind: dict[str, int] = {}
    # Records, duplicates included, that were written anew without their sensitive data.
    masked: int = 0
    # Near-duplicates on one side, dropped or not, and held-out records that are near to one trained on.
    near_duplicates_found: int = 0
    near_leaks: int = 0
    # names, sizes and times of the exports when they were read; empty where nobody asked
    stat_fingerprint: str = ""
    reused: bool = False

    @property
    def train_path(self) -> Path:
        """Training records, one JSON object a line, as they arrived."""
        return self.path / "train.jsonl"

    @property
    def eval_path(self) -> Path:
        """Held-out records."""
        return self.path / "eval.jsonl"

    @property
    def rejects_path(self) -> Path:
        """One JSON object for every rejected line: file, line, offset, length, reason, position, head."""
        return self.path / "rejects.jsonl"

    @property
    def findings_path(self) -> Path:
        """Where sensitive data was looked for: one JSON object a line that held some, without it."""
        return self.path / "findings.jsonl"

    @property
    def near_duplicates_path(self) -> Path:
        """Where near-duplicates were looked for: one JSON object a pair."""
        return self.path / "near_duplicates.jsonl"


class Truncation(BaseModel):
    """What a `max_length` would cut."""

    model_config = ConfigDict(frozen=True)

    max_length: int
    records: int
    record_share: float
    token_share: float


class LongestRecord(BaseModel):
    """One of the longest records: where it stands (``file:line``), its own id if it has one, its tokens."""

    model_config = ConfigDict(frozen=True)

    where: str
    id: str | None
    tokens: int


class DatasetProfile(BaseModel):
    """Counts, columns and exact token statistics of a dataset.

    `percentiles` are lengths that occur; `script_shares` are of letters; `trained_token_share` is of
    tokens that the loss counts; `rejected` lines or rows are no records, and in no other figure.

    `tokens_differ_at_most` holds with 95 % confidence if the records that were compared, the first ones, are like
    the others (rule of three: Hanley and Lippman-Hand 1983).
    """

    model_config = ConfigDict(frozen=True)

    total_samples: int
    format_detected: str
    has_instruction: bool
    has_output: bool
    avg_tokens: float | None
    max_tokens: int | None
    columns: list[str]
    duplicates_found: int
    percentiles: dict[str, int] = {}
    # (from, below, records)
    histogram: list[tuple[int, int, int]] = []
    truncation: list[Truncation] = []
    script_shares: dict[str, float] = {}
    records_per_file: dict[str, int] = {}
    record_formats: dict[str, int] = {}
    total_tokens: int | None = None
    trained_token_share: float | None = None
    tokenizer: str | None = None
    # Which implementation counted: tiktoken once it agreed with tokenizers on the sample, else tokenizers.
    tokenized_by: str | None = None
    # Records on which the two agreed, and how large a share of all could have other tokens nevertheless.
    tokens_compared: int | None = None
    tokens_differ_at_most: float | None = None
    rejected: int = 0
    longest: list[LongestRecord] = []
