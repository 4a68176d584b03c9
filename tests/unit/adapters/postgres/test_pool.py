"""Pools, connection errors in plain words, and retries, against a real server."""

from __future__ import annotations

import asyncio
import pickle
import socket
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest

from orchestrator.adapters.postgres.file_lock import open_lock_file, try_lock
from orchestrator.adapters.postgres.pool import (
    Database,
    database_place,
    open_connection,
    open_pool,
    retrying,
)
from orchestrator.domain.errors import InfrastructureError, UsageError


class SkippingClock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.sleeps: list[float] = []

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize(
    ("dsn", "place"),
    [
        ("postgresql://me:secret@db.example:5433/jobs?sslmode=require", "db.example:5433/jobs"),
        ("postgres://db.example/jobs", "db.example/jobs"),
        ("postgresql://me:secret@a:1,b:2/jobs", "a:1,b:2/jobs"),
        ("postgresql://me:secret@[::1]:5432/jobs", "[::1]:5432/jobs"),
        ("postgresql:///jobs?host=/run/postgresql", "/run/postgresql/jobs"),
        ("postgresql://me:sec/ret@db:1/jobs", "the configured database"),
        ("postgresql://me:sec#ret@db:1/jobs", "the configured database"),
        ("postgresql://me:secret@[::1/jobs", "the configured database"),
        ("me:secret", "the configured database"),
    ],
)
def test_a_place_names_host_and_database_and_never_the_password(dsn: str, place: str):
    assert database_place(dsn) == place
    assert str(Database(dsn)) == place


def test_a_database_pickles_and_keeps_its_password_out_of_its_repr():
    database = Database("postgresql://me:secret@db/jobs", "/somewhere/pool.lock")

    assert pickle.loads(pickle.dumps(database)) == database
    assert "secret" not in repr(database)


async def test_a_pool_applies_the_limits_that_a_lease_needs(database: Database):
    names = ("jit", "application_name", "lock_timeout", "idle_in_transaction_session_timeout")

    async with open_pool(database, application_name="sink", lease_seconds=10.0) as pool:
        settings = {name: await pool.fetchval("SELECT current_setting($1)", name) for name in names}

    assert settings == {
        "jit": "off",
        "application_name": "sink",
        "lock_timeout": "3s",
        "idle_in_transaction_session_timeout": "3s",
    }


async def test_an_open_pool_keeps_the_servers_lock_and_a_closed_one_gives_it_back(
    database: Database, tmp_path: Path
):
    lock_file = tmp_path / "pool.lock"
    descriptor = open_lock_file(lock_file)

    async with open_pool(replace(database, lock_file=str(lock_file)), application_name="tests"):
        held = not try_lock(descriptor, exclusive=True)

    assert held
    assert try_lock(descriptor, exclusive=True)


async def test_a_pool_of_a_server_that_is_stopping_says_so(database: Database, tmp_path: Path):
    lock_file = tmp_path / "pool.lock"
    assert try_lock(open_lock_file(lock_file), exclusive=True)

    with pytest.raises(InfrastructureError, match="is stopping"):
        async with open_pool(
            replace(database, lock_file=str(lock_file)), application_name="tests", connect_timeout_seconds=0.1
        ):
            pass


async def test_the_embedded_server_of_another_machine_is_refused_in_words(tmp_path: Path):
    database = Database("postgresql://127.0.0.1/jobs", str(tmp_path / "missing" / "pool.lock"))

    with pytest.raises(InfrastructureError, match="cannot be used from here"):
        async with open_pool(database, application_name="tests"):
            pass


async def test_an_unreachable_server_is_named_without_its_password():
    port = closed_port()

    with pytest.raises(InfrastructureError) as caught:
        async with open_pool(
            Database(f"postgresql://me:secret@127.0.0.1:{port}/jobs"),
            application_name="tests",
            connect_timeout_seconds=0.2,
        ):
            pass

    assert f"Postgres at 127.0.0.1:{port}/jobs cannot be reached" in str(caught.value)
    assert "secret" not in str(caught.value)


async def test_a_server_that_accepts_and_says_nothing_is_unreachable_in_time():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]

        with pytest.raises(InfrastructureError, match="no answer in time"):
            async with open_connection(f"postgresql://me:secret@127.0.0.1:{port}/jobs", timeout_seconds=0.2):
                pass


async def test_a_wrong_password_is_refused_at_once(database: Database):
    user, _, rest = database.dsn.rpartition("@")

    with pytest.raises(InfrastructureError, match="refused the connection: password authentication failed"):
        async with open_pool(
            Database(f"{user[:-1]}@{rest}"), application_name="tests", connect_timeout_seconds=60
        ):
            pass


