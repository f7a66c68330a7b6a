"""A training that is delegated: what goes to the server, what comes back, and what may go wrong in between."""

import json
import threading
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from finetune.adapter_files import adapter_hash
from finetune.errors import ConfigurationError, FinetuneError, RemoteError, TrainingError
from finetune.progress import ProgressEvent
from finetune.publishing import read_manifest
from finetune.training.models import TrainingRequest
from resources.h2o.protocol import Protocol, Timing
from resources.h2o_trainer import H2OTrainer
from resources.trainer import LoraTrainer
from tests.resources import h2o_server
from tests.resources.h2o_server import (
    KEY,
    H2OServer,
    archive,
    drips,
    loses_the_answer,
    resets,
    says,
)
from tests.resources.h2o_training import FAST, train, trainer_for


def test_a_training_goes_to_the_server_and_comes_back_as_an_adapter_like_a_local_one(
    server: H2OServer, request_: TrainingRequest
) -> None:
    events: list[ProgressEvent] = []
    external: list[tuple[str, str]] = []
    result = train(trainer_for(server), request_, events, external)
    assert (result.status, result.backend, result.training_steps) == ("completed", "h2o", 4)
    assert (result.external_run_id, result.final_loss, result.gpu_hours) == ("exp/1", 0.5, 0.5)
    assert external == [("exp/1", f"{server.url}/api/experiments/exp%2F1")]
    assert server.uploaded["ds-1"] == request_.dataset.train_path.read_bytes()
    body = server.experiments["exp/1"]["body"]
    assert body["idempotency_key"] == request_.run_id
    assert body["config"]["lora_rank"] == 4
    manifest = read_manifest(request_.adapter_dir, kind="adapter", verify="hashes")
    assert sorted(manifest.outputs) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "loss_curve.png",
        "training_log.jsonl",
    ]
    assert result.adapter_hash == adapter_hash(request_.adapter_dir) == manifest.results["adapter_hash"]
    config = json.loads((request_.adapter_dir / "adapter_config.json").read_bytes())
    assert config["base_model_name_or_path"] == "tiny"
    assert [point.step for point in result.loss_curve] == [1, 2, 3, 4]
    training = [event for event in events if event.stage == "remote training"]
    assert [event.done for event in training] == [1, 2, 3, 4]
    assert training[0].figures == {"loss": 2.0, "gpu_hours": 0.5}


def test_a_complete_adapter_is_handed_back_without_a_call(server: H2OServer, request_: TrainingRequest) -> None:
    first = train(trainer_for(server), request_)
    calls = len(server.calls)
    again = train(trainer_for(server), request_)
    assert again == first.model_copy(update={"reused": True})
    assert len(server.calls) == calls


