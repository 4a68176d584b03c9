"""The sink dies between batches or within one: workers send again, and every outcome is committed once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from orchestrator.actors.result_sink import ResultSink
from orchestrator.adapters.postgres.ledger import PostgresLedger
from orchestrator.adapters.postgres.pool import Database, open_pool
from orchestrator.domain.episodes import CommitOutcome
from orchestrator.domain.errors import InfrastructureError
from tests.interleavings.sessions import telemetry, within_deadline
from tests.job_fixtures import a_store, claimed, finished, planned_runs
from tests.stepping import in_session

if TYPE_CHECKING:
    from tests.conftest import Pool
    from tests.stepping import Stepper

COMMIT = "postgres.ledger.commit"


@asynccontextmanager
async def a_sink(database: Database, session: str) -> AsyncIterator[ResultSink]:
    """A sink at work on connections of its own, as the actor has it; its end is the actor's death."""
    async with open_pool(database, application_name=session, max_size=2) as pool:
        sink = ResultSink(
            PostgresLedger(pool), max_bytes=2**20, batch_episodes=2, database_patience_seconds=15.0
        )
        work = in_session(session, sink.work())
        try:
            yield sink
        finally:
            work.cancel()
            await asyncio.wait({work}, timeout=20)


@pytest.mark.parametrize(
    ("point", "committed_before"),
    [
        ("begin.before", 2),
        ("lock_shared.after", 2),
        ("update_episodes.after", 2),
        ("insert_pgqueuer.after", 2),
        ("commit.before", 2),
        ("commit.after", 4),
    ],
)
async def test_a_sink_that_dies_in_its_second_batch_loses_and_doubles_nothing(
    database: Database, pool: Pool, steps: Stepper, point: str, committed_before: int
) -> None:
    claim = await claimed(a_store(pool))
    runs = await planned_runs(pool, claim, episodes=6)
    batches = [[finished(run) for run in runs[start : start + 2]] for start in (0, 2, 4)]

    async with a_sink(database, "first sink") as first:
        answered = await first.commit(batches[0])
        held = steps.hold(f"{COMMIT}.{point}", "first sink")
        waiting = [asyncio.create_task(first.commit(batch)) for batch in batches[1:]]
        await held.reached()
    for worker in waiting:
        with pytest.raises(InfrastructureError, match="send again"):
            await within_deadline(worker)
    known = await pool.fetchval("SELECT count(*) FROM episodes WHERE finished")

    async with a_sink(database, "second sink") as second:
        again = [await second.commit(batch) for batch in batches]

    assert answered == [CommitOutcome.COMMITTED] * 2
    assert known == committed_before
    assert [outcome for batch in again for outcome in batch] == [CommitOutcome.ALREADY] * known + [
        CommitOutcome.COMMITTED
    ] * (6 - known)
    assert await telemetry(pool) == (6, 12)


async def test_a_sink_whose_connection_is_cut_after_its_commit_tells_the_outcome_all_the_same(
    database: Database, pool: Pool, steps: Stepper
) -> None:
    runs = await planned_runs(pool, await claimed(a_store(pool)))

    async with a_sink(database, "sink") as sink:
        held = steps.hold(f"{COMMIT}.commit.after", "sink")
        worker = asyncio.create_task(sink.commit([finished(run) for run in runs]))
        await held.reached()
        held.cut()
        outcomes = await within_deadline(worker)

    assert outcomes == [CommitOutcome.ALREADY] * 3
    assert await telemetry(pool) == (3, 6)
