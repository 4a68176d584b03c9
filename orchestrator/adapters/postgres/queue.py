"""Rows that leave and enter through pgqueuer, always on the connection of the caller's transaction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import asyncpg
from pgqueuer.adapters.persistence.queries import Queries

from orchestrator.adapters.postgres.fence import Connection
from orchestrator.domain.messages import QUEUE_ADD_JOB, QUEUE_EPISODE, QUEUE_STEP, EvalJobMessage, Message


@dataclass(frozen=True, slots=True)
class TelemetryRows:
    """How telemetry messages are packed into queue rows."""

    messages_per_row: int = 1000
    row_bytes: int = 2**20
    episodes: bool = True
    steps: bool = True


def queue_of(connection: Connection) -> Queries:
    """pgqueuer's statements on a connection, or a pool's proxy of one: inside its transaction."""
    return Queries.from_asyncpg_connection(cast("asyncpg.Connection", connection))


async def enqueue_job(connection: Connection, message: EvalJobMessage) -> None:
    """Put `add_job` for the message into the queue."""
    queries = queue_of(connection)
    await queries.enqueue(QUEUE_ADD_JOB, message.to_json(), priority=message.priority)


async def enqueue_message(connection: Connection, queue: str, message: Message) -> None:
    """Put one message, as it is, into an outgoing queue."""
    await queue_of(connection).enqueue(queue, message.to_json())


async def enqueue_telemetry(
    connection: Connection, rows: TelemetryRows, episodes: Sequence[bytes], steps: Sequence[bytes]
) -> None:
    """Put episode and step messages into their queues: one INSERT and one NOTIFY for all of them."""
    queues: list[str] = []
    payloads: list[bytes | None] = []
    for queue, messages, wanted in (
        (QUEUE_EPISODE, episodes, rows.episodes),
        (QUEUE_STEP, steps, rows.steps),
    ):
        if not wanted:
            continue
        for payload in packed(messages, rows):
            queues.append(queue)
            payloads.append(payload)
    if queues:
        queries = queue_of(connection)
        await queries.enqueue(queues, payloads, [0] * len(queues))


def packed(messages: Iterable[bytes], rows: TelemetryRows) -> Iterator[bytes]:
    """`{"messages": [...]}` payloads within the caps; bare messages where one goes into a row."""
    if rows.messages_per_row == 1:
        yield from messages
        return
    row: list[bytes] = []
    size = 0
    for message in messages:
        if row and (len(row) >= rows.messages_per_row or size + len(message) > rows.row_bytes):
            yield _together(row)
            row, size = [], 0
        row.append(message)
        size += len(message) + 1
    if row:
        yield _together(row)


def _together(messages: Sequence[bytes]) -> bytes:
    return b'{"messages":[' + b",".join(messages) + b"]}"
