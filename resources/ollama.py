"""The Ollama server on which trained models are created."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import httpx
from pydantic import Field

from finetune.errors import ConfigurationError, ExportError, RemoteError
from finetune.export.modelfile import MODELFILE, MODELFILE_MERGED, read_modelfile
from finetune.export.models import OllamaExport
from finetune.layout import DataLayout
from finetune.progress import Progress, ProgressEvent, ignore_progress
from finetune.publishing import is_complete, sha256_file
from finetune.registry.promotion import champion

if TYPE_CHECKING:
    import ollama

CHAMPION_TAG = "champion"
_TEST_PROMPT = "Hello"


class OllamaServer(dg.ConfigurableResource["OllamaServer"]):
    """Creates models on a running Ollama server; does nothing where no host is set."""

    host: str | None = Field(None, description="The server's address, as http://ollama:11434; none: no server.")
    timeout: float = Field(600.0, description="Seconds that the server may take to answer.")

    def create_from(self, export: OllamaExport, *, name: str, on_progress: Progress = ignore_progress) -> str:
        """Create the model of ``Modelfile`` (base + adapter), else of ``Modelfile.merged``; returns `name`."""
        return self.create_model(name, export.modelfile or export.modelfile_merged, on_progress=on_progress)

    def create_model(self, name: str, modelfile: Path, *, on_progress: Progress = ignore_progress) -> str:
        """Create a model from a Modelfile; returns its name.

        GGUF files are uploaded as blobs by their digest, and only where the server lacks them. Creating
        the same model again changes nothing.

        Args:
            name: the model's name and tag, as ``predator-v21:1a2b3c``.
            modelfile: a Modelfile whose FROM and ADAPTER are GGUF files.
            on_progress: told of what the server reports.

        Raises:
            ConfigurationError: the host is no address.
            ExportError: no host is set, the server refuses the model, or it does not answer with it.
            RemoteError: the server cannot be reached or is busy.
        """
        client, host = self._connect()
        with self._errors(name):
            request = _create_request(client, host, modelfile, on_progress)
            for status in client.create(model=name, stream=True, **request):
                on_progress(
                    ProgressEvent(f"ollama: {status.status or ''}", status.completed or 0, status.total, "bytes")
                )
            answer = client.chat(
                model=name, messages=[{"role": "user", "content": _TEST_PROMPT}], options={"num_predict": 8}
            )
        if not answer.done:
            raise ExportError("the created model did not finish an answer", where=f"{self.host} {name}")
        return name

    def serve_champion(
        self, layout: DataLayout, model_name: str, *, on_progress: Progress = ignore_progress
    ) -> str | None:
        """Point ``<model_name>:champion`` at the model of the version that reigns.

        The registry is the truth and is written before: a call that was killed or failed is made good by
        the next one, and calls at once agree, as each looks again at who reigns when it is done. A model
        that the server lacks is created from its exports.

        Returns:
            The model that is served now, or None where nobody reigns or its exports are not made yet.

        Raises:
            ConfigurationError: the host is no address.
            ExportError: no host is set, or the server refuses the model.
            RemoteError: the server cannot be reached or is busy.
        """
        served: str | None = None
        while (reigning := champion(layout.registry)) is not None:
            name = f"{model_name}:{reigning.run_id}"
            if name == served:
                break
            if not self._copy(name, f"{model_name}:{CHAMPION_TAG}"):
                exports = layout.model(reigning.run_id, "ollama")
                if not is_complete(exports):
                    return None
                modelfile = exports / MODELFILE
                if not modelfile.is_file():
                    modelfile = exports / MODELFILE_MERGED
                self.create_model(name, modelfile, on_progress=on_progress)
                if not self._copy(name, f"{model_name}:{CHAMPION_TAG}"):
                    raise ExportError("the server lost the model that it created", where=f"{self.host} {name}")
            served = name
        return served

    def _copy(self, source: str, destination: str) -> bool:
        """Give a model a second name, whatever bore that name; whether the server has the model."""
        import ollama

        client, _ = self._connect()
        with self._errors(source):
            try:
                client.copy(source, destination)
            except ollama.ResponseError as error:
                if error.status_code != httpx.codes.NOT_FOUND:
                    raise
                return False
        return True

    def _connect(self) -> tuple[ollama.Client, str]:
        """A client, and the server's address as a URL."""
        if self.host is None:
            raise ExportError("no Ollama server is set", where="OLLAMA_HOST", remedy="Set it to the server's address")
        import ollama

        host = (self.host if "://" in self.host else f"http://{self.host}").rstrip("/")
        try:
            return ollama.Client(host=host, timeout=self.timeout, trust_env=False), host
        except ValueError as error:
            raise ConfigurationError(
                f"not a server's address: {error}", where=f"OLLAMA_HOST={host}", remedy="Set it as http://ollama:11434"
            ) from error

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        import ollama

        where = f"{self.host} {name}"
        try:
            yield
        except ollama.ResponseError as error:
            # Errors that come late in a stream have no status but that of the response, 200.
            if error.status_code in (408, 429, 502, 503, 504):
                raise RemoteError(f"Ollama is busy: {error.error}", where=where, remedy="Try again later") from error
            raise ExportError(
                f"Ollama refuses the model: {error.error}", where=where, remedy="See the server's log"
            ) from error
        except (ConnectionError, httpx.TransportError) as error:
            raise RemoteError(
                f"the Ollama server cannot be reached: {error}", where=where, remedy="Start it, or correct OLLAMA_HOST"
            ) from error
        except ValueError as error:
            raise ExportError(
                f"the server does not answer as Ollama does: {error}", where=where, remedy="Correct OLLAMA_HOST"
            ) from error


def _upload(client: ollama.Client, host: str, path: Path) -> str:
    """Bring a file to the server, unless it is there; returns its digest."""
    digest = f"sha256:{sha256_file(path)}"
    present = httpx.head(f"{host}/api/blobs/{digest}", timeout=60, trust_env=False)
    return digest if present.status_code == httpx.codes.OK else client.create_blob(path)


def _create_request(client: ollama.Client, host: str, modelfile: Path, on_progress: Progress) -> dict[str, Any]:
    """The Modelfile as the fields of ``POST /api/create``, its files uploaded."""
    files: dict[str, dict[str, str]] = {"from": {}, "adapter": {}}
    texts: dict[str, str] = {}
    parameters: dict[str, Any] = {}
    for command in read_modelfile(modelfile):
        if command.name in files:
            path = Path(command.value)
            on_progress(ProgressEvent(f"ollama: upload {path.name}", 0, path.stat().st_size, "bytes"))
            files[command.name][path.name] = _upload(client, host, path)
        elif command.name in ("template", "system", "license"):
            texts[command.name] = command.value
        elif command.name == "stop":
            parameters.setdefault("stop", []).append(command.value)
        else:
            parameters[command.name] = int(command.value) if command.value.isdigit() else command.value
    request: dict[str, Any] = {"files": files["from"], "parameters": parameters, **texts}
    return request | ({"adapters": files["adapter"]} if files["adapter"] else {})
