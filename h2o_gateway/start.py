"""The training's process before it is H2O LLM Studio's: ``python -m h2o_gateway.start <directory>``.

It takes the attempt's lock, prepares what H2O LLM Studio reads, and becomes the training command. All
that can take long or fail happens here, in a process that can be cancelled and whose log is kept.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from pydantic import BaseModel

from finetune.base_model.directory import directory_fingerprint
from finetune.base_model.resolve import resolve_base_model
from finetune.errors import BaseModelError, ConfigurationError, FinetuneError
from finetune.publishing import is_complete, read_manifest, sha256_json
from h2o_gateway.attempt import Attempt
from h2o_gateway.conversion import write_parquet
from h2o_gateway.models import ExperimentRequest
from h2o_gateway.settings import PREFIX
from h2o_gateway.studio import configuration, write_configuration

_REMEDY = f"Set {PREFIX}TRAIN_COMMAND, or {PREFIX}STUDIO_DIR, where it runs"


class Job(BaseModel):
    """What the gateway hands over."""

    request: ExperimentRequest
    name: str
    dataset: Path
    # of a base model on this machine; None: from the hub
    model_path: Path | None
    cache_dir: Path
    command: list[str]
    studio_dir: Path
    trust_remote_code: bool
    workers: int


def main(directory: Path) -> int:
    """Returns only where it does not become the training command."""
    attempt = Attempt(directory)
    if not attempt.take():
        return 0
    job = Job.model_validate_json(attempt.job.read_bytes())
    try:
        _prepare(attempt, job)
        if not job.studio_dir.is_dir():
            raise ConfigurationError("no such directory", where=job.studio_dir, remedy=_REMEDY)
        os.chdir(job.studio_dir)
        sys.stdout.flush()
        if shutil.which(job.command[0]) is None:
            raise ConfigurationError(
                f"the training command {job.command[0]!r} is not to be found", where=job.studio_dir, remedy=_REMEDY
            )
        os.execvp(job.command[0], job.command)
    except (FinetuneError, OSError) as error:
        print(f"error: {error}", flush=True)
    return 1


def _prepare(attempt: Attempt, job: Job) -> None:
    request = job.request
    if job.model_path:
        model_dir, backbone, revision = job.model_path, str(job.model_path), None
        _check_fingerprint(request, model_dir, job.cache_dir)
    else:
        found = resolve_base_model(
            request.base_model, cache_dir=job.cache_dir, revision=request.base_model_revision, weights=False
        )
        model_dir, backbone, revision = found.path, found.name, found.revision
    records = write_parquet(job.dataset, attempt.table, model_dir)
    attempt.output.mkdir(exist_ok=True)
    write_configuration(
        attempt.config,
        configuration(
            request.config,
            name=job.name,
            backbone=backbone,
            revision=revision,
            table=attempt.table,
            output=attempt.output,
            trust_remote_code=job.trust_remote_code,
            workers=job.workers,
        ),
    )
    print(f"{records} records for {backbone}; starting {' '.join(job.command)}", flush=True)


def _check_fingerprint(request: ExperimentRequest, model_dir: Path, cache_dir: Path) -> None:
    """A client that does not hold the weights has a fingerprint of the small files alone."""
    wanted = request.base_model_fingerprint
    if not wanted:
        return
    known = [directory_fingerprint(model_dir, cache_dir=cache_dir, weights=weights) for weights in (False, True)]
    if is_complete(model_dir):
        outputs = read_manifest(model_dir).outputs
        known.append(sha256_json({name: entry.sha256 for name, entry in outputs.items()}))
    if wanted not in known:
        raise BaseModelError(
            f"the base model {request.base_model!r} here is another one than the client's: its fingerprint "
            f"is {known[-1][:12]}... instead of {wanted[:12]}...",
            where=model_dir,
            remedy="Give the gateway and the client the same files",
        )


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
