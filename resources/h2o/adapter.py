"""A delivered archive becomes the published adapter, in the same layout as a local one."""

import json
from pathlib import Path

from pydantic import ValidationError

from finetune.adapter_files import CONFIG_NAME, adapter_hash
from finetune.errors import TrainingError
from finetune.planning.models import TrialConfig
from finetune.publishing import publish_directory, read_manifest, write_json_atomically
from finetune.training.card import model_card
from finetune.training.identity import CODE_VERSION
from finetune.training.models import LossPoint, TrainingRequest, TrainingResult
from finetune.training.plots import loss_curve_png
from resources.h2o.protocol import Experiment, Limits
from resources.h2o.unpack import LOG_NAME, safe_config, unpack_adapter

KIND = "adapter"


def publish_adapter(
    archive: Path,
    request: TrainingRequest,
    experiment: Experiment,
    *,
    experiment_url: str,
    seconds: float,
    gpu_hours: float,
    final_loss: float | None,
    limits: Limits,
) -> TrainingResult:
    """Unpack, check and publish at `request.adapter_dir`.

    Raises:
        TrainingError: the archive is hostile, damaged, or holds another adapter than was asked for.
        ArtifactError: the adapter's weights are damaged.
        StorageFullError: the disk is full.
    """
    with publish_directory(request.adapter_dir, kind=KIND) as staging:
        unpack_adapter(archive, staging.path, limits)
        config = safe_config(staging.path)
        _check_method(config, request.plan.trial_config, archive)
        # Where the base model lies on the server would mean nothing here.
        config["base_model_name_or_path"] = request.base_model.name
        config["revision"] = request.base_model.revision
        write_json_atomically(staging.path / CONFIG_NAME, config)
        loss_curve = _loss_curve(staging.path / LOG_NAME)
        result = TrainingResult(
            status="completed",
            run_id=request.run_id,
            backend="h2o",
            adapter_path=request.adapter_dir,
            adapter_hash=adapter_hash(staging.path),
            training_steps=experiment.step,
            gpu_hours=gpu_hours,
            final_loss=loss_curve[-1].loss if final_loss is None and loss_curve else final_loss,
            loss_curve=loss_curve,
            seconds=seconds,
            external_run_id=experiment.id,
            external_run_url=experiment_url,
        )
        (staging.path / "README.md").write_text(model_card(request, result, config), encoding="utf-8")
        (staging.path / "loss_curve.png").write_bytes(loss_curve_png(loss_curve))
        staging.inputs = {
            "dataset": request.dataset.fingerprint,
            "dates": request.dataset.window_dates,
            "base_model": request.base_model.model_dump(exclude={"path"}, mode="json"),
            "records": request.dataset.counts.train,
            "experiment": {"id": experiment.id, "url": experiment_url},
            "request": request.model_dump(mode="json"),
            "code_version": CODE_VERSION,
        }
        staging.parameters = request.plan.trial_config.model_dump()
        staging.results = result.model_dump(mode="json", exclude={"adapter_path"})
    return result


def published_result(adapter_dir: Path) -> TrainingResult:
    """What `publish_adapter` said of a published adapter.

    Raises:
        ArtifactError: the directory is damaged.
    """
    manifest = read_manifest(adapter_dir, kind=KIND)
    return TrainingResult.model_validate({**manifest.results, "adapter_path": adapter_dir, "reused": True})


def _check_method(config: dict[str, object], trial: TrialConfig, archive: Path) -> None:
    expected: dict[str, object] = {"peft_type": {"prefix": "PREFIX_TUNING", "ia3": "IA3"}.get(trial.method, "LORA")}
    if trial.method in ("lora", "qlora"):
        expected["r"] = trial.lora_rank
    for name, value in expected.items():
        if config.get(name) != value:
            raise TrainingError(
                f"the H2O server trained another adapter: {name} is {config.get(name)!r} instead of {value!r}",
                where=archive,
                remedy="Look at the experiment on the server: it did not follow the configuration that it was sent",
            )


def _loss_curve(path: Path) -> list[LossPoint]:
    """The points of a training log as far as they can be read: a curve is no reason to lose an adapter."""
    points = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            points.append(LossPoint.model_validate(json.loads(line)))
        except (ValueError, ValidationError, RecursionError):
            continue
    return points