@pytest.mark.parametrize("call", ["upload", "list", "create", "poll", "download"])
@pytest.mark.parametrize(
    "fault",
    [
        says(429, Retry_After="0"),
        says(503, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"),
        says(500, b"<html>oops"),
        resets,
        loses_the_answer,
    ],
    ids=["429", "503", "500", "reset", "lost-answer"],
)
def test_a_passing_fault_at_any_call_is_survived_with_one_experiment(
    server: H2OServer, request_: TrainingRequest, call: str, fault: h2o_server.Fault
) -> None:
    server.faults[call] = [fault, fault]
    assert train(trainer_for(server), request_).status == "completed"
    # An answer that was lost after the creation is not missed: the experiment is found.
    once = call == "create" and fault is loses_the_answer
    assert server.struck == [call] * (1 if once else 2)
    assert (len(server.experiments), len(server.datasets)) == (1, 1)


def test_a_lost_answer_to_the_creation_makes_no_second_experiment_even_on_a_server_without_idempotency(
    server: H2OServer, request_: TrainingRequest
) -> None:
    server.idempotent = False
    server.faults["create"] = [loses_the_answer]
    train(trainer_for(server), request_)
    assert server.struck == ["create"]
    assert len(server.experiments) == 1


def test_a_server_that_cannot_list_is_trusted_to_heed_the_idempotency_key(
    server: H2OServer, request_: TrainingRequest
) -> None:
    server.lists = False
    server.faults["create"] = [loses_the_answer]
    train(trainer_for(server), request_)
    assert "list" in server.calls
    assert len(server.experiments) == 1


def test_an_outage_longer_than_the_budget_ends_in_a_passing_error_and_the_next_run_goes_on(
    server: H2OServer, request_: TrainingRequest
) -> None:
    server.faults["poll"] = [says(503)] * 1000
    with pytest.raises(RemoteError, match=r"HTTP 503: no.*H2O_API_URL"):
        train(trainer_for(server, retry_budget=0.3), request_)
    assert len(server.struck) > 3
    server.faults["poll"].clear()
    assert train(trainer_for(server), request_).status == "completed"
    assert len(server.experiments) == 1


def test_retry_after_is_honoured_and_read_by_the_servers_clock(server: H2OServer, request_: TrainingRequest) -> None:
    events: list[ProgressEvent] = []
    # The server's clock is years off; the pause between its two dates is one second.
    date = {"Date": "Wed, 21 Oct 2015 07:28:00 GMT", "Retry_After": "Wed, 21 Oct 2015 07:28:01 GMT"}

    def skewed(handler: h2o_server.Handler) -> bool:
        handler.date_time_string = lambda timestamp=None: date["Date"]  # type: ignore[method-assign]
        return says(503, Retry_After=date["Retry_After"])(handler)

    server.faults["poll"] = [skewed]
    train(trainer_for(server), request_, events)
    assert server.struck == ["poll"]
    assert any("trying again in 1.0 s" in event.stage for event in events)


def test_a_retry_after_beyond_the_budget_ends_at_once(server: H2OServer, request_: TrainingRequest) -> None:
    server.faults["poll"] = [says(429, Retry_After="86400")]
    with pytest.raises(RemoteError, match="HTTP 429"):
        train(trainer_for(server), request_)
    assert server.calls.count("poll") == 1


@pytest.mark.parametrize(
    ("status", "kind", "says_what"),
    [
        (401, ConfigurationError, "H2O_API_KEY"),
        (403, ConfigurationError, "H2O_API_KEY"),
        (404, TrainingError, "vanished"),
        (422, TrainingError, "Correct"),
    ],
)
def test_a_refusal_ends_at_once_with_the_servers_message(
    server: H2OServer, request_: TrainingRequest, status: int, kind: type[FinetuneError], says_what: str
) -> None:
    server.faults["create"] = [says(status, b'{"detail": "rank 4 is not for you"}')]
    with pytest.raises(kind, match=rf"HTTP {status}: rank 4 is not for you.*{says_what}"):
        train(trainer_for(server), request_)
    assert server.calls.count("create") == 1
    assert not request_.adapter_dir.exists()


@pytest.mark.parametrize("call", ["upload", "create", "poll"])
def test_answers_that_are_no_json_end_soon_in_one_clear_error(
    server: H2OServer, request_: TrainingRequest, call: str
) -> None:
    server.faults[call] = [says(200, b"<html>Sign in</html>")] * 10
    with pytest.raises(RemoteError, match=r"no JSON: <html>Sign in.*H2O_API_URL"):
        train(trainer_for(server), request_)
    assert server.struck == [call] * 5


def test_a_body_that_drips_is_given_up_and_asked_for_again(server: H2OServer, request_: TrainingRequest) -> None:
    server.faults["poll"] = [drips]
    assert train(trainer_for(server, answer_timeout=0.2), request_).status == "completed"
    assert server.struck == ["poll"]


def test_a_server_that_sends_nothing_is_given_up_and_asked_again(server: H2OServer, request_: TrainingRequest) -> None:
    quiet = threading.Event()

    def silent(handler: h2o_server.Handler) -> bool:
        quiet.wait(5)
        return resets(handler)

    server.faults["poll"] = [silent]
    assert train(trainer_for(server, read_timeout=0.2), request_).status == "completed"
    quiet.set()
    assert server.struck == ["poll"]


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        ({"status": "failed", "error": "no memory", "log_tail": h2o_server.LOG}, r"failed .*no memory.*CUDA out of"),
        ({"status": "stopped"}, "was stopped"),
    ],
)
def test_an_experiment_that_ends_badly_tells_why_and_the_next_run_makes_a_new_one(
    server: H2OServer, request_: TrainingRequest, outcome: dict[str, Any], message: str
) -> None:
    server.outcome = outcome
    with pytest.raises(TrainingError, match=f"(?s){message}"):
        train(trainer_for(server), request_)
    server.outcome = {"status": "finished"}
    assert train(trainer_for(server), request_).external_run_id == "exp/2"
    assert len(server.datasets) == 1


def test_after_a_bad_end_a_lost_work_directory_still_leads_to_a_new_experiment(
    server: H2OServer, request_: TrainingRequest
) -> None:
    server.outcome = {"status": "failed"}
    with pytest.raises(TrainingError):
        train(trainer_for(server), request_)
    (request_.work_dir / "h2o.json").unlink()
    server.outcome = {"status": "finished"}
    assert train(trainer_for(server), request_).external_run_id == "exp/2"


def test_an_experiment_that_vanishes_is_an_error_and_the_next_run_makes_a_new_one(
    server: H2OServer, request_: TrainingRequest
) -> None:
    def vanish(handler: h2o_server.Handler) -> bool:
        server.experiments.clear()
        return False

    server.faults["poll"] = [vanish]
    with pytest.raises(TrainingError, match=r"no such experiment.*vanished"):
        train(trainer_for(server), request_)
    assert train(trainer_for(server), request_).status == "completed"


