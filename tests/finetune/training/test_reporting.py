"""REPORT_TO: a real MLflow with a database of its own."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
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


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_loaded(make_request: MakeRequest) -> None:
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed here")
    request = tracked(make_request(), "wandb")
    with pytest.raises(ConfigurationError, match=r"wandb is not installed.*lora-assets\[wandb\]"):
        train_adapter(request)
    assert not request.work_dir.exists()
