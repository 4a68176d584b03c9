"""The embedded server: who starts it, who keeps it alive, and what survives which kill."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import psutil
import pytest

from orchestrator.adapters.postgres.cluster import stop_leftovers
from orchestrator.adapters.postgres.embedded import embedded_postgres
from orchestrator.adapters.postgres.file_lock import open_lock_file, try_lock
from orchestrator.adapters.postgres.guardian import Server
from orchestrator.adapters.postgres.pool import open_connection, open_pool, retrying
from orchestrator.adapters.postgres.server_files import (
    ServerFiles,
    ServerState,
    find_binaries,
    prepare_data_dir,
    server_account,
)
from orchestrator.domain.errors import InfrastructureError, UsageError

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the server as another user")

GUARDIAN = "orchestrator.adapters.postgres.guardian"

# Starts or joins the server, says where it is, and holds it until its standard input ends.
CLIENT = """
import asyncio, sys
from pathlib import Path
from orchestrator.adapters.postgres.embedded import embedded_postgres

async def main():
    async with embedded_postgres(Path(sys.argv[1])) as database:
        print(database.dsn, flush=True)
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""


@pytest.fixture
def directory(server_directory: Path) -> Iterator[Path]:
    """An empty directory that the account of the server can reach."""
    path = Path(tempfile.mkdtemp(dir=server_directory.parent))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path)


@pytest.fixture(scope="module")
def initialised(server_directory: Path) -> Iterator[Path]:
    """A data directory whose server ran once and has stopped; copying it is faster than initdb."""
    path = server_directory.parent / "initialised"
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        runner.run(use_once(path))
    try:
        yield path
    finally:
        shutil.rmtree(path)


@pytest.fixture
def data_dir(initialised: Path, directory: Path) -> Iterator[Path]:
    path = directory / "data"
    subprocess.run(["cp", "-a", initialised, path], check=True)
    yield path
    end_processes_of(path)


async def use_once(data_dir: Path) -> None:
    async with embedded_postgres(data_dir):
        pass


async def test_the_server_is_no_descendant_of_who_starts_it(data_dir: Path) -> None:
    async with embedded_postgres(data_dir):
        state = ServerFiles(data_dir).read_state()
        descendants = {child.pid for child in psutil.Process().children(recursive=True)}

    assert state is not None
    assert not {state.pid, state.guardian_pid} & descendants


