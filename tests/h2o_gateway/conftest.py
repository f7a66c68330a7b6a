from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetune.base_model.models import BaseModelRef
from tests.h2o_gateway.process import GatewayProcess

Launch = Callable[..., GatewayProcess]


@pytest.fixture
def launch(tmp_path: Path, tiny_model: BaseModelRef) -> Iterator[Launch]:
    """Starts gateways of the test's own; settings by their names."""
    started: list[GatewayProcess] = []

    def start(**settings: str) -> GatewayProcess:
        started.append(GatewayProcess(tmp_path / "gateway", tiny_model.path, **settings))
        return started[-1]

    yield start
    for gateway in started:
        gateway.close()


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory, tiny_model: BaseModelRef) -> Iterator[GatewayProcess]:
    """One gateway with one device for all tests that do it no harm."""
    process = GatewayProcess(
        tmp_path_factory.mktemp("h2o") / "gateway",
        tiny_model.path,
        MAX_DATASET_BYTES="200000",
        MAX_REQUEST_BYTES="20000",
        STOP_GRACE_SECONDS="0.5",
        BODY_IDLE_SECONDS="1",
    )
    yield process
    process.close()
