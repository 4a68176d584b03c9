"""A queue row comes again while its job runs under a live lease: it is acknowledged, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from orchestrator.adapters.postgres.pool import Database
from orchestrator.ports import ClaimRefusal
from tests.interleavings.control import a_consumer
from tests.interleavings.sessions import make_silent, queue_rows
from tests.job_fixtures import a_job, a_store
from tests.unit.actors.control_fakes import eventually

if TYPE_CHECKING:
    from tests.conftest import Pool
    from tests.stepping import Stepper

ACKNOWLEDGED = "queue.acknowledge.*.after"


async def row_is_gone(pool: Pool) -> bool:
    return await queue_rows(pool, "add_job") == 0


@pytest.mark.parametrize(
    "point",
    [
        "queue.acknowledge.*.before",  # the supervisor holds the job, its row is there still
        "postgres.job_store.claim.commit.after",  # as above, and the consumer does not even know
        "postgres.job_store.insert.commit.after",  # the job is in its table, nobody has claimed
        "postgres.job_store.insert.begin.before",  # nothing was done yet
    ],
)
async def test_the_row_of_a_consumer_that_fell_silent_is_taken_by_another_and_the_job_held_once(
    database: Database, pool: Pool, steps: Stepper, point: str
) -> None:
    await a_store(pool).insert(a_job(), enqueue=True)
    if "insert" in point:
        await pool.execute("DELETE FROM jobs")  # as of a validator that knows the queue alone
    held = steps.hold(point, "silent")
    async with a_consumer(database, steps, "silent") as (_, silent, _):
        await steps.freeze_at(held)
        await make_silent(pool)
        async with a_consumer(database, steps, "other") as (_, other, _):
            await eventually(lambda: row_is_gone(pool))
            steps.thaw("silent")
            await eventually(lambda: _decided(silent.answers))

    was_held = "insert" not in point
    assert other.answers == [ClaimRefusal.LEASED if was_held else None]
    assert silent.answers == [None if was_held else ClaimRefusal.LEASED]
    assert await pool.fetchval("SELECT epoch FROM jobs") == 1
    assert await pool.fetchval("SELECT count(*) FROM claims") == 1
    assert await queue_rows(pool, "add_job") == 0


async def _decided(answers: list[ClaimRefusal | None]) -> bool:
    return bool(answers)


async def test_a_row_that_was_sent_twice_gives_one_claim(
    database: Database, pool: Pool, steps: Stepper
) -> None:
    await a_store(pool).insert(a_job(), enqueue=True)
    await pool.execute(
        """INSERT INTO pgqueuer (priority, status, entrypoint, payload, created, updated, heartbeat,
               execute_after)
           SELECT priority, status, entrypoint, payload, created, updated, heartbeat, execute_after
           FROM pgqueuer WHERE entrypoint = 'add_job'"""
    )

    async with a_consumer(database, steps, "only") as (_, supervisors, _):
        await eventually(lambda: row_is_gone(pool))

    assert sorted(supervisors.answers, key=str) == sorted([None, ClaimRefusal.LEASED], key=str)
    assert await pool.fetchval("SELECT epoch FROM jobs") == 1
