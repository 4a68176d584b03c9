"""`add_job` rows that name no job, or another one under a known id: held in the queue, with the reason.

pgqueuer keeps such a row as `failed`, and what its handler raised in its log; an operator reads both here.
"""

from __future__ import annotations

import asyncpg
from pgqueuer.domain.settings import db_settings
from pgqueuer.domain.types import JobId

from orchestrator.adapters.postgres.queue import queue_of
from orchestrator.domain.job_documents import printable
from orchestrator.domain.messages import QUEUE_ADD_JOB
from orchestrator.domain.reports import HeldRow

SHOWN_PAYLOAD_BYTES = 400
NO_REASON = "the reason is not in the queue's log any more"


async def held_rows(pool: asyncpg.Pool[asyncpg.Record], limit: int) -> list[HeldRow]:
    """The held rows, the newest first."""
    names = db_settings().qualified
    rows = await pool.fetch(
        f"""SELECT q.id, q.created, q.updated, substring(q.payload FOR $3) AS payload,
                length(q.payload) > $3 AS is_longer, orchestrator_payload_job_id(q.payload) AS job_id,
                (SELECT traceback ->> 'exception_message' FROM {names.queue_table_log} l
                 WHERE l.job_id = q.id AND l.status = 'failed' AND l.traceback IS NOT NULL
                 ORDER BY l.created DESC, l.id DESC LIMIT 1) AS reason
            FROM {names.queue_table} q
            WHERE q.entrypoint = $1 AND q.status = 'failed'
            ORDER BY q.id DESC LIMIT $2""",  # noqa: S608 - names of pgqueuer's settings
        QUEUE_ADD_JOB,
        limit,
        SHOWN_PAYLOAD_BYTES,
    )
    return [
        HeldRow(
            row_id=row["id"],
            queued_at=row["created"],
            held_at=row["updated"],
            reason=row["reason"] or NO_REASON,
            payload=_shown(row["payload"] or b"", is_longer=bool(row["is_longer"])),
            job_id=row["job_id"] if (row["job_id"] or 0) >= 0 else None,
        )
        for row in rows
    ]


async def requeue_held_row(pool: asyncpg.Pool[asyncpg.Record], row_id: int) -> bool:
    """Give a held row to the consumer again, as new; False where no held row has this id."""
    async with pool.acquire() as connection, connection.transaction():
        held = await connection.fetchval(
            f"""SELECT id FROM {db_settings().qualified.queue_table}
                WHERE id = $1 AND entrypoint = $2 AND status = 'failed' FOR UPDATE""",  # noqa: S608
            row_id,
            QUEUE_ADD_JOB,
        )
        if held is None:
            return False
        await queue_of(connection).requeue_jobs([JobId(held)])
    return True


def _shown(payload: bytes, *, is_longer: bool) -> str:
    """What a terminal can show of the payload's beginning: it comes from strangers."""
    return printable(payload.decode("utf-8", "backslashreplace")) + ("..." if is_longer else "")
