"""PostgreSQL as a cluster reaches it: over TCP, at an address that stays, even while the server is away."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from resources.postgres import EmbeddedPostgres

_SOCKET = ".s.PGSQL.5432"


class Database:
    """The embedded server behind a TCP port of loopback (it listens on a unix socket alone).

    Args:
        directory: where the server's data lies.
    """

    def __init__(self, directory: Path) -> None:
        self._server = EmbeddedPostgres(directory)
        [sockets] = parse_qs(urlsplit(self._server.url).query)["host"]
        self._socket = Path(sockets) / _SOCKET
        self._away = threading.Event()
        self._open: set[socket.socket] = set()
        # Connections that were refused or broken while the server was away.
        self.broken = 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, name="database", daemon=True).start()

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def go_away(self) -> None:
        """Break every connection, and refuse new ones."""
        self._away.set()
        for connection in list(self._open):
            self.broken += 1
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def come_back(self) -> None:
        self._away.clear()

    def close(self) -> None:
        self.go_away()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._away.is_set():
                self.broken += 1
                client.close()
                continue
            server = socket.socket(socket.AF_UNIX)
            server.connect(str(self._socket))
            self._open |= {client, server}
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._copy, args=(source, target), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        for end in (source, target):
            self._open.discard(end)
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
