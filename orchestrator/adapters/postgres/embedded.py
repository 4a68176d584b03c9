"""The embedded Postgres, as its clients see it: start it or join it, keep it alive, leave it.

Three locks decide. Clients hold `pool.lock` shared. One client at a time holds `start.lock` while it looks
for the server. A guardian holds `guardian.lock` from its birth, handed over by its starter, to its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg

from orchestrator import failpoints
from orchestrator.adapters.postgres.failpoint_connection import connecting
from orchestrator.adapters.postgres.file_lock import (
    exclusive_lock,
    open_lock_file,
    try_lock,
    unlock,
    wait_for_lock,
)
from orchestrator.adapters.postgres.pool import Database, may_pass
from orchestrator.adapters.postgres.server_files import ServerFiles, prepare_data_dir
from orchestrator.domain.errors import InfrastructureError, UsageError

USER = "orchestrator"
DATABASE = "orchestrator"
STOP_TIMEOUT_SECONDS = 20.0
_POLL_SECONDS = 0.05
_PROBE_TIMEOUT_SECONDS = 5.0


@contextlib.asynccontextmanager
async def embedded_postgres(
    data_dir: Path | None = None, *, start_timeout_seconds: float = 60.0
) -> AsyncIterator[Database]:
    """The embedded server's database for the block, started unless it runs already.

    The last client that leaves, pools included, waits until the server has stopped; others leave at once.

    Raises:
        UsageError: the data directory cannot be used.
        InfrastructureError: the server did not start in time, with the end of its log.
    """
    files = await asyncio.to_thread(prepare_data_dir, data_dir)
    try:
        pool_lock = open_lock_file(files.pool_lock)
    except PermissionError as error:
        raise UsageError(
            f"{files.pool_lock} belongs to another user: run as that one, or choose another --data-dir"
        ) from error
    try:
        dsn = await _start_or_join(files, pool_lock, start_timeout_seconds)
        yield Database(dsn, str(files.pool_lock))
    finally:
        try:
            await _leave(files, pool_lock)
        finally:
            os.close(pool_lock)


async def _start_or_join(files: ServerFiles, pool_lock: int, timeout_seconds: float) -> str:
    try:
        async with asyncio.timeout(timeout_seconds), exclusive_lock(files.start_lock):
            # From here on no guardian can decide to stop; one that has decided has to end first.
            await wait_for_lock(pool_lock, exclusive=False)
            return await _running_server(files)
    except TimeoutError as error:
        raise InfrastructureError(
            f"the embedded Postgres in {files.data_dir} did not start within {timeout_seconds:g} s; "
            f"the end of {files.log}:\n{files.log_tail()}"
        ) from error


async def _running_server(files: ServerFiles) -> str:
    """Its DSN. Who calls holds `start.lock` and, shared, `pool.lock`: a living guardian stays."""
    started = False
    while True:
        guardian_lock = open_lock_file(files.guardian_lock)
        try:
            # A guardian that has just ended may keep its lock a moment longer: hence in the loop.
            if try_lock(guardian_lock, exclusive=True):
                if started:
                    raise InfrastructureError(
                        f"the embedded Postgres in {files.data_dir} ended while it was starting; "
                        f"the end of {files.log}:\n{files.log_tail()}"
                    )
                _start_guardian(files, guardian_lock)
                started = True
        finally:
            os.close(guardian_lock)
        if (dsn := await _accepting_dsn(files)) is not None:
            return dsn
        await asyncio.sleep(_POLL_SECONDS)


def _start_guardian(files: ServerFiles, guardian_lock: int) -> None:
    """Start the guardian, which inherits the lock: there is no moment at which it lives without it."""
    last = files.read_state()
    # After a crash the old port first: clients that are still there look for the server on it.
    port = [] if last is None else ["--port", str(last.port)]
    files.clear_state()
    with files.log.open("ab") as log, failpoints.around("postgres.spawn_guardian"):
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "orchestrator.adapters.postgres.guardian"),
                *("--data-dir", str(files.data_dir), "--lock-descriptor", str(guardian_lock), *port),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            start_new_session=True,
            pass_fds=(guardian_lock,),
        )
    # It leaves us when it has begun; what it was until then must not stay behind as a zombie of ours.
    threading.Thread(target=process.wait, name="reap-postgres-guardian", daemon=True).start()


async def _accepting_dsn(files: ServerFiles) -> str | None:
    """The DSN of our database once the server answers, None before."""
    state = files.read_state()
    if state is None:
        return None

    def dsn_of(database: str) -> str:
        # The password is made of characters that need no quoting. Without sslmode, PGSSLMODE would count.
        return f"postgresql://{USER}:{password}@127.0.0.1:{state.port}/{database}?sslmode=disable"

    try:
        password = files.password.read_text()
    except OSError as error:
        raise InfrastructureError(f"{files.password} cannot be read: {error.strerror}") from error
    try:
        connection = await connecting()(dsn_of("postgres"), timeout=_PROBE_TIMEOUT_SECONDS)
        try:
            if not await connection.fetchval("SELECT true FROM pg_database WHERE datname = $1", DATABASE):
                await connection.execute(f"CREATE DATABASE {DATABASE}")
        finally:
            await connection.close(timeout=_PROBE_TIMEOUT_SECONDS)
    except asyncpg.PostgresError as error:
        if may_pass(error):
            return None
        raise InfrastructureError(f"the embedded Postgres in {files.data_dir} refused us: {error}") from error
    except OSError:
        return None
    return dsn_of(DATABASE)


async def _leave(files: ServerFiles, pool_lock: int) -> None:
    """Give up the shared lock; if that was the last one, wait until the server has stopped."""
    unlock(pool_lock)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(STOP_TIMEOUT_SECONDS):
            while not _guardian_is_gone(files) and not _has_other_clients(pool_lock):
                await asyncio.sleep(_POLL_SECONDS)


def _guardian_is_gone(files: ServerFiles) -> bool:
    descriptor = open_lock_file(files.guardian_lock)
    try:
        return try_lock(descriptor, exclusive=False)
    finally:
        os.close(descriptor)


def _has_other_clients(pool_lock: int) -> bool:
    try:
        # Free: the guardian is about to take it. Not even shared to be had: it has it. Only shared: a client.
        return not try_lock(pool_lock, exclusive=True) and try_lock(pool_lock, exclusive=False)
    finally:
        unlock(pool_lock)
