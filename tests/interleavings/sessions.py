"""What the tests of interleavings look at, on connections that are never held."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from orchestrator.adapters.postgres.pool import may_pass
from orchestrator.ports import ClaimRefusal

if TYPE_CHECKING:
    from tests.conftest import Pool

DEADLINE_SECONDS = 30.0


async def waits_for_a_lock(pool: Pool, task: asyncio.Task[Any], count: int = 1) -> None:
    """Return once `count` sessions of this database wait for a lock, `task` among them."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while True:
            assert not task.done(), task.result()
            waiting = await pool.fetchval(
                """SELECT count(*) FROM pg_stat_activity
                   WHERE datname = current_database() AND wait_event_type = 'Lock'"""
            )
            if waiting >= count:
                return
            await asyncio.sleep(0.01)


async def lapse(pool: Pool, job_id: int = 1) -> None:
    """End the job's lease at once, as if its holder had been away for longer."""
    await pool.execute(
        "UPDATE jobs SET lease_expires_at = clock_timestamp() - $2::interval WHERE job_id = $1",
        job_id,
        timedelta(seconds=1),
    )


async def queue_rows(pool: Pool, queue: str) -> int:
    return int(await pool.fetchval("SELECT count(*) FROM pgqueuer WHERE entrypoint = $1", queue))


async def telemetry(pool: Pool) -> tuple[int, int]:
    """The messages of episodes and of steps that wait for the validator."""
    episodes, steps = 0, 0
    rows = await pool.fetch("SELECT entrypoint, convert_from(payload, 'UTF8')::json AS message FROM pgqueuer")
    for row in rows:
        messages = json.loads(row["message"]).get("messages", [])
        if row["entrypoint"] == "episode_data":
            episodes += len(messages)
        if row["entrypoint"] == "episode_step_data":
            steps += len(messages)
    return episodes, steps


async def within_deadline(task: asyncio.Task[Any]) -> Any:
    """What the task gives, in time."""
    return await asyncio.wait_for(task, DEADLINE_SECONDS)


def is_claim(answer: object) -> bool:
    return not isinstance(answer, ClaimRefusal)


async def lost(task: asyncio.Task[Any]) -> None:
    """The task ends by the loss of its connection, which is worth another try."""
    with pytest.raises((asyncpg.PostgresConnectionError, asyncpg.InterfaceError)) as caught:
        await within_deadline(task)
    assert may_pass(caught.value)


async def make_silent(pool: Pool) -> None:
    """As if all consumers had been silent for a minute: their rows may be taken by others."""
    await pool.execute("UPDATE pgqueuer SET heartbeat = heartbeat - interval '1 minute'")