async def test_a_malformed_url_is_a_usage_error_without_the_password():
    with pytest.raises(UsageError, match="malformed") as caught:
        async with open_connection("postgresql://me:sec/ret@db:1/jobs"):
            pass

    assert "sec" not in str(caught.value)
    assert caught.value.__cause__ is None


async def test_an_operation_on_a_lost_connection_is_retried_on_a_new_one(pool):
    pids: list[int] = []

    async def lose_the_first_connection() -> int:
        async with pool.acquire() as connection:
            pids.append(connection.get_server_pid())
            if len(pids) == 1:
                await connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")
            return await connection.fetchval("SELECT 42")

    assert await retrying(lose_the_first_connection, deadline_seconds=10) == 42
    assert len(set(pids)) == 2


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(),
        TimeoutError(),
        asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation"),
        asyncpg.InterfaceError("connection is closed"),
        asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is in progress"),
        asyncpg.CannotConnectNowError("the database system is starting up"),
        asyncpg.AdminShutdownError("terminating connection due to administrator command"),
        asyncpg.CrashShutdownError("terminating connection because of crash of another server process"),
        asyncpg.TooManyConnectionsError("sorry, too many clients already"),
        asyncpg.SerializationError("could not serialize access"),
        asyncpg.LockNotAvailableError("canceling statement due to lock timeout"),
        asyncpg.QueryCanceledError("canceling statement due to statement timeout"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_every_error_of_a_restarting_or_busy_server_is_retried(error: Exception):
    errors = [error]

    async def fail_once() -> str:
        if errors:
            raise errors.pop()
        return "done"

    assert await retrying(fail_once, deadline_seconds=30, clock=SkippingClock()) == "done"


async def test_the_loser_of_a_deadlock_is_retried(pool):
    await pool.execute("CREATE TABLE pair (name text PRIMARY KEY, total integer NOT NULL DEFAULT 0)")
    await pool.execute("INSERT INTO pair VALUES ('a'), ('b')")
    met = asyncio.Barrier(2)
    attempts = 0

    async def add_to(first: str, second: str) -> None:
        nonlocal attempts
        attempts += 1
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute("SET LOCAL deadlock_timeout = '20ms'")
            await connection.execute("UPDATE pair SET total = total + 1 WHERE name = $1", first)
            if attempts <= 2:
                await met.wait()
            await connection.execute("UPDATE pair SET total = total + 1 WHERE name = $1", second)

    await asyncio.gather(
        retrying(lambda: add_to("a", "b"), deadline_seconds=10),
        retrying(lambda: add_to("b", "a"), deadline_seconds=10),
    )

    assert attempts == 3
    assert await pool.fetchval("SELECT array_agg(total) FROM pair") == [2, 2]


async def test_retries_slow_down_and_end_with_the_last_error_at_the_deadline():
    clock = SkippingClock()

    async def always_refused() -> None:
        raise ConnectionRefusedError("nobody listens")

    with pytest.raises(InfrastructureError, match="the claim did not succeed within 30 s: nobody") as caught:
        await retrying(always_refused, deadline_seconds=30, what="the claim", clock=clock)

    assert isinstance(caught.value.__cause__, ConnectionRefusedError)
    assert clock.now <= 30
    assert clock.sleeps[0] <= 0.05
    assert 1.0 <= max(clock.sleeps) <= 2.0


async def test_an_operation_that_hangs_is_ended_at_the_deadline():
    with pytest.raises(InfrastructureError, match="no answer in time"):
        await retrying(asyncio.Event().wait, deadline_seconds=0.05)


async def test_errors_that_a_retry_cannot_mend_pass_at_once(pool):
    calls = 0

    async def broken() -> None:
        nonlocal calls
        calls += 1
        await pool.execute("SELECT 1/0")

    with pytest.raises(asyncpg.DivisionByZeroError):
        await retrying(broken, deadline_seconds=10)

    assert calls == 1


async def test_a_closed_pool_is_not_waited_for(database: Database):
    async with open_pool(database, application_name="tests") as pool:
        pass

    with pytest.raises(InfrastructureError, match="the connection pool is closed"):
        await retrying(lambda: pool.fetchval("SELECT 1"), deadline_seconds=60)


async def test_cancelling_a_retried_operation_passes_through():
    started = asyncio.Event()

    async def hang() -> None:
        started.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(retrying(hang, deadline_seconds=60))
    await started.wait()
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_pool_whose_connections_are_stuck_still_closes(database: Database, monkeypatch):
    monkeypatch.setattr("orchestrator.adapters.postgres.pool.POOL_CLOSE_SECONDS", 0.1)

    async with open_pool(database, application_name="stuck") as pool:
        await pool.acquire()

    async with open_connection(database.dsn) as connection:
        left = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'stuck'"
        async with asyncio.timeout(10):
            while await connection.fetchval(left):
                await connection.execute("SELECT pg_sleep(0.01)")
