"""``python -m h2o_gateway``: serve."""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import socket
import sqlite3
import sys
from pathlib import Path

import uvicorn
from pydantic import ValidationError

from finetune.errors import ConfigurationError
from finetune.logs import line_formatter
from finetune.redaction import Redactor
from h2o_gateway.app import create_app
from h2o_gateway.settings import PREFIX, Settings

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def main() -> int:
    """Serve until a signal comes; trainings outlive it."""
    try:
        settings = _settings()
        _set_up_logs(settings)
        lock = _only_gateway(settings.data_dir)
        key, origin = _key(settings)
        listener = _listener(settings)
        app = create_app(settings, key)
    except sqlite3.Error as error:
        print(f"error: the database cannot be used: {error} [{settings.data_dir}]", file=sys.stderr)
        return 2
    except (ConfigurationError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    host, port = listener.getsockname()[:2]
    print(
        f"H2O LLM Studio gateway: http://{f'[{host}]' if ':' in host else host}:{port} (its API: /docs)\n"
        f"data:     {settings.data_dir}\n"
        f"training: {settings.train_command}   in {settings.studio_dir}, devices {', '.join(settings.slots)}\n"
        f"clients:  TRAINING_BACKEND=h2o H2O_API_URL=http://{host}:{port} H2O_API_KEY={origin}\n"
        f"settings: {PREFIX}STUDIO_DIR, _TRAIN_COMMAND, _GPUS, _MODELS and others, see docs/h2o.md",
        flush=True,
    )
    # Clients that poll once a minute keep their connection. Of uvicorn's two protocols h11 alone limits headers.
    config = uvicorn.Config(app, http="h11", log_level="warning", timeout_keep_alive=75, timeout_graceful_shutdown=5)
    uvicorn.Server(config).run(sockets=[listener])
    os.close(lock)
    return 0


def _set_up_logs(settings: Settings) -> None:
    handler = logging.StreamHandler()
    secrets_ = [each.get_secret_value() for each in (settings.api_key, settings.webhook_secret) if each]
    handler.setFormatter(line_formatter(settings.log_format, Redactor([*secrets_, settings.webhook_url or ""])))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("httpx").setLevel(logging.WARNING)


def _settings() -> Settings:
    try:
        return Settings()
    except ValidationError as error:
        faults = "; ".join(
            f"{PREFIX}{'.'.join(map(str, fault['loc'])).upper()}: {fault['msg']}" for fault in error.errors()
        )
        raise ConfigurationError(faults, remedy="Correct the gateway's environment") from None


def _only_gateway(data_dir: Path) -> int:
    """A lock that is held while this process lives."""
    data_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(data_dir / "gateway.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigurationError(
            "another gateway works here", where=data_dir, remedy=f"Stop it, or set {PREFIX}DATA_DIR to another place"
        ) from None
    return descriptor


def _key(settings: Settings) -> tuple[str, str]:
    """The key, and how to tell where it is without telling it."""
    if settings.api_key:
        key = settings.api_key.get_secret_value().strip()
        if not key or not all("!" <= character <= "~" for character in key):
            raise ConfigurationError("the key holds characters that an HTTP header cannot", where=f"{PREFIX}API_KEY")
        return key, f"(the value of {PREFIX}API_KEY)"
    if settings.host not in _LOOPBACK:
        raise ConfigurationError(
            "a gateway that others can reach needs a key", where=f"{PREFIX}API_KEY", remedy="Set it to a long secret"
        )
    path = settings.data_dir / "key"
    if not path.exists():
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            stream.write(secrets.token_urlsafe(32) + "\n")
    return path.read_text(encoding="ascii").strip(), f"$(cat {path})"


def _listener(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family)
    except OSError as error:
        # It names the address.
        raise ConfigurationError(
            error.strerror or str(error), remedy=f"Set {PREFIX}HOST and {PREFIX}PORT to what is free here"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
