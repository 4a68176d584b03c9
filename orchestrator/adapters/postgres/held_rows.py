"""`add_job` queue rows that were set aside because they can never become a job as they are."""

from __future__ import annotations

import asyncpg
from pgqueuer.domain import types
from pgqueuer.domain.settings import db_settings

from orchestrator.adapters.postgres.queue import queue_of
from orchestrator.domain.errors import InvalidJob
from orchestrator.domain.messages import QUEUE_ADD_JOB, EvalJobMessage
from orchestrator.domain.reports import HeldRow


async def held_rows(pool: asyncpg.Pool[asyncpg.Record], limit: int) -> list[HeldRow]:
    """The latest that were set aside, newest first, each with the reason."""
    names = db_settings().qualified
    rows = await pool.fetch(
        f"""SELECT q.id, q.created, q.updated, q.payload,
                (SELECT l.traceback ->> 'exception_message' FROM {names.queue_table_log} l
                 WHERE l.job_id = q.id AND l.status = 'failed' ORDER BY l.id DESC LIMIT 1) AS reason
            FROM {names.queue_table} q WHERE q.entrypoint = $1 AND q.status = 'failed'
            ORDER BY q.updated DESC, q.id DESC LIMIT $2""",  # noqa: S608 - names of pgqueuer's settings
        QUEUE_ADD_JOB,
        limit,
    )
    return [
        HeldRow(
            row["id"],
            row["created"],
            row["updated"],
            row["reason"] or _reason_again(row["payload"] or b""),
            row["payload"] or b"",
        )
        for row in rows
    ]


async def put_back(pool: asyncpg.Pool[asyncpg.Record], row_id: int) -> bool:
    """Let a consumer take the row once more; False where there is no held row of this id."""
    table = db_settings().qualified.queue_table
    async with pool.acquire() as connection, connection.transaction():
        held = await connection.fetchval(
            f"""SELECT id FROM {table}
                WHERE id = $1 AND entrypoint = $2 AND status = 'failed' FOR UPDATE""",  # noqa: S608
            row_id,
            QUEUE_ADD_JOB,
        )
        if held is not None:
            await queue_of(connection).requeue_jobs([types.JobId(row_id)])
    return held is not None


def _reason_again(payload: bytes) -> str:
    """The reason as far as the payload tells: pgqueuer's log, which said it, keeps a day."""
    try:
        EvalJobMessage.parse(payload)
    except InvalidJob as error:
        return error.reason
    return "the queue's log does not say any more"
