"""How a process reaches Postgres: the recipe of a database, its pool, and retries of what may pass."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import parse_qs, urlsplit

import asyncpg
import structlog

from orchestrator.adapters.postgres.failpoint_connection import connecting
from orchestrator.adapters.postgres.file_lock import wait_for_lock
from orchestrator.domain.errors import InfrastructureError, UsageError

if TYPE_CHECKING:
    from orchestrator.ports import Clock

T = TypeVar("T")

log = structlog.get_logger(__name__)

POOL_CLOSE_SECONDS = 5.0

# The server refuses what it has no room for, and lives on.
_NO_ROOM = (asyncpg.DiskFullError, asyncpg.OutOfMemoryError)
_PASSING_ERRORS = (
    OSError,  # refused, reset, unreachable; the builtin TimeoutError, so also asyncpg's command timeout
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.TooManyConnectionsError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    # Somebody who is frozen holds a lock, or the machine is busy. The same statement's time may also be over
    # here first, which is a TimeoutError.
    asyncpg.LockNotAvailableError,
    asyncpg.QueryCanceledError,
    # asyncpg's answer to a statement on a connection whose end it has half read, in place of "connection is
    # closed": https://github.com/MagicStack/asyncpg/issues/1069
    asyncpg.InternalClientError,
    asyncpg.DeadlockDetectedError,
    asyncpg.SerializationError,
    *_NO_ROOM,
)


@dataclass(frozen=True, slots=True)
class Database:
    """Where Postgres is. Pickles, so that each actor can open its own pool.

    `lock_file` is set for the embedded server: who holds a shared lock on it keeps the server alive.
    """

    dsn: str = field(repr=False)  # holds a password
    lock_file: str | None = None

    def __str__(self) -> str:
        return database_place(self.dsn)


def database_place(dsn: str) -> str:
    """`host:port/database` for people: never the user, the password or other parameters."""
    try:
        return _parsed_place(dsn)
    except ValueError:
        return "the configured database"


def _parsed_place(dsn: str) -> str:
    parts = urlsplit(dsn)
    credentials, _, address = parts.netloc.rpartition("@")
    if parts.scheme not in ("postgresql", "postgres"):
        raise ValueError("not a URL of Postgres")
    if "@" in dsn and not credentials:
        # A password with an unescaped "/", "?" or "#" ends up in the wrong part: show nothing of it.
        raise ValueError("unescaped characters before the host")
    for host in address.split(","):
        port = re.fullmatch(r"(?:\[[^\]]*\]|[^\[\]:]*)(?::(\d+))?", host)
        if port is None or int(port[1] or 0) > 65_535:
            raise ValueError("not a host with a port")
    socket_directory = parse_qs(parts.query).get("host", [""])[0]
    return f"{address or socket_directory or 'the default host'}{parts.path}"


@contextlib.asynccontextmanager
async def open_connection(
    dsn: str, *, timeout_seconds: float = 10.0
) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """One connection for the block, tried until the deadline while Postgres is away or starting.

    Raises:
        UsageError: the DSN is malformed.
        InfrastructureError: Postgres cannot be reached or refuses the credentials.
    """

    async def connect() -> asyncpg.Connection[asyncpg.Record]:
        return await connecting()(dsn, timeout=timeout_seconds, server_settings={"jit": "off"})

    with _plain_connect_errors(dsn):
        connection = await retrying(connect, deadline_seconds=timeout_seconds)
    try:
        yield connection
    finally:
        await _close(connection)


@contextlib.asynccontextmanager
async def open_pool(
    database: Database,
    *,
    application_name: str,
    min_size: int = 1,
    max_size: int = 5,
    lease_seconds: float = 30.0,
    connect_timeout_seconds: float = 10.0,
) -> AsyncIterator[asyncpg.Pool[asyncpg.Record]]:
    """A pool for the block; it keeps the embedded server alive until it is closed.

    A lock wait or an idle transaction ends after 0.3 leases, so that nobody can keep a lease holder from
    renewing in time; a statement, and the wait for its answer, after one lease.

    Raises:
        UsageError: the DSN is malformed.
        InfrastructureError: no connection within `connect_timeout_seconds`.
    """
    async with _keeping_alive(database, connect_timeout_seconds):
        pool = await _create_pool(
            database.dsn,
            connect_timeout_seconds,
            min_size=min_size,
            max_size=max_size,
            command_timeout=lease_seconds,
            server_settings=_server_settings(application_name, lease_seconds),
        )
        try:
            yield pool
        finally:
            await _close(pool)


async def retrying(
    operation: Callable[[], Awaitable[T]],
    *,
    deadline_seconds: float,
    what: str = "the database operation",
    first_delay_seconds: float = 0.05,
    max_delay_seconds: float = 2.0,
    clock: Clock | None = None,
) -> T:
    """What `operation` returns, called again after a lost connection, a deadlock or a serialization failure.

    An answer can be lost after the commit, so `operation` must be idempotent. Delays double and are jittered.

    Raises:
        InfrastructureError: it did not succeed within the deadline, or our own pool is closed; caused by the
            last error. All other errors of `operation` pass at once.
    """
    clock = clock or _SystemClock()
    deadline = clock.monotonic() + deadline_seconds
    delay = first_delay_seconds
    told = False
    while True:
        try:
            async with asyncio.timeout(max(deadline - clock.monotonic(), 0)):
                return await operation()
        except (*_PASSING_ERRORS, asyncpg.InterfaceError) as error:
            if not may_pass(error):
                if _is_closed_pool(error):
                    raise InfrastructureError(f"{what} failed: the connection pool is closed") from error
                raise
            if isinstance(error, _NO_ROOM) and not told:
                told = True  # at once: this does not pass by itself
                log.warning("database_has_no_room", what=what, why=_in_words(error))
            # Jitter keeps clients that lost the same server from coming back in step.
            pause = delay * random.uniform(0.5, 1.0)  # noqa: S311
            if clock.monotonic() + pause >= deadline:
                raise InfrastructureError(
                    f"{what} did not succeed within {deadline_seconds:g} s: {_in_words(error)}"
                ) from error
        await clock.sleep(pause)
        delay = min(delay * 2, max_delay_seconds)


def may_pass(error: BaseException) -> bool:
    """Whether trying again can help: a lost connection, a server that starts or has no room, a deadlock."""
    if isinstance(error, asyncpg.InterfaceError):
        # asyncpg tells its interface errors apart by their text only; the others are bugs of the caller.
        return re.search(r"connection is closed|connection has been closed", str(error)) is not None
    return isinstance(error, _PASSING_ERRORS)


def _is_closed_pool(error: BaseException) -> bool:
    return re.search(r"pool is (closed|closing)", str(error)) is not None


def _server_settings(application_name: str, lease_seconds: float) -> dict[str, str]:
    below_a_third = str(max(int(lease_seconds * 300), 1))  # milliseconds
    return {
        "application_name": application_name,
        # With a large backlog, compiling pgqueuer's dequeue query takes seconds for ten rows.
        "jit": "off",
        "lock_timeout": below_a_third,
        "idle_in_transaction_session_timeout": below_a_third,
        "statement_timeout": str(max(int(lease_seconds * 1000), 1)),
    }


async def _create_pool(
    dsn: str,
    timeout_seconds: float,
    *,
    min_size: int,
    max_size: int,
    command_timeout: float,
    server_settings: dict[str, str],
) -> asyncpg.Pool[asyncpg.Record]:
    async def create() -> asyncpg.Pool[asyncpg.Record]:
        return await asyncpg.create_pool(
            dsn,
            min_size=min_size,
            max_size=max_size,
            timeout=timeout_seconds,
            command_timeout=command_timeout,
            server_settings=server_settings,
            connect=connecting(),
        )

    with _plain_connect_errors(dsn):
        return await retrying(create, deadline_seconds=timeout_seconds)


async def _close(closable: asyncpg.Pool[asyncpg.Record] | asyncpg.Connection[asyncpg.Record]) -> None:
    """Close politely within a deadline, else abort: a dead server must not hold up our end."""
    try:
        async with asyncio.timeout(POOL_CLOSE_SECONDS):
            await closable.close()
    except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
        closable.terminate()


@contextlib.contextmanager
def _plain_connect_errors(dsn: str) -> Iterator[None]:
    try:
        place = _parsed_place(dsn)
    except ValueError:
        # The parser's message may quote the password: neither it nor its cause goes further.
        raise UsageError(
            "the database URL is malformed; it should look like postgresql://user:password@host:5432/name, "
            "with special characters of the password percent-encoded"
        ) from None
    try:
        yield
    except InfrastructureError as error:
        reason = _in_words(error.__cause__ or error)
        raise InfrastructureError(f"Postgres at {place} cannot be reached: {reason}") from error.__cause__
    except asyncpg.PostgresError as error:
        raise InfrastructureError(f"Postgres at {place} refused the connection: {error}") from error
    except asyncpg.exceptions.ClientConfigurationError as error:
        raise UsageError(f"the database URL of {place} cannot be used: {error}") from None


@contextlib.asynccontextmanager
async def _keeping_alive(database: Database, timeout_seconds: float) -> AsyncIterator[None]:
    if database.lock_file is None:
        yield
        return
    try:
        descriptor = os.open(database.lock_file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise InfrastructureError(
            f"the embedded Postgres of {database.lock_file} cannot be used from here: {error.strerror}"
        ) from error
    try:
        try:
            async with asyncio.timeout(timeout_seconds):
                await wait_for_lock(descriptor, exclusive=False)
        except TimeoutError as error:
            raise InfrastructureError(f"the embedded Postgres of {database.lock_file} is stopping") from error
        yield
    finally:
        os.close(descriptor)


def _in_words(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, asyncpg.DiskFullError):
        return f"the database's disk is full; free space there, and all goes on by itself ({error})"
    if isinstance(error, asyncpg.OutOfMemoryError):
        return f"the database's server has no memory left ({error})"
    return str(error) or type(error).__name__


class _SystemClock:
    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
