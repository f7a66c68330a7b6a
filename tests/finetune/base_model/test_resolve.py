from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from finetune.base_model.models import BaseModelRef
from finetune.base_model.names import SHORT_NAMES
from finetune.base_model.resolve import resolve_base_model
from finetune.errors import BaseModelError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Nothing listens on the discard port of this machine.
NOWHERE = "http://127.0.0.1:9"


class Hub:
    """The hub's calls that a download needs, over one directory of files: the repository ``org/model``."""

    def __init__(self, files: Path, *, token: str | None = None) -> None:
        self.files, self.token = files, token
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                hub.requests.append(path)
                status, content, headers = hub.reply(path, self.headers.get("Authorization"))
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def reply(self, path: str, authorization: str | None) -> tuple[int, bytes, dict[str, str]]:
        if self.token is not None and authorization != f"Bearer {self.token}":
            return 401, b"{}", {"X-Error-Code": "GatedRepo"}
        api, place = "/api/models/org/model", f"/org/model/resolve/{COMMIT}/"
        files = {file.name: file.read_bytes() for file in sorted(self.files.iterdir())}
        if path in (api, *(f"{api}/revision/{revision}" for revision in ("main", "v1", COMMIT))):
            siblings = [{"rfilename": name} for name in files]
            return 200, json.dumps({"id": "org/model", "sha": COMMIT, "siblings": siblings}).encode(), {}
        if path == f"{api}/tree/{COMMIT}":
            tree = [{"type": "file", "path": name, "oid": name, "size": len(files[name])} for name in files]
            return 200, json.dumps(tree).encode(), {}
        if path.startswith(f"{api}/revision/"):
            return 404, b"{}", {"X-Error-Code": "RevisionNotFound"}
        if (name := path.removeprefix(place)) in files:
            return 200, files[name], {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}
        return 404, b"{}", {"X-Error-Code": "RepoNotFound"}

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hub(model_directory: Path) -> Iterator[Hub]:
    (model_directory / "pytorch_model.bin").write_bytes(b"an old copy of the weights")
    found = Hub(model_directory)
    yield found
    found.close()


def test_a_local_directory_is_used_in_place(model_directory: Path, tmp_path: Path) -> None:
    found = resolve_base_model(str(model_directory), cache_dir=tmp_path / "cache")
    assert found.path == model_directory
    assert not found.embedded
    assert resolve_base_model(str(model_directory), cache_dir=tmp_path / "cache") == found


def test_another_weight_gives_another_fingerprint(model_directory: Path, tmp_path: Path) -> None:
    before = resolve_base_model(str(model_directory), cache_dir=tmp_path / "cache")
    weights = model_directory / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    after = resolve_base_model(str(model_directory), cache_dir=tmp_path / "cache")
    assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.safetensors", lambda content: content[:-100], r"has \d+ bytes, its header promises \d+"),
        ("model.safetensors", lambda content: content + b"x", r"has \d+ bytes, its header promises \d+"),
        ("model.safetensors", lambda content: b"\xff" * 64 + content[64:], "header is unreadable"),
        ("model.safetensors", lambda content: content[:40], "header is unreadable"),
        ("model.safetensors", lambda content: b"", "weight file is empty"),
        ("model.safetensors", None, "no weights"),
        ("config.json", lambda content: content[:-20], "not JSON"),
        ("config.json", lambda content: b"{}", "names no model_type"),
        ("config.json", None, "can't read"),
        ("tokenizer.json", lambda content: content[: len(content) // 2], "not JSON"),
        ("tokenizer.json", None, "has no tokenizer"),
    ],
)
def test_a_damaged_model_is_refused_with_the_file_named(
    model_directory: Path, tmp_path: Path, name: str, damage: object, message: str
) -> None:
    file = model_directory / name
    if callable(damage):
        file.write_bytes(damage(file.read_bytes()))
    else:
        file.unlink()
    with pytest.raises(BaseModelError, match=message) as caught:
        resolve_base_model(str(model_directory), cache_dir=tmp_path / "cache")
    assert caught.value.where in (str(file), str(model_directory))
    assert caught.value.remedy


def test_a_missing_shard_is_named(model_directory: Path, tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model_directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (model_directory / "model.safetensors").rename(model_directory / "model-00001-of-00002.safetensors")
    with pytest.raises(BaseModelError, match=r"weight file is missing \[.*model-00002-of-00002"):
        resolve_base_model(str(model_directory), cache_dir=tmp_path / "cache")


def test_a_path_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"does not exist \[BASE_MODEL_NAME=/.*hub"):
        resolve_base_model(str(tmp_path / "nothing"), cache_dir=tmp_path)


