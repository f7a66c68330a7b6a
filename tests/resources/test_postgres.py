import fcntl
import os
import pwd
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.errors import ConfigurationError
from resources.postgres import EmbeddedPostgres, database_url

USER = """
import sys
from pathlib import Path
from resources.postgres import EmbeddedPostgres
server = EmbeddedPostgres(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
server.close()
"""


def user_of(directory: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", USER, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def answers(url: str) -> bool:
    import psycopg2

    try:
        with psycopg2.connect(url) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT 1")
            return bool(cursor.fetchone() == (1,))
    except psycopg2.OperationalError:
        return False


def postmaster(directory: Path) -> int:
    return int((directory / "cluster" / "postmaster.pid").read_text().splitlines()[0])


def test_the_configured_server_is_used_as_it_stands(tmp_path: Path) -> None:
    with database_url("postgresql://somewhere/else", tmp_path / "postgres") as url:
        assert url == "postgresql://somewhere/else"
    assert not (tmp_path / "postgres").exists()


def test_the_server_stops_with_its_last_user_and_keeps_what_was_written(data_root: Path) -> None:
    import psycopg2

    with database_url("", data_root / "postgres") as url:
        connection = psycopg2.connect(url)
        with connection, connection.cursor() as cursor:
            cursor.execute("CREATE TABLE kept AS SELECT 7 AS answer")
        connection.close()
    assert not answers(url)
    with database_url(None, data_root / "postgres") as url:
        connection = psycopg2.connect(url)
        with connection, connection.cursor() as cursor:
            cursor.execute("SELECT answer FROM kept")
            assert cursor.fetchone() == (7,)
        connection.close()


def test_several_processes_share_it_and_the_last_one_stops_it_even_after_a_kill(data_root: Path) -> None:
    directory = data_root / "postgres"
    first, second, third = (user_of(directory) for _ in range(3))
    server = EmbeddedPostgres(directory)
    url = server.url
    first.communicate("\n")
    assert first.returncode == 0
    assert answers(url), "one user's end must not take the server from the others"
    second.kill()
    second.wait()
    assert second.returncode == -signal.SIGKILL
    assert answers(url)
    server.close()
    assert answers(url), "the third process still uses it"
    third.communicate("\n")
    assert not answers(url), "a killed user must not be counted for ever"


def test_processes_that_start_together_make_one_server(short_directory: Path) -> None:
    directory = short_directory / "pg"
    processes = [
        subprocess.Popen([sys.executable, "-c", USER, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
    assert (directory / "log").read_text().count("starting PostgreSQL") == 1
    for process in processes:
        process.communicate(b"\n")
        assert process.returncode == 0


def test_a_killed_server_is_started_again(data_root: Path) -> None:
    directory = data_root / "postgres"
    server = EmbeddedPostgres(directory)
    killed = postmaster(directory)
    os.kill(killed, signal.SIGKILL)
    url = server.url
    while answers(url):
        pass
    server.ensure_running()
    assert postmaster(directory) != killed
    assert answers(server.url)
    server.close()


def test_a_process_id_that_another_program_got_does_not_pass_for_a_server(data_root: Path) -> None:
    directory = data_root / "postgres"
    server = EmbeddedPostgres(directory)
    pid_file = directory / "cluster" / "postmaster.pid"
    stale = pid_file.read_text().splitlines()
    server.close()
    assert not pid_file.exists()
    # What a container finds after a crash: the file of old, its number now another program's.
    pid_file.write_text("\n".join([str(os.getpid()), *stale[1:]]) + "\n")
    server = EmbeddedPostgres(directory)
    assert postmaster(directory) != os.getpid()
    assert answers(server.url)
    server.close()


def test_an_interrupted_creation_is_repeated_from_the_start(short_directory: Path) -> None:
    directory = short_directory / "pg"
    half_made = directory / ".cluster.tmp-1-dead"
    half_made.mkdir(parents=True)
    (half_made / "PG_VERSION").write_text("18\n")
    server = EmbeddedPostgres(directory)
    assert answers(server.url)
    assert not half_made.exists()
    server.close()


def test_a_server_that_another_machine_runs_on_a_shared_volume_is_left_alone(data_root: Path) -> None:
    directory = data_root / "postgres"
    EmbeddedPostgres(directory).close()
    # What a second pod finds: users' locks, another machine's name, and no process that it can see.
    (directory / "host").write_text("pod-1")
    with (directory / "users").open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        with pytest.raises(ConfigurationError, match=r"in use on pod-1.*DATABASE_URL"):
            EmbeddedPostgres(directory)
    server = EmbeddedPostgres(directory)
    assert answers(server.url), "a machine that is gone holds no locks, and its name does not matter"
    server.close()


@pytest.mark.parametrize("name", ["with space & ümlaut %20'", "d" * 120])
def test_any_path_will_do_even_one_too_long_for_a_socket(short_directory: Path, name: str) -> None:
    directory = short_directory / name / "pg"
    server = EmbeddedPostgres(directory)
    try:
        assert answers(server.url)
        sockets = Path((directory / "cluster" / "postmaster.pid").read_text().splitlines()[4])
        assert sockets.stat().st_mode & 0o077 == 0, "only the server's own user may connect"
    finally:
        server.close()
    if sockets.parent != directory:
        shutil.rmtree(sockets)


def test_a_place_that_is_no_directory_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"no place to live.*DATABASE_URL"):
        EmbeddedPostgres(tmp_path / "file" / "pg")


def test_a_damaged_cluster_is_one_clear_error_that_tells_how_to_go_on(data_root: Path) -> None:
    directory = data_root / "postgres"
    EmbeddedPostgres(directory).close()
    (directory / "cluster" / "global" / "pg_control").write_bytes(b"")
    with pytest.raises(ConfigurationError, match=r"pg_ctl failed.*pg_control.*DATABASE_URL"):
        EmbeddedPostgres(directory)


def test_an_ordinary_user_can_run_it_too(short_directory: Path) -> None:
    short_directory.chmod(0o755)
    directory = short_directory / "mine"
    directory.mkdir()
    user = pwd.getpwnam("daemon") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
    become = ""
    if os.geteuid() == 0:
        os.chown(directory, user.pw_uid, user.pw_gid)
        become = f"os.setgroups([]); os.setgid({user.pw_gid}); os.setuid({user.pw_uid})"
    done = subprocess.run(
        [sys.executable, "-c", f"import os, resources.postgres\n{become}\n{USER}", str(directory / "pg")],
        input="\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (directory / "pg" / "cluster").stat().st_uid == user.pw_uid
