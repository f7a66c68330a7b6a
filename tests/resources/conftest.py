import functools
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.training.models import LossPoint, TrainingRequest
from finetune.training.plots import loss_curve_png
from resources.h2o import adapter
from resources.postgres import EmbeddedPostgres
from tests.resources.h2o_server import H2OServer
from tests.resources.h2o_training import request_in


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    """One real embedded PostgreSQL for the tests of this directory."""
    with tempfile.TemporaryDirectory(prefix="la-", dir="/tmp") as directory:
        server = EmbeddedPostgres(Path(directory))
        yield server
        server.close()


@pytest.fixture
def database(postgres: EmbeddedPostgres, request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of an empty database of the test's own."""
    import sqlalchemy as sa

    name = f"test_{abs(hash(request.node.nodeid)):x}"
    server = sa.create_engine(postgres.url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with server.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    yield postgres.url.replace("/postgres?", f"/{name}?")
    with server.connect() as connection:
        connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """A directory whose path is short enough for a unix socket, whatever pytest's own is like."""
    with tempfile.TemporaryDirectory(prefix="la-", dir="/tmp") as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Path]:
    """A cluster that was made once, to be copied: making one takes a second of a whole core."""
    with tempfile.TemporaryDirectory(prefix="la-", dir="/tmp") as directory:
        EmbeddedPostgres(Path(directory)).close()
        yield Path(directory) / "cluster"


@pytest.fixture
def data_root(short_directory: Path, cluster: Path) -> Path:
    """A data root whose embedded PostgreSQL exists already and stands still."""
    (short_directory / "postgres").mkdir()
    subprocess.run(["cp", "-a", cluster, short_directory / "postgres"], check=True)
    return short_directory


@pytest.fixture
def server() -> Iterator[H2OServer]:
    server = H2OServer()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def each_curve_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than anything else that the client does, and its tests have few different curves."""
    monkeypatch.setattr(adapter, "loss_curve_png", _drawn)


def _drawn(points: list[LossPoint]) -> bytes:
    return _drawn_once(tuple(point.model_dump_json() for point in points))


@functools.cache
def _drawn_once(points: tuple[str, ...]) -> bytes:
    return loss_curve_png([LossPoint.model_validate_json(point) for point in points])


@pytest.fixture
def request_(tmp_path: Path) -> TrainingRequest:
    return request_in(tmp_path)
