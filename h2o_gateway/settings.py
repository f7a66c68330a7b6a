"""The gateway's environment, typed: the only reader of it in this package."""

from __future__ import annotations

import shlex
from pathlib import Path

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from finetune.logs import LogFormat

PREFIX = "H2O_GATEWAY_"


class Settings(BaseSettings):
    """Every variable that the gateway reads: ``H2O_GATEWAY_`` and a field's name in capitals.

    An empty variable counts as unset.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="ignore", frozen=True)

    api_key: SecretStr | None = Field(
        None, description="Bearer key of the clients; unset: one is made and kept in DATA_DIR/key (on loopback only)."
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8760, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    public_url: str | None = Field(None, description="The gateway's address as others see it, for links.")
    data_dir: Path = Field(Path("data/h2o-gateway"), description="State, datasets, experiments.")

    log_format: LogFormat = Field("text", description="Log lines as text, or as json: one object a line.")

    studio_dir: Path = Field(Path(), description="H2O LLM Studio's checkout, where the training command runs.")
    train_command: str = Field(
        "python llm_studio/train.py -Y {config}", description="Trains the configuration file at {config}."
    )
    gpus: str = Field("0", description="Comma-separated devices; each trains one experiment at a time.")
    models: str = Field("", description="Comma-separated name=directory of base models on this machine.")
    allow_hub: bool = Field(True, description="Base models may be names on the Hugging Face hub too.")
    trust_remote_code: bool = Field(False, description="Allow code from base models' repositories to run.")
    studio_workers: int = Field(4, ge=0, description="H2O LLM Studio's data loading processes.")

    max_dataset_bytes: int = Field(16 << 30, gt=0, description="A larger dataset is refused.")
    max_request_bytes: int = Field(1 << 20, gt=0, description="Any other larger body is refused.")
    body_idle_seconds: float = Field(60.0, gt=0, description="A body that pauses for longer ends in 408.")
    poll_seconds: float = Field(1.0, gt=0, description="Between two looks at the running trainings.")
    stop_grace_seconds: float = Field(10.0, ge=0, description="From SIGTERM to SIGKILL when one is cancelled.")

    webhook_url: str | None = Field(None, description="Where status changes are posted; unset: nowhere.")
    webhook_secret: SecretStr | None = Field(None, description="Signs them; needed with WEBHOOK_URL.")
    webhook_give_up_seconds: float = Field(86400, gt=0, description="How long one is tried to be delivered.")

    @field_validator("data_dir", "studio_dir")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        return path.expanduser().absolute()

    @field_validator("train_command")
    @classmethod
    def _names_the_config(cls, command: str) -> str:
        if "{config}" not in command or not shlex.split(command):
            raise ValueError("the command must hold {config}")
        return command

    @field_validator("gpus")
    @classmethod
    def _distinct_devices(cls, text: str) -> str:
        devices = _listed(text)
        if not devices or len(set(devices)) != len(devices):
            raise ValueError("name each device once, such as 0,1")
        return text

    @field_validator("models")
    @classmethod
    def _named_directories(cls, text: str) -> str:
        for pair in _listed(text):
            name, _, path = pair.partition("=")
            if not name or not Path(path).expanduser().is_dir():
                raise ValueError(f"{pair!r} is no name=directory of a directory that exists")
        return text

    @model_validator(mode="after")
    def _webhook_is_signed(self) -> Settings:
        if self.webhook_url and not self.webhook_secret:
            raise ValueError(f"{PREFIX}WEBHOOK_URL needs {PREFIX}WEBHOOK_SECRET: callbacks are signed")
        return self

    @property
    def slots(self) -> list[str]:
        """The devices, in order."""
        return _listed(self.gpus)

    @property
    def model_paths(self) -> dict[str, Path]:
        """Local base models by name."""
        pairs = (pair.partition("=") for pair in _listed(self.models))
        return {name: Path(path).expanduser().absolute() for name, _, path in pairs}

    def command(self, config: Path) -> list[str]:
        """The training command's arguments."""
        return [part.replace("{config}", str(config)) for part in shlex.split(self.train_command)]


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
