"""Downloads of the adapter: broken off, altered, too large, redirected, and never whole in memory."""

import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import pytest

from finetune.errors import RemoteError, StorageFullError, TrainingError
from finetune.publishing import is_complete
from finetune.training.models import TrainingRequest
from resources.h2o.protocol import Limits
from tests.resources import h2o_server
from tests.resources.h2o_server import (
    Fault,
    H2OServer,
    Handler,
    adapter_files,
    archive,
    flips_a_bit,
    says,
    truncates,
)
from tests.resources.h2o_training import train, trainer_for


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


def test_an_entity_tag_that_cannot_be_sent_back_costs_no_more_than_the_range(
    server: H2OServer, request_: TrainingRequest
) -> None:
    server.etag, server.tells_sha256 = '"\u00e9"', False
    server.faults["download"] = [truncates]
    assert train(trainer_for(server), request_).status == "completed"
    assert server.range_headers == [None, None]


STREAMING = """
import resource, sys
from pathlib import Path
from tests.resources.h2o_server import KEY
from tests.resources.h2o_training import request_in
from resources.h2o.protocol import Timing
from resources.h2o_trainer import H2OTrainer
request = request_in(Path(sys.argv[2]))
with request.dataset.train_path.open("wb") as file:
    for _ in range(50):
        file.write(b"x" * 999_999 + b"\\n")
trainer = H2OTrainer(api_url=sys.argv[1], api_key=KEY, timing=Timing(poll=0.01))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
before = peak()
told = []
def note(event):
    told.append((event.stage, peak()))
trainer.train(request, on_progress=note, on_external_run=lambda run, url: None)
print([at for stage, at in told if stage == "downloading the adapter"][-1] - before)
"""


def test_neither_upload_nor_download_is_held_in_memory(server: H2OServer, tmp_path: Path) -> None:
    buffer = BytesIO(archive(adapter_files()))
    with zipfile.ZipFile(buffer, "a") as zipped:
        zipped.writestr("adapter_model/large.txt", bytes(50_000_000), zipfile.ZIP_STORED)
    server.archive = buffer.getvalue()
    done = subprocess.run(
        [sys.executable, "-c", STREAMING, server.url, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(server.uploaded["ds-1"]) == 50_000_000
    assert float(done.stdout) < 20, "MB more than before, with 50 MB each way"


def test_a_server_that_stored_other_bytes_is_not_trusted_with_a_training(
    server: H2OServer, request_: TrainingRequest
) -> None:
    server.faults["upload"] = [says(201, b'{"id": "ds-1", "sha256": "' + b"0" * 64 + b'"}')] * 5
    with pytest.raises(RemoteError, match=r"stored SHA-256 0000"):
        train(trainer_for(server), request_)
    assert server.struck == ["upload"] * 5
    assert "create" not in server.calls


def delivers(server: H2OServer, **headers: str) -> Fault:
    """The archive, with these headers."""

    def fault(handler: Handler) -> bool:
        handler.reply(200, server.archive, {name.replace("_", "-"): value for name, value in headers.items()})
        return True

    return fault


def test_a_hash_that_comes_with_the_download_counts_where_the_experiment_tells_none(
    server: H2OServer, request_: TrainingRequest
) -> None:
    server.tells_sha256 = False
    server.faults["download"] = [delivers(server, X_Checksum_Sha256="0" * 64)] * 2
    with pytest.raises(RemoteError, match=rf"SHA-256 {server.sha256} instead of 0000.*twice"):
        train(trainer_for(server), request_)
    server.faults["download"] = [delivers(server, X_Checksum_Sha256=server.sha256)]
    assert train(trainer_for(server), request_).status == "completed"
    assert server.struck == ["download"] * 3


def test_a_compressed_download_is_refused_since_its_size_and_ranges_would_be_of_something_else(
    server: H2OServer, request_: TrainingRequest
) -> None:
    server.faults["download"] = [delivers(server, Content_Encoding="gzip")] * 5
    with pytest.raises(RemoteError, match="compresses the download against our wish"):
        train(trainer_for(server), request_)
    assert server.struck == ["download"] * 5


@pytest.mark.parametrize("content_range", ["", "bytes 999999-1000000/5", "bytes a-b/c", "lines 0-9/10"])
def test_a_partial_answer_that_does_not_say_where_it_belongs_is_not_put_together(
    server: H2OServer, request_: TrainingRequest, content_range: str
) -> None:
    def partial(handler: Handler) -> bool:
        handler.reply(206, b"zip", {"Content-Range": content_range, "ETag": '"v1"'})
        return True

    server.faults["download"] = [truncates, partial]
    assert train(trainer_for(server), request_).status == "completed"
    assert server.struck == ["download", "download"]
