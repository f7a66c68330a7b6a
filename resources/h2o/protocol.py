"""What the server calls things, and how long it is waited for: settings, since its API is not standardised."""

from typing import Any, Literal

import dagster as dg
from pydantic import BaseModel, ConfigDict, Field

from finetune.errors import ConfigurationError

RemoteStatus = Literal["queued", "running", "finished", "failed", "stopped"]


class Protocol(dg.Config):
    """Routes, status names and field names of the server."""

    datasets_route: str = Field(default="/api/datasets", description="POST: upload a dataset.")
    experiments_route: str = Field(
        default="/api/experiments", description="POST: create an experiment; GET: list them, where the server can."
    )
    experiment_route: str = Field(default="/api/experiments/{id}", description="GET: an experiment's state.")
    download_route: str = Field(
        default="/api/experiments/{id}/download", description="GET: the finished adapter as a zip archive."
    )
    cancel_route: str = Field(
        default="/api/experiments/{id}/cancel", description="POST: stop an experiment, where the server can."
    )

    queued_statuses: list[str] = Field(default=["queued", "pending"], description="Names for: not yet running.")
    running_statuses: list[str] = Field(default=["running"], description="Names for: training.")
    finished_statuses: list[str] = Field(default=["finished", "completed"], description="Names for: adapter ready.")
    failed_statuses: list[str] = Field(default=["failed"], description="Names for: ended with an error.")
    stopped_statuses: list[str] = Field(default=["stopped", "cancelled"], description="Names for: ended by someone.")

    id_field: str = Field(default="id", description="Id of a dataset or experiment.")
    status_field: str = Field(default="status", description="Status of an experiment.")
    step_field: str = Field(default="step", description="Optimizer steps done.")
    total_steps_field: str = Field(default="total_steps", description="Optimizer steps planned.")
    metrics_field: str = Field(default="metrics", description="Object of figures by name.")
    loss_metric: str = Field(default="loss", description="The training loss among the metrics.")
    gpu_hours_metric: str = Field(default="gpu_hours", description="The GPU hours used among the metrics.")
    error_field: str = Field(default="error", description="Why an experiment failed.")
    log_field: str = Field(default="log_tail", description="Last lines of an experiment's log.")
    url_field: str = Field(default="url", description="Link to the experiment for people.")
    sha256_field: str = Field(default="sha256", description="SHA-256 of a dataset, or of a finished archive.")
    key_field: str = Field(default="idempotency_key", description="Our key, in creation, query and listing.")
    list_field: str = Field(default="experiments", description="Array in a listing that is an object.")

    def status(self, name: str) -> RemoteStatus:
        """Our name of a status.

        Raises:
            ConfigurationError: the server's name is in none of the lists.
        """
        known: dict[RemoteStatus, list[str]] = {
            "queued": self.queued_statuses,
            "running": self.running_statuses,
            "finished": self.finished_statuses,
            "failed": self.failed_statuses,
            "stopped": self.stopped_statuses,
        }
        for status, names in known.items():
            if name.casefold() in map(str.casefold, names):
                return status
        raise ConfigurationError(
            f"the H2O server reports the unknown status {name[:100]!r}",
            where=self.experiment_route,
            remedy="Add the name to one of the status lists in H2O_PROTOCOL",
        )


class Timing(dg.Config):
    """Waiting, in seconds. Waits grow by doubling, with jitter, up to their ceiling."""

    connect_timeout: float = Field(default=10, gt=0, description="Until a connection stands.")
    read_timeout: float = Field(default=60, gt=0, description="Between two pieces of an answer.")
    answer_timeout: float = Field(default=180, gt=0, description="For a whole answer other than a download.")
    poll: float = Field(default=5, gt=0, description="Between the first looks at an experiment.")
    poll_ceiling: float = Field(default=60, gt=0, description="Between later looks.")
    retry: float = Field(default=1, gt=0, description="After the first failure of a call.")
    retry_ceiling: float = Field(default=60, gt=0, description="Between later trials of a call.")
    retry_budget: float = Field(default=3600, ge=0, description="How long an outage may last before a call gives up.")
    stalled: float = Field(default=3600, gt=0, description="Running without any news for so long is an error.")
    total: float = Field(default=7 * 86400, gt=0, description="From the start until the adapter is there.")
    cancel_budget: float = Field(
        default=15, gt=0, description="How long a cancelled run goes on telling the server: a pod has 30 s to end."
    )


class Limits(dg.Config):
    """What a server may send at most."""

    download_bytes: int = Field(default=16 << 30, gt=0, description="Size of the archive.")
    unpacked_bytes: int = Field(default=32 << 30, gt=0, description="Size of its files together.")
    files: int = Field(default=1000, gt=0, description="Number of its files.")


class Experiment(BaseModel):
    """What the server says of an experiment, in our words."""

    model_config = ConfigDict(frozen=True)

    id: str
    status: RemoteStatus
    step: int = 0
    total_steps: int | None = None
    metrics: dict[str, float] = {}
    error: str = ""
    log_tail: str = ""
    url: str = ""
    sha256: str | None = None

    @classmethod
    def read(cls, answer: Any, protocol: Protocol) -> "Experiment":
        """An experiment from the server's JSON.

        Raises:
            ConfigurationError: the status is unknown.
            ValueError: the id or the status is missing, or a field is of another type.
            OverflowError: a figure is larger than any float.
        """
        identifier = read_id(answer, protocol)
        status = answer.get(protocol.status_field)
        if not isinstance(status, str):
            raise ValueError(f"no field {protocol.status_field!r}")
        metrics = answer.get(protocol.metrics_field) or {}
        log_tail = answer.get(protocol.log_field) or ""
        return cls(
            id=identifier,
            status=protocol.status(status),
            step=answer.get(protocol.step_field) or 0,
            total_steps=answer.get(protocol.total_steps_field),
            metrics={
                str(name): float(value)
                for name, value in (metrics.items() if isinstance(metrics, dict) else ())
                if isinstance(value, int | float) and not isinstance(value, bool)
            },
            error=str(answer.get(protocol.error_field) or ""),
            log_tail="\n".join(map(str, log_tail)) if isinstance(log_tail, list) else str(log_tail),
            url=_link(answer.get(protocol.url_field)),
            sha256=str(answer[protocol.sha256_field]).lower() if answer.get(protocol.sha256_field) else None,
        )


def read_id(answer: Any, protocol: Protocol) -> str:
    """The id of a dataset or experiment, which can be stored and stand in a path.

    Raises:
        ValueError: there is none, or no such one.
    """
    value = answer.get(protocol.id_field) if isinstance(answer, dict) else None
    identifier = "" if value is None else str(value)
    # Of dots alone it would lead to another route.
    if not identifier.strip(".") or not identifier.isprintable() or len(identifier) > 200:
        raise ValueError(f"no usable field {protocol.id_field!r}")
    return identifier


def _link(value: Any) -> str:
    """The address as it may become a link on a page: nothing that runs in the reader's browser."""
    link = str(value or "")
    return link if link.startswith(("https://", "http://")) and link.isprintable() and len(link) <= 2000 else ""
