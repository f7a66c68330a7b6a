"""What a delegated training must not forget when its process is killed."""

from pathlib import Path

from pydantic import BaseModel, ValidationError

from finetune.publishing import write_bytes_atomically


class RemoteState(BaseModel):
    """The remote side of one training: which server, what is there already.

    `generation` counts the experiments of this training that have ended badly: the next one needs an
    idempotency key of its own.
    """

    server: str
    dataset_sha256: str = ""
    dataset_id: str | None = None
    experiment_id: str | None = None
    generation: int = 1

    @classmethod
    def load(cls, path: Path, *, server: str) -> "RemoteState":
        """The stored state, or a fresh one where there is none for this server."""
        try:
            state = cls.model_validate_json(path.read_bytes())
        except (FileNotFoundError, ValidationError):
            # Written atomically, so a damaged file is nobody's work in progress; the server knows our key.
            return cls(server=server)
        return state if state.server == server else cls(server=server)

    def save(self, path: Path) -> None:
        """Write it atomically.

        Raises:
            StorageFullError: the disk is full.
        """
        write_bytes_atomically(path, (self.model_dump_json(indent=2) + "\n").encode())

    def key(self, run_id: str) -> str:
        """The idempotency key of the experiment."""
        return run_id if self.generation == 1 else f"{run_id}.{self.generation}"