def test_a_hub_model_is_fetched_once_with_one_kind_of_weights(hub: Hub, tmp_path: Path) -> None:
    found = resolve_base_model("org/model", cache_dir=tmp_path, endpoint=hub.address)
    assert found.model_dump(exclude={"path"}) == {
        "name": "org/model",
        "revision": COMMIT,
        "fingerprint": COMMIT,
        "embedded": False,
        "trust_remote_code": False,
    }
    assert (found.path / "model.safetensors").is_file()
    assert not (found.path / "pytorch_model.bin").exists()
    assert found.path.is_relative_to(tmp_path / "hub")


def test_without_weights_only_small_files_are_fetched(hub: Hub, tmp_path: Path) -> None:
    found = resolve_base_model("org/model", cache_dir=tmp_path, endpoint=hub.address, weights=False)
    assert (found.path / "tokenizer.json").is_file()
    assert not [path for path in hub.requests if path.endswith(".safetensors")]


def test_what_was_fetched_serves_when_the_hub_is_away(hub: Hub, tmp_path: Path) -> None:
    online = resolve_base_model("org/model", cache_dir=tmp_path, endpoint=hub.address)
    hub.close()
    assert resolve_base_model("org/model", cache_dir=tmp_path, endpoint=hub.address) == online


def test_a_cache_without_the_weights_is_not_a_model(hub: Hub, tmp_path: Path) -> None:
    resolve_base_model("org/model", cache_dir=tmp_path, endpoint=hub.address, weights=False)
    hub.close()
    with pytest.raises(BaseModelError, match="is not in the cache"):
        resolve_base_model("org/model", cache_dir=tmp_path, endpoint=hub.address)


def test_a_revision_is_asked_for_and_an_unknown_one_is_named(hub: Hub, tmp_path: Path) -> None:
    assert resolve_base_model("org/model", cache_dir=tmp_path, endpoint=hub.address, revision="v1").revision == COMMIT
    assert any(path.endswith("/revision/v1") for path in hub.requests)
    with pytest.raises(BaseModelError, match="BASE_MODEL_REVISION"):
        resolve_base_model("org/model", cache_dir=tmp_path, endpoint=hub.address, revision="v9")


def test_a_gated_model_wants_a_token(model_directory: Path, tmp_path: Path) -> None:
    hub = Hub(model_directory, token="hf_right")
    try:
        with pytest.raises(BaseModelError, match=r"gated.*HF_TOKEN"):
            resolve_base_model("org/model", cache_dir=tmp_path, endpoint=hub.address, token="hf_wrong")
        assert resolve_base_model("org/model", cache_dir=tmp_path, endpoint=hub.address, token="hf_right").revision
    finally:
        hub.close()


@pytest.mark.parametrize("name", ["org/other", "not a name", "a/b/c"])
def test_a_name_that_nobody_has_names_the_setting_and_what_was_tried(hub: Hub, tmp_path: Path, name: str) -> None:
    with pytest.raises(BaseModelError) as caught:
        resolve_base_model(name, cache_dir=tmp_path, endpoint=hub.address)
    assert caught.value.where == f"BASE_MODEL_NAME={name}"
    assert "tried the directory" in caught.value.what
    assert hub.address in caught.value.what


def test_a_short_name_that_there_is_none_of_gets_the_list_of_those_that_there_are(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError) as caught:
        resolve_base_model("llama3-9b", cache_dir=tmp_path, endpoint=hub.address)
    assert all(name in caught.value.what for name in SHORT_NAMES)
    with pytest.raises(BaseModelError) as caught:
        resolve_base_model("org/other", cache_dir=tmp_path, endpoint=hub.address)
    assert "llama3-8b" not in caught.value.what


def test_an_unreachable_hub_names_the_setting_the_short_names_repository_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError) as caught:
        resolve_base_model("llama3-8b", cache_dir=tmp_path, endpoint=NOWHERE)
    assert caught.value.where == "BASE_MODEL_NAME=llama3-8b"
    assert "meta-llama/Meta-Llama-3-8B-Instruct" in caught.value.what
    assert NOWHERE in caught.value.what
    assert "HF_ENDPOINT" in caught.value.remedy


def test_short_names_stand_for_models_with_a_chat_template() -> None:
    assert SHORT_NAMES["llama3-8b"] == "meta-llama/Meta-Llama-3-8B-Instruct"
    assert all(name == name.lower() and repository.count("/") == 1 for name, repository in SHORT_NAMES.items())


def test_no_name_gives_the_embedded_model(tiny_model: BaseModelRef, tmp_path: Path) -> None:
    shutil.copytree(tiny_model.path, tmp_path / tiny_model.path.name)
    assert resolve_base_model(None, cache_dir=tmp_path).fingerprint == tiny_model.fingerprint
