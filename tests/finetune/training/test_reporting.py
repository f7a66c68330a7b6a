"""REPORT_TO: a real MLflow with a database of its own, Weights & Biases without its server."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import ConfigurationError, TrainingError
from finetune.training.models import TrainingRequest
from finetune.training.reporting import Tracker
from finetune.training.sft import train_adapter

MakeRequest = Callable[..., TrainingRequest]


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    import mlflow

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    yield mlflow.MlflowClient(uri)
    mlflow.set_tracking_uri("")


def tracked(request: TrainingRequest, tracker: Tracker = "mlflow") -> TrainingRequest:
    return request.model_copy(update={"report_to": tracker})


def test_mlflow_gets_a_run_with_every_step_s_loss_and_one_that_failed_is_ended_as_failed(
    make_request: MakeRequest, client: Any
) -> None:
    with pytest.raises(TrainingError, match="loss became nan"):
        train_adapter(tracked(make_request(place="broken", learning_rate=1e30, warmup_ratio=0.0, max_steps=3)))
    result = train_adapter(tracked(make_request(max_steps=3)))
    finished, failed = client.search_runs(["0"], order_by=["attributes.start_time DESC"])
    assert (failed.info.status, finished.info.status) == ("FAILED", "FINISHED")
    assert finished.info.run_name == result.run_id
    losses = {point.step: point.value for point in client.get_metric_history(finished.info.run_id, "loss")}
    assert losses == {point.step: pytest.approx(point.loss) for point in result.loss_curve}
    assert finished.data.params["learning_rate"] == "0.005"


@pytest.fixture
def offline_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where Weights & Biases keeps the runs of this test, without its server."""
    for name, value in {"MODE": "offline", "SILENT": "true", "DIR": str(tmp_path)}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    return tmp_path / "wandb"


def logged(content: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format (doc/log_format.md there), behind a header of seven bytes."""
    block, header = 32768, 7
    place, parts = header, b""
    while place + header <= len(content):
        if (left := block - place % block) < header:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, place)
        parts += content[place + header : place + header + size]
        place += header + size
        # Whole, or the last of several parts.
        if kind in (1, 4):
            yield parts
            parts = b""


def test_weights_and_biases_gets_a_run_with_every_step_s_loss_without_its_server(
    make_request: MakeRequest, offline_runs: Path
) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    result = train_adapter(tracked(make_request(max_steps=3), "wandb"))
    (log,) = offline_runs.glob("offline-run-*/*.wandb")
    losses, names = [], set()
    for data in logged(log.read_bytes()):
        record = Record.FromString(data)
        names.add(record.run.display_name)
        rows = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
        losses += [json.loads(rows["train/loss"])] if "train/loss" in rows else []
    assert result.run_id in names
    assert losses == pytest.approx([point.loss for point in result.loss_curve])


@pytest.mark.parametrize("tracker", ["mlflow", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_loaded(
    make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch, tracker: Tracker
) -> None:
    monkeypatch.setitem(sys.modules, tracker, None)
    request = tracked(make_request(), tracker)
    with pytest.raises(ConfigurationError, match=rf"{tracker} is not installed.*lora-assets\[{tracker}\]"):
        train_adapter(request)
    assert not request.work_dir.exists()
