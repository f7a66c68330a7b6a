"""Remote training: H2O LLM Studio trains, this process waits and fetches the adapter.

No training library is needed here. Killed at any moment and called again, it goes on with the same
experiment: what is known lies in the work directory, and the server is asked for our key before an
experiment is created.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field

from finetune.errors import ConfigurationError, RemoteError, TrainingError
from finetune.progress import Progress, ProgressEvent, ignore_progress
from finetune.publishing import is_complete, sha256_file
from finetune.training.models import TrainingRequest, TrainingResult
from finetune.training.ownership import StillMine, always_mine, refuse_if_taken_over
from resources.h2o.adapter import publish_adapter, published_result
from resources.h2o.client import H2OClient
from resources.h2o.download import download
from resources.h2o.polling import StalledError, wait_for_end
from resources.h2o.protocol import Experiment, Limits, Protocol, Timing
from resources.h2o.state import RemoteState
from resources.trainer import Backend, LoraTrainer, OnExternalRun

_STATE = "h2o.json"
_ARCHIVE = "adapter.zip"


class H2OTrainer(LoraTrainer):
    """Delegates training to an H2O LLM Studio server over HTTP."""

    api_url: str = Field(description="The server's address (H2O_API_URL).")
    api_key: str | None = Field(default=None, repr=False, description="Bearer key (H2O_API_KEY).")
    ca_file: str | None = Field(default=None, description="PEM file of a private certificate authority.")
    protocol: Protocol = Field(default_factory=Protocol, description="Routes, status names, field names.")
    timing: Timing = Field(default_factory=Timing, description="Time-outs, intervals and budgets in seconds.")
    limits: Limits = Field(default_factory=Limits, description="What the server may send at most.")

    @property
    def backend(self) -> Backend:
        """``h2o``."""
        return "h2o"

    def train(
        self,
        request: TrainingRequest,
        *,
        on_progress: Progress,
        on_external_run: OnExternalRun,
        still_mine: StillMine = always_mine,
    ) -> TrainingResult:
        """Upload, create, wait, fetch, publish; each only if it has not been done.

        Raises:
            ConfigurationError: the address, the key, the certificate or a name of the protocol is wrong, or the
                training shall start from an adapter.
            TrainingError: the server refuses, or the experiment failed, was stopped, vanished or stalled,
                or what it delivered is no safe adapter.
            RemoteError: the server stayed away longer than the retry budget.
            TransientError: another process has taken the training over.
        """
        if is_complete(request.adapter_dir):
            return published_result(request.adapter_dir)
        if request.init_adapter is not None:
            raise ConfigurationError(
                f"the H2O server cannot start a training from an adapter ({request.init_adapter.run_id})",
                where=f"the training {request.run_id}",
                remedy="Train with TRAINING_BACKEND=hf-peft, or with INIT_FROM=base",
            )
        begun = time.monotonic()
        work = request.work_dir
        work.mkdir(parents=True, exist_ok=True)
        with self._client(on_progress) as client:
            state = RemoteState.load(work / _STATE, server=client.api_url)
            experiment = self._experiment(client, request, state, on_progress)
            url = experiment.url or client.api_url + client.route(self.protocol.experiment_route, experiment.id)
            on_external_run(experiment.id, url)
            deadline = _deadline(begun + self.timing.total, client, experiment)
            try:
                experiment = wait_for_end(client, experiment, deadline=deadline, on_progress=on_progress)
            except StalledError:
                raise
            except TrainingError:
                # The next run creates a new experiment, under a key of its own.
                state.generation += 1
                _forget_experiment(state, work / _STATE)
                raise
            archive = self._fetch(client, experiment, work, deadline, on_progress)
        seconds = time.monotonic() - begun
        refuse_if_taken_over(still_mine, request.adapter_dir)
        result = publish_adapter(
            archive,
            request,
            experiment,
            experiment_url=url,
            seconds=seconds,
            gpu_hours=experiment.metrics.get(self.protocol.gpu_hours_metric, seconds / 3600),
            final_loss=experiment.metrics.get(self.protocol.loss_metric),
            limits=self.limits,
        )
        archive.unlink()
        return result

    def cancel(self, run_id: str, work_dir: Path) -> bool:
        """Stop the training's experiment, if there is one and the server can; the next run makes a new one.

        Raises:
            ConfigurationError: the address or the key is wrong.
            RemoteError: the server stays away; it is not waited for long.
        """
        patience = self.timing.cancel_budget
        timing = self.timing.model_copy(
            update={
                "retry_budget": min(patience, self.timing.retry_budget),
                "read_timeout": min(patience, self.timing.read_timeout),
                "answer_timeout": min(patience, self.timing.answer_timeout),
            }
        )
        with self._client(ignore_progress, timing) as client:
            state = RemoteState.load(work_dir / _STATE, server=client.api_url)
            found = None if state.experiment_id else client.find_experiment(state.key(run_id))
            experiment_id = state.experiment_id or (found and found.id)
            if not experiment_id or not client.cancel_experiment(experiment_id):
                return False
            state.generation += 1
            _forget_experiment(state, work_dir / _STATE)
            return True

    def _client(self, on_progress: Progress, timing: Timing | None = None) -> H2OClient:
        def on_wait(message: str) -> None:
            on_progress(ProgressEvent(f"waiting for the H2O server ({message})", 0, None, "steps"))

        return H2OClient(
            self.api_url,
            self.api_key,
            ca_file=self.ca_file,
            protocol=self.protocol,
            timing=timing or self.timing,
            on_wait=on_wait,
        )

    def _experiment(
        self, client: H2OClient, request: TrainingRequest, state: RemoteState, on_progress: Progress
    ) -> Experiment:
        """The running or finished experiment of this training, created if there is none."""
        path = request.work_dir / _STATE
        if state.experiment_id:
            try:
                return client.get_experiment(state.experiment_id)
            except TrainingError:
                _forget_experiment(state, path)
                raise
        while (found := client.find_experiment(state.key(request.run_id))) and found.status in ("failed", "stopped"):
            state.generation += 1
        if found is None:
            self._upload(client, request, state, on_progress)
            try:
                found = client.create_experiment(state.key(request.run_id), _experiment_body(request, state))
            except TrainingError:
                # The server may have forgotten the dataset: the next run uploads it again.
                state.dataset_id = None
                state.save(path)
                raise
        state.experiment_id = found.id
        state.save(path)
        return found

    def _upload(self, client: H2OClient, request: TrainingRequest, state: RemoteState, on_progress: Progress) -> None:
        train_path = request.dataset.train_path
        sha256 = sha256_file(train_path)
        if state.dataset_id and state.dataset_sha256 == sha256:
            return
        size = train_path.stat().st_size
        on_progress(ProgressEvent("uploading the dataset", 0, size, "bytes"))
        name = f"{request.date}-{request.dataset.fingerprint[:12]}"
        state.dataset_id = client.upload_dataset(train_path, name=name, sha256=sha256)
        state.dataset_sha256 = sha256
        state.save(request.work_dir / _STATE)
        on_progress(ProgressEvent("uploading the dataset", size, size, "bytes"))

    def _fetch(
        self,
        client: H2OClient,
        experiment: Experiment,
        work: Path,
        deadline: Callable[[], None],
        on_progress: Progress,
    ) -> Path:
        told = 0

        def on_bytes(done: int, total: int | None) -> None:
            nonlocal told
            deadline()
            if done == total or done - told >= 16 << 20:
                told = done
                on_progress(ProgressEvent("downloading the adapter", done, total, "bytes"))

        archive = work / _ARCHIVE
        download(
            client,
            client.route(self.protocol.download_route, experiment.id),
            archive,
            sha256=experiment.sha256,
            limit_bytes=self.limits.download_bytes,
            on_bytes=on_bytes,
        )
        return archive


def _forget_experiment(state: RemoteState, path: Path) -> None:
    state.experiment_id = None
    state.save(path)


def _deadline(end: float, client: H2OClient, experiment: Experiment) -> Callable[[], None]:
    def check() -> None:
        if time.monotonic() > end:
            raise RemoteError(
                f"the experiment {experiment.id} took longer than {client.timing.total:g} s",
                where=experiment.url or client.api_url,
                remedy="Raise H2O_TIMING's total; a later run goes on where this one stopped",
            )

    return check


def _experiment_body(request: TrainingRequest, state: RemoteState) -> dict[str, Any]:
    return {
        "name": state.key(request.run_id),
        "dataset_id": state.dataset_id,
        "base_model": request.base_model.name,
        "base_model_revision": request.base_model.revision,
        "base_model_fingerprint": request.base_model.fingerprint,
        "config": request.plan.trial_config.model_dump(mode="json"),
    }
