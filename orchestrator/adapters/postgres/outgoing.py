"""The other end of the outgoing queues: how a validator takes rows, as `orchestrator consume` does."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import asyncpg
from pgqueuer.adapters.persistence.queries import Queries
from pgqueuer.domain import models, types
from pgqueuer.ports.repository import EntrypointExecutionParameter

ABANDONED_AFTER = timedelta(seconds=30)


@asynccontextmanager
async def take_rows(
    pool: asyncpg.Pool[asyncpg.Record], queue: str, *, rows: int
) -> AsyncIterator[list[models.Job]]:
    """Up to `rows` rows of the queue, acknowledged when the block ends well; else they come again."""
    queries = Queries.from_asyncpg_pool(pool)
    taken = await queries.dequeue(
        batch_size=rows,
        entrypoints={types.QueueEntrypoint(queue): EntrypointExecutionParameter(concurrency_limit=0)},
        queue_manager_id=types.QueueManagerId(uuid.uuid4()),
        global_concurrency_limit=None,
        heartbeat_timeout=ABANDONED_AFTER,
    )
    yield taken
    if taken:
        await queries.log_jobs([(row, "successful", None) for row in taken])


def messages_of(row: models.Job) -> list[dict[str, Any]]:
    """The messages of a row: one, or those of its `messages` list.

    Raises:
        ValueError: its payload is no JSON object.
    """
    content: dict[str, Any] = json.loads(row.payload or b"{}")
    if not isinstance(content, dict):
        raise ValueError("it is JSON, but not an object")
    many = content.get("messages")
    return many if isinstance(many, list) and set(content) == {"messages"} else [content]
