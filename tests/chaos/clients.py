"""A validator of a chaos run: enqueues jobs, and consumes all that comes back, whatever happens.

It knows the database through pgqueuer alone, and keeps what it saw in memory: nobody kills it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeAlias, TypeVar
from uuid import uuid4

import asyncpg
from pgqueuer import Queries
from pgqueuer.queries import EntrypointExecutionParameter

from tests.chaos.history import Received

QUEUES = ("eval_result", "job_status_update", "episode_data", "episode_step_data")
ROWS_AT_ONCE = 50
POLL_SECONDS = 0.2
PAUSE_SECONDS = 0.5
CALL_SECONDS = 15.0
ABANDONED_AFTER = timedelta(seconds=5)

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
T = TypeVar("T")

_AWAY = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)


class Line:
    """A connection that is opened again, for one call at a time, made again for as long as it takes."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._connection: Connection | None = None
        self._lock = asyncio.Lock()

    async def ask(self, call: Callable[[Connection], Awaitable[T]]) -> T:
        """The answer of a call that may be made more than once."""
        while True:
            try:
                return await self.ask_once(call)
            except _AWAY:
                await asyncio.sleep(PAUSE_SECONDS)

    async def ask_once(self, call: Callable[[Connection], Awaitable[T]]) -> T:
        """The answer.

        Raises:
            One of `_AWAY`: it may have been done.
        """
        async with self._lock:
            try:
                async with asyncio.timeout(CALL_SECONDS):
                    if self._connection is None:
                        self._connection = await asyncpg.connect(self._dsn, server_settings={"jit": "off"})
                    return await call(self._connection)
            except _AWAY:
                await self.close()
                raise

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(*_AWAY):
                connection.terminate()


class Validator:
    """What was acknowledged to it, and what it received."""

    def __init__(self, name: str, dsn: str) -> None:
        self._name = name
        self.acknowledged: set[int] = set()
        self.received: list[Received] = []
        self.results: set[int] = set()
        self._enqueuing = Line(dsn)
        self._consuming = Line(dsn)
        self._id = uuid4()

    async def enqueue(self, message: dict[str, Any]) -> None:
        """Returns when the job is acknowledged; it may be in the queue twice, under its one number."""
        payload = json.dumps(message).encode()
        await self._enqueuing.ask(
            lambda connection: Queries.from_asyncpg_connection(connection).enqueue("add_job", payload, 0)
        )
        self.acknowledged.add(message["job_id"])

    async def consume(self) -> None:
        """For ever: take rows, note their messages, acknowledge them."""
        while True:
            rows = await self._consuming.ask(self._take)
            for row in rows:
                content = json.loads(row.payload or b"{}")
                messages = content["messages"] if content.keys() == {"messages"} else [content]
                for position, message in enumerate(messages):
                    self.received.append(Received(self._name, row.entrypoint, int(row.id), position, message))
                    if row.entrypoint == "eval_result":
                        self.results.add(message["job_id"])
            if rows:
                # Where this is lost, the rows come again.
                with suppress(*_AWAY):
                    await self._consuming.ask_once(
                        lambda connection, rows=rows: Queries.from_asyncpg_connection(connection).log_jobs(
                            [(row, "successful", None) for row in rows]
                        )
                    )
            else:
                await asyncio.sleep(POLL_SECONDS)

    async def close(self) -> None:
        await self._enqueuing.close()
        await self._consuming.close()

    async def _take(self, connection: Connection) -> list[Any]:
        return await Queries.from_asyncpg_connection(connection).dequeue(
            batch_size=ROWS_AT_ONCE,
            entrypoints={queue: EntrypointExecutionParameter(concurrency_limit=0) for queue in QUEUES},
            queue_manager_id=self._id,
            global_concurrency_limit=None,
            heartbeat_timeout=ABANDONED_AFTER,
        )
