"""Archives of adapters that are hostile, or hold something else."""

import stat
import warnings
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest

from finetune.adapter_files import CONFIG_NAME
from finetune.errors import FinetuneError, TrainingError
from finetune.training.models import TrainingRequest
from resources.h2o.protocol import Limits
from tests.resources.h2o_server import (
    H2OServer,
    adapter_files,
    archive,
)
from tests.resources.h2o_training import train, trainer_for


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


def lying(name: str) -> bytes:
    """An archive in which one file is larger than the directory says."""
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
        for file, data in (adapter_files() | {name: bytes(3_000_000)}).items():
            zipped.writestr(file, data)
    content = buffer.getvalue()
    true, told = (3_000_000).to_bytes(4, "little"), (30).to_bytes(4, "little")
    assert content.count(true) == 2, "once beside the file, once in the directory"
    content = content.replace(true, told)
    with zipfile.ZipFile(BytesIO(content)) as zipped:
        assert zipped.getinfo(name).file_size == 30
    return content


def test_a_file_larger_than_its_archive_says_fills_no_disk(server: H2OServer, request_: TrainingRequest) -> None:
    server.archive = lying("adapter_model/training_log.jsonl")
    with pytest.raises(FinetuneError, match=r"damaged|larger than announced"):
        train(trainer_for(server), request_)
    assert not request_.adapter_dir.exists()
    assert sum(path.stat().st_size for path in request_.work_dir.rglob("*")) < 1_000_000


@pytest.mark.parametrize("config", [b"[]", b"{", b"\xff", b"[" * 100_000])
def test_a_configuration_that_is_none_is_refused(server: H2OServer, request_: TrainingRequest, config: bytes) -> None:
    server.archive = archive(adapter_files() | {f"adapter_model/{CONFIG_NAME}": config})
    with pytest.raises(TrainingError, match="configuration is no JSON"):
        train(trainer_for(server), request_)
    assert not request_.adapter_dir.exists()


def test_a_training_log_that_is_none_costs_no_adapter(server: H2OServer, request_: TrainingRequest) -> None:
    log = b"\xff\n[\n" + b"[" * 100_000 + b'\n{"step": 1, "loss": 2.5, "learning_rate": 0.1}\n'
    server.archive = archive(adapter_files() | {"adapter_model/training_log.jsonl": log})
    assert [point.loss for point in train(trainer_for(server), request_).loss_curve] == [2.5]
