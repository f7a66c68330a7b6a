"""The platform's PostgreSQL: the configured server, or the embedded one under the data root."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field, PrivateAttr

from finetune.errors import ConfigurationError, FinetuneError, RemoteError
from finetune.layout import DataLayout
from resources.postgres import EmbeddedPostgres

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

_CONNECT_ATTEMPTS = 3

# Runs a statement and returns its rows.
Execute = Callable[[str, Mapping[str, Any]], list[dict[str, Any]]]
# One transaction.
Transaction = Callable[[], AbstractContextManager[Execute]]


class Database(dg.ConfigurableResource):  # type: ignore[type-arg]  # generic in the value handed to assets: itself
    """PostgreSQL with the platform's tables, which are made or brought up to date with the first connection."""

    database_url: str = Field(
        default="", repr=False, description="PostgreSQL URL (DATABASE_URL); empty means the embedded server."
    )
    data_dir: str = Field(description="Data root; the embedded PostgreSQL lies in its `postgres` directory.")

    _engine: Any = PrivateAttr(default=None)
    _embedded: EmbeddedPostgres | None = PrivateAttr(default=None)

    def teardown_after_execution(self, context: dg.InitResourceContext) -> None:
        """Dagster's hook at the end of a step's process."""
        self.close()

    def close(self) -> None:
        """Let go of the connections and of the embedded server; the next call takes them up again."""
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None
        if self._embedded is not None:
            self._embedded.close()
            self._embedded = None

    @contextmanager
    def transaction(self) -> Iterator[Execute]:
        """One transaction; yields a function that runs a statement and returns its rows."""
        from sqlalchemy import text
        from sqlalchemy.exc import DBAPIError

        connection = self._connect()
        try:
            with connection, connection.begin():

                def execute(statement: str, values: Mapping[str, Any]) -> list[dict[str, Any]]:
                    result = connection.execute(text(statement), dict(values))
                    return [dict(row) for row in result.mappings()] if result.returns_rows else []

                yield execute
        except DBAPIError as error:
            raise self._named(error) from None

    def _connect(self) -> "Connection":
        from sqlalchemy.exc import DBAPIError, OperationalError

        for attempt in range(1, _CONNECT_ATTEMPTS + 1):
            try:
                if self._engine is None:
                    engine = self._make_engine()
                    with engine.begin() as connection:
                        from resources.migrations import upgrade

                        upgrade(connection)
                    self._engine = engine
                connection = self._engine.connect()
            except OperationalError as error:
                if attempt == _CONNECT_ATTEMPTS:
                    raise self._named(error) from None
                time.sleep(0.2 * 2**attempt)
                if self._embedded is not None:
                    self._embedded.ensure_running()
            except DBAPIError as error:
                raise self._named(error) from None
            else:
                return connection  # type: ignore[no-any-return]  # the engine is Any: pydantic would import SQLAlchemy
        raise AssertionError("unreachable")

    def _make_engine(self) -> "Engine":
        from sqlalchemy import NullPool, create_engine
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError

        if not self.database_url and self._embedded is None:
            self._embedded = EmbeddedPostgres(DataLayout(Path(self.data_dir)).postgres)
        configured = self.database_url or (self._embedded.url if self._embedded else "")
        try:
            # The short scheme is what many servers hand out; SQLAlchemy knows only the long one.
            url = make_url(configured.replace("postgres://", "postgresql://", 1))
        except (ArgumentError, ValueError):
            url = None
        if url is None or url.get_backend_name() != "postgresql":
            raise ConfigurationError(
                "not the URL of a PostgreSQL server",
                where="DATABASE_URL",
                remedy="Write it as postgresql://user:password@host:5432/database, or unset it for the embedded one",
            )
        # No connection is kept through hours of training for a server to drop.
        return create_engine(
            url.set(drivername="postgresql+psycopg2"),
            poolclass=NullPool,
            connect_args={"connect_timeout": 10, "application_name": "lora-assets"},
        )

    def _named(self, error: Any) -> FinetuneError:
        """A DBAPI error as one of ours, without the password."""
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import InterfaceError, OperationalError

        message = " ".join(str(error.orig).split())
        where = "the embedded PostgreSQL"
        if self.database_url:
            url = make_url(self.database_url.replace("postgres://", "postgresql://", 1))
            where = f"DATABASE_URL={url.set(query={}).render_as_string(hide_password=True)}"
            # libpq takes passwords as parameters too.
            parameters = [str(value) for name, value in url.query.items() if "pass" in name]
            for secret in filter(None, [url.password, *parameters]):
                message = message.replace(secret, "***")
        if isinstance(error, OperationalError | InterfaceError):
            return RemoteError(
                f"the run log's database does not answer: {message}",
                where=where,
                remedy="Check that the server runs and that DATABASE_URL names it, its user and its database",
            )
        return ConfigurationError(
            f"the run log's database refuses a statement: {message}",
            where=where,
            remedy="Check the user's rights and that nobody else changed the tables",
        )


def storable_text(value: str) -> str:
    """What of a text PostgreSQL can hold: neither NUL nor lone surrogates."""
    return value.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode("utf-8")


def storable_json(value: Mapping[str, Any]) -> str:
    """JSON for a column of JSONB; figures that JSON cannot hold (NaN, infinities) are kept as text."""

    def plain(item: Any) -> Any:
        if isinstance(item, float) and not math.isfinite(item):
            return str(item)
        if isinstance(item, str):
            return storable_text(item)
        if isinstance(item, Mapping):
            return {storable_text(str(key)): plain(each) for key, each in item.items()}
        if isinstance(item, list | tuple):
            return [plain(each) for each in item]
        return item

    return json.dumps(plain(value), allow_nan=False, default=str)
