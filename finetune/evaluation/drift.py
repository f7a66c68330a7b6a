"""Whether the champion still answers as well as when it was made: its loss on held-out data that arrived since."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import orjson
from pydantic import BaseModel, ConfigDict
from xxhash import xxh3_128_digest

from finetune.base_model.models import BaseModelRef
from finetune.chat.encode import RecordEncoder
from finetune.dataset.normalization import content_key, normalized
from finetune.dataset.rules import checked_turns
from finetune.errors import ArtifactError, DatasetError
from finetune.evaluation.adapters import attached, load_base
from finetune.evaluation.figures import RESAMPLES, change_ci95
from finetune.evaluation.heldout import HeldOut, read_heldout
from finetune.evaluation.models import ChampionRef
from finetune.evaluation.scorer import Scorer
from finetune.evaluation.statistics import shift_ci95
from finetune.progress import Progress, ignore_progress
from finetune.publishing import find_published, publish_directory, sha256_file

_KIND = "drift"
# Part of what decides whether a report can be used again: raise it when figures change their meaning.
_METHOD = 3


class DriftReport(BaseModel):
    """The champion on held-out records that arrived since its training; losses in nats per trained token.

    Where nothing arrived, `records` is 0 and the figures are None.
    """

    model_config = ConfigDict(frozen=True)

    path: Path
    version: str
    adapter_hash: str
    # held-out records of its own dataset, and what it loses on them
    known_records: int
    known_loss: float | None = None
    # held-out records that arrived since
    records: int
    loss: float | None = None
    # loss - known_loss with its 95 % confidence interval: positive when it does worse on what is new
    drift: float | None = None
    drift_ci95: tuple[float, float] | None = None
    # what the base model makes of the same records: how much harder what is new is for anyone
    base_loss: float | None = None
    base_drift: float | None = None
    # loss - base_loss on what is new: negative while the adapter still helps
    delta_vs_base_loss: float | None = None
    delta_ci95: tuple[float, float] | None = None
    # versions of which nobody can tell whether they were trained on what is new here
    unknown: list[str] = []
    reused: bool = False


def measure_drift(
    *,
    base_model: BaseModelRef,
    champion: ChampionRef,
    known_eval: Path,
    arrived: Path,
    output_dir: Path,
    max_length: int,
    on_progress: Progress = ignore_progress,
    seed: int = 42,
) -> DriftReport:
    """Evaluate the champion on the held-out records that were not there when it was trained.

    New is what stands in `arrived` and not in `known_eval`, and whose prompt was not trained on, however white space
    and accents are written. The model is loaded once. Publishes ``new.jsonl`` and ``report.json``; a complete
    `output_dir` made from the same inputs is used again.

    Args:
        base_model: the one that the champion was trained on.
        champion: the reigning champion, and which prompts of `arrived` it was trained on.
        known_eval: held-out records of its dataset, JSONL.
        arrived: held-out records of everything that has arrived by now.
        output_dir: where the report is published.
        max_length: records are cut at so many tokens, as in training.
        on_progress: told of every batch.
        seed: of the bootstrap.

    Raises:
        DatasetError: a file of records cannot be read, or no record in it can be scored.
        BaseModelError: the base model cannot be loaded.
        ArtifactError: the adapter is damaged, does not fit the base model, or gives losses that are no numbers.
    """
    if champion.base_fingerprint != base_model.fingerprint:
        raise ArtifactError(
            f"the champion {champion.version} was trained on another base model than {base_model.name}",
            where=champion.adapter_path,
            remedy="Set BASE_MODEL_NAME to its base model, or train and promote an adapter of the present one",
        )
    inputs = {
        "method": _METHOD,
        "champion": champion.fingerprint,
        "known": sha256_file(known_eval),
        "arrived": sha256_file(arrived),
        "max_length": max_length,
        "seed": seed,
    }
    if known := find_published(output_dir, kind=_KIND, inputs=inputs):
        return DriftReport.model_validate({**known.results, "path": output_dir, "reused": True})
    with publish_directory(output_dir, kind=_KIND) as staging:
        fresh = staging.path / "new.jsonl"
        _write_new(known_eval, arrived, champion.learned, fresh)
        report = DriftReport(
            path=output_dir,
            version=champion.version,
            adapter_hash=champion.adapter_hash,
            known_records=0,
            records=0,
            unknown=champion.unknown,
        )
        if fresh.stat().st_size:
            encoder = RecordEncoder.load(base_model.path)
            before = read_heldout(known_eval, encoder, max_length=max_length)
            after = read_heldout(fresh, encoder, max_length=max_length)
            report = report.model_copy(update=_figures(base_model, champion, encoder, before, after, on_progress, seed))
        staging.inputs = inputs
        staging.results = report.model_dump(mode="json", exclude={"path", "reused"})
        (staging.path / "report.json").write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return report


def _write_new(known_eval: Path, arrived: Path, learned: Collection[str], target: Path) -> None:
    """Write the records of `arrived` that stand not in `known_eval`, and whose prompts are none of the learned ones."""
    known = {content for _, content, _ in _records(known_eval)}
    trained = {normalized(prompt) for prompt in learned}
    with target.open("wb") as stream:
        for line, content, prompt in _records(arrived):
            if content not in known and prompt not in trained:
                stream.write(line + b"\n")


def _records(path: Path) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Each record's line, its content's digest and its normalised prompt."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not (stripped := line.strip()):
                continue
            try:
                content, prompt = content_key(checked_turns(orjson.loads(stripped)))
            except ValueError as error:
                raise DatasetError(
                    f"line {number} is no record: {error}",
                    where=path,
                    remedy="Give it the eval.jsonl of a prepared dataset",
                ) from error
            yield stripped, xxh3_128_digest(content), prompt


def _figures(
    base_model: BaseModelRef,
    champion: ChampionRef,
    encoder: RecordEncoder,
    before: HeldOut,
    after: HeldOut,
    on_progress: Progress,
    seed: int,
) -> dict[str, object]:
    model = load_base(base_model)
    scorer = Scorer(encoder, "drift", 2 * (len(before.records) + len(after.records)), on_progress)
    base_before, base_after = (
        scorer(model, held_out, name="the base model", where=base_model.path) for held_out in (before, after)
    )
    name = f"the champion {champion.version}"
    with attached(model, champion.adapter_path) as adapted:
        old, new = (scorer(adapted, held_out, name=name, where=champion.adapter_path) for held_out in (before, after))
    return {
        "known_records": len(before.records),
        "known_loss": old.loss,
        "records": len(after.records),
        "loss": new.loss,
        "drift": new.loss - old.loss,
        "drift_ci95": shift_ci95((old.nats, old.tokens), (new.nats, new.tokens), resamples=RESAMPLES, seed=seed),
        "base_loss": base_after.loss,
        "base_drift": base_after.loss - base_before.loss,
        "delta_vs_base_loss": new.loss - base_after.loss,
        "delta_ci95": change_ci95(base_after, new, seed=seed),
    }