def test_names_of_another_edition_are_settings(server: H2OServer, request_: TrainingRequest) -> None:
    server.outcome = {"status": "DONE", "sha256": server.sha256.upper()}
    protocol = Protocol(finished_statuses=["done"], step_field="total_steps", loss_metric="gpu_hours")
    trainer = H2OTrainer(api_url=server.url, api_key=KEY, timing=Timing(**FAST), protocol=protocol)
    with pytest.raises(TrainingError, match="not finished"):
        train(trainer, request_)
    server.experiments["exp/1"]["status"] = "finished"
    trainer = trainer_for(server)
    assert train(trainer, request_).external_run_id == "exp/1"


def test_an_unknown_status_names_the_setting(server: H2OServer, request_: TrainingRequest) -> None:
    server.outcome = {"status": "meditating"}
    with pytest.raises(ConfigurationError, match=r"'meditating'.*status lists"):
        train(trainer_for(server), request_)


def test_an_experiment_without_news_is_reported_as_stalled_and_kept(
    server: H2OServer, request_: TrainingRequest
) -> None:
    def freeze(handler: h2o_server.Handler) -> bool:
        server.hold.clear()
        return False

    server.faults["poll"] = [lambda handler: False, freeze]
    with pytest.raises(TrainingError, match=r"stalled: no news for 0.2 s at step 1"):
        train(trainer_for(server, stalled=0.2), request_)
    assert server.struck == ["poll", "poll"]
    server.hold.set()
    assert train(trainer_for(server), request_).external_run_id == "exp/1"


def test_the_whole_takes_no_longer_than_it_may(server: H2OServer, request_: TrainingRequest) -> None:
    server.hold.clear()
    with pytest.raises(RemoteError, match=r"took longer than 0.3 s"):
        train(trainer_for(server, total=0.3), request_)


def test_an_experiment_can_be_cancelled(server: H2OServer, request_: TrainingRequest) -> None:
    server.hold.clear()
    with pytest.raises(RemoteError):
        train(trainer_for(server, total=0.1), request_)
    assert trainer_for(server).cancel(request_.run_id, request_.work_dir)
    assert server.experiments["exp/1"]["status"] == "stopped"
    server.hold.set()
    assert train(trainer_for(server), request_).external_run_id == "exp/2"


def test_a_dataset_that_the_server_forgot_is_uploaded_again_by_the_next_run(
    server: H2OServer, request_: TrainingRequest
) -> None:
    server.faults["create"] = [says(503, Retry_After="999999")]
    with pytest.raises(RemoteError):
        train(trainer_for(server), request_)
    server.datasets.clear()
    with pytest.raises(TrainingError, match="unknown dataset"):
        train(trainer_for(server), request_)
    assert train(trainer_for(server), request_).status == "completed"
    assert server.calls.count("upload") == 2


def test_peft_loads_what_arrived_and_computes_the_same(
    server: H2OServer, request_: TrainingRequest, tmp_path: Path
) -> None:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    def base_model() -> LlamaForCausalLM:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval()

    trained = get_peft_model(
        base_model(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    ).eval()
    trained.save_pretrained(str(tmp_path / "trained"))
    server.archive = archive(
        {f"adapter_model/{file.name}": file.read_bytes() for file in (tmp_path / "trained").iterdir()}
    )
    result = train(trainer_for(server), request_)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        plain = base_model()(tokens).logits
        expected = trained(tokens).logits
        arrived = PeftModel.from_pretrained(base_model(), str(request_.adapter_dir)).eval()(tokens).logits
    assert torch.equal(arrived, expected)
    assert not torch.allclose(arrived, plain)
    assert result.adapter_hash == adapter_hash(tmp_path / "trained")


def test_it_serves_as_a_dagster_resource_and_its_key_stays_out_of_the_run(
    server: H2OServer, request_: TrainingRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("H2O_API_KEY", KEY)
    told: list[tuple[str, str]] = []

    @dg.asset
    def adapter(trainer: LoraTrainer) -> None:
        trainer.train(request_, on_progress=lambda event: None, on_external_run=lambda *run: told.append(run))

    trainer = H2OTrainer(api_url=server.url, api_key=dg.EnvVar("H2O_API_KEY"), timing=Timing(**FAST))
    (tmp_path / "dagster").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "dagster")) as instance:
        result = dg.materialize([adapter], resources={"trainer": trainer}, instance=instance)
        assert result.success
    assert [run for run, _ in told] == ["exp/1"]
    assert server.authorizations == [f"Bearer {KEY}"] * len(server.calls)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()
