"""The fence: no write of an incarnation that another one has replaced.

`WHERE epoch = n` alone is no fence, because a claim can commit between the check and the write. So every
fenced transaction first takes the job's advisory lock (shared for many small writers, exclusive for what
changes `jobs`), and only the next statement, with a snapshot taken after the lock, reads the epoch.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import TypeAlias

import asyncpg

from orchestrator.domain.errors import Fenced
from orchestrator.ports import Claim

Connection: TypeAlias = asyncpg.Connection | asyncpg.pool.PoolConnectionProxy

LOCK_EXCLUSIVE = "SELECT pg_advisory_xact_lock($1::bigint)"
LOCK_SHARED = "SELECT pg_advisory_xact_lock_shared($1::bigint)"
# By their names: a statement prepared with a star fails once where a later version adds a column.
JOB_COLUMNS = """job_id, message, local, priority, status, detail, epoch, lease_holder, lease_expires_at,
    client_lease_expires_at, deadline_at, cancel_requested_at, cancel_reason, container_id, outcomes_at_claim,
    claims_without_progress, error, created_at, claimed_at, running_at, finished_at"""
READ_JOB = f"SELECT {JOB_COLUMNS} FROM jobs WHERE job_id = $1"  # noqa: S608 - a constant
READ_JOB_FOR_UPDATE = f"{READ_JOB} FOR UPDATE"


@asynccontextmanager
async def exclusively(pool: asyncpg.Pool, job_id: int) -> AsyncIterator[Connection]:
    """A transaction that no fenced write of the job overlaps."""
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute(LOCK_EXCLUSIVE, job_id)
        yield connection


@asynccontextmanager
async def shared(pool: asyncpg.Pool, job_ids: Iterable[int]) -> AsyncIterator[Connection]:
    """A transaction under the shared locks of the jobs, taken in ascending order so that none deadlock."""
    async with pool.acquire() as connection, connection.transaction():
        for job_id in sorted(set(job_ids)):
            await connection.execute(LOCK_SHARED, job_id)
        yield connection


async def check_epoch(connection: Connection, claim: Claim, *, for_update: bool = False) -> asyncpg.Record:
    """The job's row, if `claim` is still the current one.

    Raises:
        Fenced: another epoch is current, or the job is not held any more.
    """
    row = await connection.fetchrow(READ_JOB_FOR_UPDATE if for_update else READ_JOB, claim.job.job_id)
    if row is None or row["epoch"] != claim.epoch or row["status"] not in ("STARTING", "RUNNING"):
        raise Fenced(claim.job.job_id, claim.epoch)
    return row


def storable(text: str | None, limit: int = 16_384) -> str | None:
    """`text` as a text column takes it: no NUL, no lone surrogate, at most `limit` characters."""
    if text is None:
        return None
    sound = text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    return sound if len(sound) <= limit else sound[: limit // 2] + "\n[...]\n" + sound[-limit // 2 :]


def only_row(row: asyncpg.Record | None) -> asyncpg.Record:
    """The row of a statement that cannot come back empty."""
    assert row is not None
    return row
