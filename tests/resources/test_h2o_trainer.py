import json
import logging
import os
import ssl
import stat
import threading
import warnings
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import trustme

from finetune.adapter_files import adapter_hash
from finetune.errors import ConfigurationError, FinetuneError, RemoteError, StorageFullError, TrainingError
from finetune.progress import ProgressEvent
from finetune.publishing import is_complete, read_manifest
from finetune.training.models import TrainingRequest
from resources.h2o.protocol import Limits, Protocol, Timing
from resources.h2o_trainer import H2OTrainer
from resources.trainer import LoraTrainer
from tests.resources import h2o_server
from tests.resources.h2o_server import (
    KEY,
    H2OServer,
    adapter_files,
    archive,
    drips,
    flips_a_bit,
    loses_the_answer,
    resets,
    says,
    truncates,
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


def test_a_download_that_breaks_off_is_continued_where_it_broke(server: H2OServer, request_: TrainingRequest) -> None:
    server.faults["download"] = [truncates, truncates]
    train(trainer_for(server), request_)
    assert server.struck == ["download", "download"]
    half = len(server.archive) // 2
    assert server.range_headers == [None, f"bytes={half}-", f"bytes={half + (len(server.archive) - half) // 2}-"]


def test_a_server_without_ranges_sends_everything_again(server: H2OServer, request_: TrainingRequest) -> None:
    server.ranges = False
    server.faults["download"] = [truncates]
    train(trainer_for(server), request_)
    assert server.struck == ["download"]
    assert is_complete(request_.adapter_dir)


def test_nothing_is_continued_where_nothing_would_show_a_change(server: H2OServer, request_: TrainingRequest) -> None:
    server.etag, server.tells_sha256 = None, False
    server.faults["download"] = [truncates]
    train(trainer_for(server), request_)
    assert server.range_headers == [None, None]


def test_an_archive_that_changed_in_between_is_fetched_anew(server: H2OServer, request_: TrainingRequest) -> None:
    def changes(handler: h2o_server.Handler) -> bool:
        server.etag = '"v2"'
        server.archive = archive({"adapter_model/README.md": b"newer", **adapter_files()})
        return False

    server.tells_sha256 = False
    server.faults["download"] = [truncates, changes]
    train(trainer_for(server), request_)
    assert server.struck == ["download", "download"]
    assert is_complete(request_.adapter_dir)


def test_a_flipped_bit_is_noticed_and_fetched_again(server: H2OServer, request_: TrainingRequest) -> None:
    server.faults["download"] = [flips_a_bit]
    train(trainer_for(server), request_)
    assert server.struck == ["download"]
    assert server.calls.count("download") == 2


def test_wrong_bytes_twice_are_an_error_and_nothing_is_published(server: H2OServer, request_: TrainingRequest) -> None:
    server.faults["download"] = [flips_a_bit, flips_a_bit]
    with pytest.raises(RemoteError, match=r"SHA-256.*twice"):
        train(trainer_for(server), request_)
    assert server.struck == ["download", "download"]
    assert not request_.adapter_dir.exists()


def test_an_archive_over_the_limit_is_refused_before_it_fills_the_disk(
    server: H2OServer, request_: TrainingRequest
) -> None:
    with pytest.raises(TrainingError, match="over the limit of 100"):
        train(trainer_for(server, limits=Limits(download_bytes=100)), request_)
    assert not list(request_.work_dir.glob("adapter.zip*"))


def test_a_full_disk_is_named_and_the_next_run_goes_on(server: H2OServer, request_: TrainingRequest) -> None:
    part = request_.work_dir / "adapter.zip.part"
    part.parent.mkdir()
    part.symlink_to("/dev/full")
    with pytest.raises(StorageFullError, match=r"adapter\.zip"):
        train(trainer_for(server), request_)
    assert not request_.adapter_dir.exists()
    part.unlink()
    assert train(trainer_for(server), request_).external_run_id == "exp/1"


def hostile(change: Callable[[zipfile.ZipFile], None], files: dict[str, bytes] | None = None) -> bytes:
    buffer = BytesIO(archive(files or adapter_files()))
    with zipfile.ZipFile(buffer, "a") as zipped:
        change(zipped)
    return buffer.getvalue()


def link(zipped: zipfile.ZipFile) -> None:
    entry = zipfile.ZipInfo("adapter_model/special.json")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    zipped.writestr(entry, "/etc/passwd")


def device(zipped: zipfile.ZipFile) -> None:
    entry = zipfile.ZipInfo("adapter_model/special.json")
    entry.external_attr = (stat.S_IFIFO | 0o666) << 16
    zipped.writestr(entry, b"")


def twice(zipped: zipfile.ZipFile) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zipped.writestr("adapter_model/adapter_config.json", b"{}")


def encrypted(content: bytes) -> bytes:
    """The flag alone: the first two bytes after the versions, in every entry of the directory."""
    changed = bytearray(content)
    position = -1
    while (position := changed.find(b"PK\x01\x02", position + 1)) >= 0:
        changed[position + 8] |= 1
    return bytes(changed)


def bomb(zipped: zipfile.ZipFile) -> None:
    zipped.writestr("adapter_model/zeros.json", bytes(5_000_000), zipfile.ZIP_DEFLATED)


HOSTILE = {
    "parent": (hostile(lambda z: z.writestr("../outside.json", b"x")), "leads out"),
    "absolute": (hostile(lambda z: z.writestr("/tmp/outside.json", b"x")), "leads out"),
    "backslash": (hostile(lambda z: z.writestr("..\\outside.json", b"x")), "leads out"),
    "link": (hostile(link), "link or a device"),
    "device": (hostile(device), "link or a device"),
    "twice": (hostile(twice), "two files of one name"),
    "encrypted": (encrypted(archive(adapter_files())), "encrypted"),
    "pickle": (hostile(lambda z: z.writestr("adapter_model/optimizer.pt", b"x")), "no safetensors adapter has"),
    "bomb": (hostile(bomb), "unpacked, over the limit"),
    "many": (hostile(lambda z: [z.writestr(f"{n}.txt", b"") for n in range(60)] and None), "files, over the limit"),
    "not-a-zip": (b"PK\x03\x04 but no more", "damaged"),
    "no-adapter": (archive({"adapter_model/README.md": b"x"}), "0 directories"),
    "two-adapters": (
        archive(adapter_files() | {name.replace("adapter_", "x_", 1): c for name, c in adapter_files().items()}),
        "2 directories",
    ),
    "other-rank": (archive(adapter_files(rank=8)), "r is 8 instead of 4"),
    "imports": (
        archive(adapter_files() | {"adapter_model/adapter_config.json": b'{"auto_mapping": {"parent_library": "os"}}'}),
        "auto_mapping",
    ),
    "short-weights": (
        archive(adapter_files() | {"adapter_model/adapter_model.safetensors": b"\xff\xff\x00\x00\x00\x00\x00\x00{}"}),
        "weights are damaged",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_or_wrong_archive_is_refused_and_leaves_nothing(
    server: H2OServer, request_: TrainingRequest, tmp_path: Path, name: str
) -> None:
    server.archive, message = HOSTILE[name]
    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(request_.work_dir)}
    with pytest.raises(FinetuneError, match=message):
        train(trainer_for(server, limits=Limits(unpacked_bytes=1_000_000, files=50)), request_)
    after = {path for path in tmp_path.rglob("*") if not path.is_relative_to(request_.work_dir)}
    assert after - before <= {request_.adapter_dir.parent}
    assert not Path("/tmp/outside.json").exists()


def test_the_key_does_not_follow_a_redirect_to_another_host(server: H2OServer, request_: TrainingRequest) -> None:
    other = H2OServer()
    other.key = "another"
    try:
        server.faults["download"] = [says(302, b"", Location=f"{other.url}/api/experiments/exp%2F1/download")]
        other.experiments["exp/1"] = {"status": "finished"}
        other.faults["download"] = [lambda handler: handler.download("exp%2F1") or True]
        train(trainer_for(server), request_)
        assert server.struck == ["download"]
        assert other.calls == ["download"]
        assert other.authorizations == [None]
    finally:
        other.close()


def test_a_download_that_is_redirected_in_a_circle_is_an_error(server: H2OServer, request_: TrainingRequest) -> None:
    server.faults["download"] = [says(302, b"", Location="download")] * 100
    with pytest.raises(ConfigurationError, match="redirects in a circle"):
        train(trainer_for(server), request_)
    assert server.struck.count("download") > 5


def test_a_download_is_not_followed_out_of_tls(
    server: H2OServer, request_: TrainingRequest, authority: trustme.CA, tmp_path: Path
) -> None:
    plain = H2OServer()
    try:
        url = over_tls(server, authority, "127.0.0.1")
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        server.faults["download"] = [says(302, b"", Location=f"{plain.url}/adapter.zip")]
        plain.faults["unknown"] = [lambda handler: handler.reply(200, server.archive) or True]
        trainer = H2OTrainer(api_url=url, api_key=KEY, timing=Timing(**FAST), ca_file=str(tmp_path / "ca.pem"))
        with pytest.raises(ConfigurationError, match="redirects the download to an unencrypted address"):
            train(trainer, request_)
        assert server.struck == ["download"]
        assert plain.authorizations == [None]
        assert not request_.adapter_dir.exists()
    finally:
        plain.close()


@pytest.mark.parametrize("call", ["upload", "create", "poll"])
def test_a_redirected_call_is_an_error_that_names_the_other_host(
    server: H2OServer, request_: TrainingRequest, call: str
) -> None:
    server.faults[call] = [says(307, b"", Location="http://evil.invalid/api")]
    with pytest.raises(ConfigurationError, match=r"redirects to evil\.invalid.*H2O_API_URL"):
        train(trainer_for(server), request_)
    assert server.struck == [call]


def test_the_key_is_in_nothing_that_is_written_or_said(
    server: H2OServer, request_: TrainingRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    events: list[ProgressEvent] = []
    # A server that repeats what it was sent.
    server.faults["poll"] = [says(500, f'{{"detail": "bad header Bearer {KEY}"}}'.encode())]
    server.faults["create"] = [says(422, f"Authorization: Bearer {KEY}".encode())]
    with pytest.raises(TrainingError, match=r"Bearer \*\*\*") as caught:
        train(trainer_for(server), request_, events)
    train(trainer_for(server), request_, events)
    assert server.struck == ["create", "poll"]
    assert KEY not in "".join(map(str, events)) + caplog.text + str(caught.value) + repr(trainer_for(server))
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()


@pytest.mark.parametrize(
    ("url", "key", "names"),
    [
        ("https://user:pa55word@host", None, "H2O_API_URL"),
        ("ftp://host", None, "H2O_API_URL"),
        ("host:8080", None, "H2O_API_URL"),
        ("https://host", "pa55word\nX-Evil: 1", "H2O_API_KEY"),
        ("https://host", "pa55wordключ", "H2O_API_KEY"),
    ],
)
def test_an_address_or_key_that_cannot_be_used_is_named_and_not_repeated(
    request_: TrainingRequest, url: str, key: str | None, names: str
) -> None:
    with pytest.raises(ConfigurationError, match=names) as caught:
        train(H2OTrainer(api_url=url, api_key=key), request_)
    assert "pa55word" not in str(caught.value)


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


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


def over_tls(server: H2OServer, authority: trustme.CA, name: str) -> str:
    """Let the server speak TLS with a certificate for `name`; returns its new address."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    # The handshake is the connection's thread's, so that a refused one does not end the listener.
    server.listener.socket = context.wrap_socket(
        server.listener.socket, server_side=True, do_handshake_on_connect=False
    )
    return server.url.replace("http:", "https:")


def test_a_certificate_of_a_private_authority_is_trusted_by_setting_alone(
    server: H2OServer, request_: TrainingRequest, authority: trustme.CA, tmp_path: Path
) -> None:
    url = over_tls(server, authority, "127.0.0.1")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    timing = Timing(**FAST)
    with pytest.raises(ConfigurationError, match=r"not trusted: unable to get local issuer.*H2O_CA_FILE"):
        train(H2OTrainer(api_url=url, api_key=KEY, timing=timing), request_)
    assert server.calls == []
    trusted = H2OTrainer(api_url=url, api_key=KEY, timing=timing, ca_file=str(tmp_path / "ca.pem"))
    assert train(trusted, request_).status == "completed"


def test_a_trusted_certificate_for_another_name_is_refused_before_the_key_is_sent(
    server: H2OServer, request_: TrainingRequest, authority: trustme.CA, tmp_path: Path
) -> None:
    url = over_tls(server, authority, "h2o.internal")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    with pytest.raises(ConfigurationError, match="not trusted: IP address mismatch"):
        train(H2OTrainer(api_url=url, api_key=KEY, timing=Timing(**FAST), ca_file=str(tmp_path / "ca.pem")), request_)
    assert server.calls == []


def test_a_missing_authority_file_is_named(request_: TrainingRequest) -> None:
    with pytest.raises(ConfigurationError, match=r"/nowhere/ca\.pem.*H2O_CA_FILE"):
        train(H2OTrainer(api_url="https://127.0.0.1:1", ca_file="/nowhere/ca.pem"), request_)


def test_the_key_may_come_from_a_file_with_a_line_break(server: H2OServer, request_: TrainingRequest) -> None:
    trainer = H2OTrainer(api_url=server.url, api_key=f"{KEY}\n", timing=Timing(**FAST))
    assert train(trainer, request_).status == "completed"
    assert os.environ.get("H2O_API_KEY") is None


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