@contextlib.contextmanager
def client_process(data_dir: Path, *demotion: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*demotion, sys.executable, "-c", CLIENT, str(data_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield process
        process.stdin.close()


def processes_of(data_dir: Path) -> list[psutil.Process]:
    """Guardian and postmaster name the directory on their command lines; the server's sessions work in it."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            serves = "-D" in words or GUARDIAN in words
            if process.status() != psutil.STATUS_ZOMBIE and (
                (serves and any(word.startswith(str(data_dir)) for word in words))
                or process.cwd() == str(data_dir / "pgdata")
            ):
                found.append(process)
    return found


def is_dead(pid: int) -> bool:
    """Whether it has ended; where the first process of a container reaps nobody it stays as a zombie."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def end_processes_of(data_dir: Path) -> None:
    for process in processes_of(data_dir):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def state_of(data_dir: Path) -> ServerState:
    state = ServerFiles(data_dir).read_state()
    assert state is not None
    return state


async def until(condition: Callable[[], bool], timeout_seconds: float = 30.0) -> None:
    async with asyncio.timeout(timeout_seconds):
        while not condition():
            await asyncio.sleep(0.02)


async def execute(dsn: str, statement: str) -> None:
    async with open_connection(dsn) as connection:
        await connection.execute(statement)


async def value(dsn: str, query: str) -> object:
    async with open_connection(dsn) as connection:
        return await connection.fetchval(query)


async def test_a_first_start_makes_a_server_and_the_last_client_leaves_nothing_running(directory: Path):
    data_dir = directory / "new" / "data"

    async with embedded_postgres(data_dir) as database:
        version = await value(database.dsn, "SHOW server_version")
        durable = await value(database.dsn, "SHOW fsync")
        running = processes_of(data_dir)

    assert str(version).startswith("18.")
    assert durable == "on"
    assert len(running) >= 2
    await until(lambda: processes_of(data_dir) == [])
    assert ServerFiles(data_dir).read_state() is None


async def test_only_loopback_with_the_password_gets_in(data_dir: Path):
    async with embedded_postgres(data_dir) as database:
        parts = urlsplit(database.dsn)
        stranger = parts._replace(netloc=f"{parts.username}:guess@{parts.hostname}:{parts.port}").geturl()
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(stranger)
        postmaster = psutil.Process(state_of(data_dir).pid)
        listening = [c.laddr.ip for c in postmaster.net_connections("all") if c.status == "LISTEN"]
        rules = await value(database.dsn, "SELECT array_agg(DISTINCT auth_method) FROM pg_hba_file_rules")

    assert parts.hostname == "127.0.0.1"
    assert listening == ["127.0.0.1"]
    assert rules == ["scram-sha-256"]
    assert stat.S_IMODE((data_dir / "password").stat().st_mode) == 0o600
    assert str(parts.password) not in (data_dir / "server.log").read_text()


async def test_a_second_client_joins_and_keeps_the_server_after_the_first_has_left(data_dir: Path):
    async with contextlib.AsyncExitStack() as second_client:
        async with embedded_postgres(data_dir) as first:
            second = await second_client.enter_async_context(embedded_postgres(data_dir))
            guardian = state_of(data_dir).guardian_pid
        answer = await value(second.dsn, "SELECT 42")

        assert second == first
        assert answer == 42
        assert state_of(data_dir).guardian_pid == guardian

    await until(lambda: processes_of(data_dir) == [])


async def test_an_open_pool_alone_keeps_the_server_alive(data_dir: Path):
    async with contextlib.AsyncExitStack() as actor:
        async with embedded_postgres(data_dir) as database:
            pool = await actor.enter_async_context(open_pool(database, application_name="actor"))

        assert await pool.fetchval("SELECT 42") == 42

    await until(lambda: processes_of(data_dir) == [])


async def test_processes_that_start_at_once_end_up_with_one_server(data_dir: Path):
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(client_process(data_dir)) for _ in range(2)]
        dsns = {await asyncio.to_thread(client.stdout.readline) for client in clients}
        guardians = [process for process in processes_of(data_dir) if GUARDIAN in process.cmdline()]

    assert len(dsns) == 1
    assert len(guardians) == 1
    await until(lambda: processes_of(data_dir) == [])


async def test_a_killed_client_does_not_leave_the_server_behind(data_dir: Path):
    with client_process(data_dir) as client:
        await asyncio.to_thread(client.stdout.readline)
        assert processes_of(data_dir) != []

        client.kill()

        await until(lambda: processes_of(data_dir) == [])


async def test_a_start_that_is_cancelled_leaves_nothing_running(data_dir: Path):
    lock = ServerFiles(data_dir).guardian_lock
    start = asyncio.create_task(use_once(data_dir))
    await until(lambda: not is_free(lock))

    start.cancel()

    with pytest.raises(asyncio.CancelledError):
        await start
    await until(lambda: processes_of(data_dir) == [])


def is_free(lock: Path) -> bool:
    descriptor = open_lock_file(lock)
    try:
        return try_lock(descriptor, exclusive=False)
    finally:
        os.close(descriptor)


async def test_a_newcomer_during_the_stop_waits_for_it_and_starts_afresh(data_dir: Path):
    async with contextlib.AsyncExitStack() as first_client:
        first = await first_client.enter_async_context(embedded_postgres(data_dir))
        await execute(first.dsn, "CREATE TABLE kept AS SELECT 7 AS number")
        before = state_of(data_dir)
        os.kill(before.pid, signal.SIGSTOP)  # so that it cannot stop yet
        leaving = asyncio.create_task(first_client.aclose())
        await until(lambda: not is_free(ServerFiles(data_dir).pool_lock))

        async with contextlib.AsyncExitStack() as newcomer:
            joining = asyncio.create_task(newcomer.enter_async_context(embedded_postgres(data_dir)))
            await until(lambda: not is_free(ServerFiles(data_dir).start_lock))
            os.kill(before.pid, signal.SIGCONT)
            second = await joining
            number = await value(second.dsn, "SELECT number FROM kept")
            after = state_of(data_dir)

        await leaving
    assert number == 7
    assert after.guardian_pid != before.guardian_pid


async def test_a_postgres_that_dies_comes_back_on_the_same_port(data_dir: Path):
    async with embedded_postgres(data_dir) as database, open_pool(database, application_name="a") as pool:
        await pool.execute("CREATE TABLE kept AS SELECT 7 AS number")
        before = state_of(data_dir)

        os.kill(before.pid, signal.SIGKILL)

        assert await retrying(lambda: pool.fetchval("SELECT number FROM kept"), deadline_seconds=30) == 7
        await until(lambda: state_of(data_dir).pid != before.pid)
        assert state_of(data_dir).port == before.port


async def test_postgres_ends_with_a_killed_guardian_and_the_next_start_takes_its_port(data_dir: Path):
    async with embedded_postgres(data_dir) as database, open_pool(database, application_name="a") as pool:
        await pool.execute("CREATE TABLE kept AS SELECT 7 AS number")
        before = state_of(data_dir)
        os.kill(before.guardian_pid, signal.SIGKILL)
        await until(lambda: is_dead(before.pid))

        async with embedded_postgres(data_dir):
            number = await retrying(lambda: pool.fetchval("SELECT number FROM kept"), deadline_seconds=30)
            after = state_of(data_dir)

    assert number == 7
    assert after.port == before.port


async def test_rows_survive_the_kill_of_everything_at_once(data_dir: Path):
    with client_process(data_dir) as client:
        dsn = (await asyncio.to_thread(client.stdout.readline)).strip()
        await execute(dsn, "CREATE TABLE kept AS SELECT 7 AS number")
        for process in [psutil.Process(client.pid), *processes_of(data_dir)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    async with embedded_postgres(data_dir) as database:
        assert await value(database.dsn, "SELECT number FROM kept") == 7


@pytest.fixture
def stranger(data_dir: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process of the server's account that has nothing to do with it."""
    account = server_account(ServerFiles(data_dir))
    with subprocess.Popen(["sleep", "600"], user=account.uid, group=account.gid) as process:
        yield process
        process.kill()


async def test_a_stale_pid_file_that_names_a_living_stranger_does_not_stop_a_start(
    data_dir: Path, stranger: subprocess.Popen[bytes]
):
    pgdata = data_dir / "pgdata"
    (pgdata / "postmaster.pid").write_text(f"{stranger.pid}\n{pgdata}\n0\n1\n\n\n0 0\n")

    async with embedded_postgres(data_dir) as database:
        answer = await value(database.dsn, "SELECT 42")

    assert answer == 42
    assert stranger.poll() is None


async def test_a_server_without_a_guardian_is_stopped_before_another_starts(data_dir: Path):
    files = prepare_data_dir(data_dir)
    account = server_account(files)
    orphan = Server(files, find_binaries(files, account), account, port=None)
    await until(lambda: orphan.tick() and files.read_state() is not None)
    pid = state_of(data_dir).pid
    reaped = asyncio.create_task(asyncio.to_thread(os.waitpid, pid, 0))

    async with embedded_postgres(data_dir) as database:
        answer = await value(database.dsn, "SELECT 42")

    assert answer == 42
    assert (await reaped)[1] == 0  # it ended by a clean stop, not by a signal
    stop_leftovers(files.pgdata)


async def test_a_server_that_cannot_start_says_why(data_dir: Path):
    with (data_dir / "pgdata" / "postgresql.conf").open("a") as settings:
        settings.write("no_such_setting = on\n")

    with pytest.raises(InfrastructureError, match="no_such_setting"):
        await use_once(data_dir)

    await until(lambda: processes_of(data_dir) == [])


async def test_data_of_another_major_version_is_refused(data_dir: Path):
    (data_dir / "pgdata" / "PG_VERSION").write_text("16\n")

    with pytest.raises(UsageError, match="was made by PostgreSQL 16"):
        await use_once(data_dir)


async def test_a_data_directory_that_cannot_be_made_is_a_usage_error(directory: Path):
    (directory / "file").touch()

    with pytest.raises(UsageError, match="--data-dir"):
        await use_once(directory / "file" / "data")


async def test_the_server_may_use_a_port_that_is_taken_meanwhile_by_choosing_another(data_dir: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        state = {"port": port, "pid": 1, "guardian_pid": 1}
        (data_dir / "server.json").write_text(json.dumps(state))

        async with embedded_postgres(data_dir) as database:
            assert urlsplit(database.dsn).port != port


@as_root
async def test_a_directory_that_the_servers_account_cannot_reach_is_refused(directory: Path):
    closed = directory / "closed"
    closed.mkdir(mode=0o700)

    with pytest.raises(UsageError, match="cannot be reached by the user"):
        await use_once(closed / "data")


@as_root
def test_existing_data_is_served_by_its_owner(data_dir: Path):
    nobody = pwd.getpwnam("nobody")
    os.chown(data_dir / "pgdata", nobody.pw_uid, nobody.pw_gid)

    account = server_account(ServerFiles(data_dir))

    assert (account.name, account.uid) == ("nobody", nobody.pw_uid)


@as_root
def test_binaries_that_the_servers_account_cannot_reach_are_copied_once(
    directory: Path, monkeypatch: pytest.MonkeyPatch
):
    files = ServerFiles(directory)
    account = server_account(files)
    package = find_binaries(files, account).parents[1]
    closed = directory / "closed"
    closed.mkdir(mode=0o700)
    for original in (package, package.with_name(f"{package.name}.libs")):
        (closed / original.name).symlink_to(original)
    monkeypatch.syspath_prepend(closed)

    copy = find_binaries(files, account)
    made_at = copy.stat().st_mtime_ns
    shown = subprocess.run(
        [copy / "initdb", "--version"], user=account.uid, group=account.gid, check=True, capture_output=True
    )

    assert copy.is_relative_to(directory)
    assert b" 18." in shown.stdout
    assert find_binaries(files, account).stat().st_mtime_ns == made_at


@as_root
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv to become an ordinary user")
async def test_an_ordinary_user_runs_a_server_of_his_own(directory: Path):
    nobody = pwd.getpwnam("nobody")
    os.chown(directory, nobody.pw_uid, nobody.pw_gid)
    # The right to read lets this user run the tests' interpreter, wherever it lives.
    demotion = [
        *("setpriv", f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups"),
        *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
    ]

    with client_process(directory / "data", *demotion) as client:
        dsn = (await asyncio.to_thread(client.stdout.readline)).strip()
        answer = await value(dsn, "SELECT 42")
        owners = {process.uids().effective for process in processes_of(directory / "data")}

    assert answer == 42
    assert owners == {nobody.pw_uid}
    await until(lambda: processes_of(directory / "data") == [])
