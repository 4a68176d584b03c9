from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from pgqueuer.adapters.persistence.queries import Queries
from structlog.testing import capture_logs

from orchestrator.adapters.postgres.held_rows import held_rows
from orchestrator.adapters.postgres.ledger import PostgresLedger
from orchestrator.adapters.postgres.outgoing import take_rows
from orchestrator.adapters.postgres.retention import BATCH_ROWS, Pruned, Retention, RetentionRules
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.messages import (
    OUTGOING_QUEUES,
    QUEUE_ADD_JOB,
    QUEUE_EPISODE,
    QUEUE_RESULT,
    QUEUE_STATUS,
    QUEUE_STEP,
)
from tests.job_fixtures import a_result, a_store, claimed, finished, planned_runs
from tests.unit.actors.control_fakes import FakeSupervisors, consuming, eventually

if TYPE_CHECKING:
    from tests.conftest import Pool

HOUR = RetentionRules(age_seconds=3600.0, rows_per_queue=1_000_000)


async def fill(pool: Pool, count: int, *queues: str, hours: float = 0.0, status: str = "queued") -> None:
    """Each queue with as many rows, so many hours old."""
    await pool.execute(
        """INSERT INTO pgqueuer (priority, status, entrypoint, payload, created, updated)
           SELECT 0, $4::pgqueuer_status, queue, convert_to(json_build_object('number', n)::text, 'UTF8'),
               now() - $3::interval, now() - $3::interval
           FROM unnest($1::text[]) AS queue, generate_series(0, $2::int - 1) AS n""",
        queues,
        count,
        timedelta(hours=hours),
        status,
    )


async def left(pool: Pool) -> dict[str, int]:
    rows = await pool.fetch("SELECT entrypoint, count(*) AS rows FROM pgqueuer GROUP BY entrypoint")
    return {row["entrypoint"]: row["rows"] for row in rows}


async def age_log(pool: Pool, **by: float) -> None:
    await pool.execute("UPDATE pgqueuer_log SET created = created - $1::interval", timedelta(**by))


async def test_queues_that_nobody_consumes_are_bounded_by_age_and_results_are_kept(pool: Pool) -> None:
    await fill(pool, 2, *OUTGOING_QUEUES, hours=2)
    await fill(pool, 3, *OUTGOING_QUEUES)

    pruned = await Retention(pool).prune(HOUR)

    assert await left(pool) == {QUEUE_RESULT: 5, QUEUE_STATUS: 3, QUEUE_EPISODE: 3, QUEUE_STEP: 3}
    assert (pruned[Pruned.STEPS], Pruned.RESULTS in pruned) == (2, False)


async def test_queues_that_nobody_consumes_are_bounded_by_count_and_keep_the_newest(pool: Pool) -> None:
    await fill(pool, 5, *OUTGOING_QUEUES)

    await Retention(pool).prune(replace(HOUR, rows_per_queue=2))

    assert await left(pool) == {QUEUE_RESULT: 5, QUEUE_STATUS: 2, QUEUE_EPISODE: 2, QUEUE_STEP: 2}
    payloads = await pool.fetch("SELECT payload FROM pgqueuer WHERE entrypoint = $1 ORDER BY id", QUEUE_STEP)
    assert [json.loads(row["payload"])["number"] for row in payloads] == [3, 4]


async def test_many_rows_go_in_several_batches_and_what_there_is_no_time_for_stays(pool: Pool) -> None:
    await fill(pool, 2 * BATCH_ROWS + 5, QUEUE_STEP, hours=2)
    await fill(pool, 2 * BATCH_ROWS, QUEUE_EPISODE)
    rules = replace(HOUR, rows_per_queue=7)

    hurried = await Retention(pool).prune(rules, patience_seconds=0.0)
    pruned = await Retention(pool).prune(rules)

    assert not any(hurried.values())
    assert (pruned[Pruned.STEPS], pruned[Pruned.EPISODES]) == (2 * BATCH_ROWS + 5, 2 * BATCH_ROWS - 7)
    assert await left(pool) == {QUEUE_EPISODE: 7}


async def test_what_a_consumer_has_picked_is_not_touched_and_what_it_holds_as_failed_is(pool: Pool) -> None:
    await fill(pool, 2, QUEUE_STEP, hours=2, status="picked")
    await fill(pool, 3, QUEUE_STEP, hours=2, status="failed")

    await Retention(pool).prune(replace(HOUR, rows_per_queue=1))

    assert await left(pool) == {QUEUE_STEP: 2}


async def test_jobs_that_wait_are_never_dropped(pool: Pool) -> None:
    await fill(pool, 3, QUEUE_ADD_JOB, hours=999)

    await Retention(pool).prune(replace(HOUR, rows_per_queue=1))

    assert await left(pool) == {QUEUE_ADD_JOB: 3}


async def test_held_jobs_are_kept_with_their_reasons_until_they_are_too_old(pool: Pool) -> None:
    store = a_store(pool)
    with capture_logs():
        async with consuming(pool, store, FakeSupervisors(store)):
            await Queries.from_asyncpg_pool(pool).enqueue(QUEUE_ADD_JOB, b"not json")
            await eventually(lambda: one_is_held(pool))
    await age_log(pool, days=3)

    await Retention(pool).prune(replace(HOUR, age_seconds=7 * 86_400.0))
    (kept,) = await held_rows(pool, 10)
    await pool.execute("UPDATE pgqueuer SET updated = updated - interval '8 days'")
    pruned = await Retention(pool).prune(replace(HOUR, age_seconds=7 * 86_400.0))

    assert "not JSON" in kept.reason
    assert pruned[Pruned.HELD_JOBS] == 1
    assert await held_rows(pool, 10) == []
    assert await pool.fetchval("SELECT count(*) FROM pgqueuer_log") == 0


async def one_is_held(pool: Pool) -> bool:
    return len(await held_rows(pool, 10)) == 1


async def test_the_queue_log_is_pruned_of_everything_also_of_acknowledgements(pool: Pool) -> None:
    await Queries.from_asyncpg_pool(pool).enqueue([QUEUE_STEP] * 3, [b"{}"] * 3, [0] * 3)
    async with take_rows(pool, QUEUE_STEP, rows=2) as rows:
        assert len(rows) == 2
    states = await pool.fetch("SELECT DISTINCT status::text FROM pgqueuer_log")
    await age_log(pool, days=2)
    await Queries.from_asyncpg_pool(pool).enqueue(QUEUE_STEP, b"{}")

    pruned = await Retention(pool).prune(HOUR)

    assert {row["status"] for row in states} >= {"queued", "successful"}
    assert pruned[Pruned.QUEUE_LOG] >= 5
    assert await pool.fetchval("SELECT count(*) FROM pgqueuer_log") == 1


async def test_staged_steps_that_can_never_be_published_are_dropped(pool: Pool) -> None:
    store, ledger = a_store(pool), PostgresLedger(pool)
    claim = await claimed(store)
    first, second, third = await planned_runs(pool, claim)
    for run in (first, second, third):
        assert await ledger.stage_part(run, 0, [b"{}"])
    await ledger.commit([finished(first)])  # it says that it staged nothing: its part is nobody's
    (again,) = await ledger.assign(claim, [second.key])
    assert await ledger.stage_part(again, 0, [b"{}"])

    pruned = await Retention(pool).prune(HOUR)

    kept = await pool.fetch("SELECT episode_id, run FROM episode_parts ORDER BY episode_id")
    assert pruned[Pruned.EPISODE_PARTS] == 2
    assert [(row["episode_id"], row["run"]) for row in kept] == [
        (again.episode_id, again.run),
        (third.episode_id, third.run),
    ]


async def test_queued_results_are_dropped_only_where_asked_and_where_they_are_stored(pool: Pool) -> None:
    store = a_store(pool)
    await store.finish(await claimed(store), JobStatus.CANCELLED, a_result("CANCELLED"))
    await pool.execute("UPDATE pgqueuer SET created = created - interval '2 days'")
    await fill(pool, 1, QUEUE_RESULT, hours=48)  # names no job: nobody else has it

    never = await Retention(pool).prune(HOUR)
    young = await Retention(pool).prune(replace(HOUR, results_age_seconds=3 * 86_400.0))
    pruned = await Retention(pool).prune(replace(HOUR, results_age_seconds=86_400.0))

    assert (Pruned.RESULTS in never, young[Pruned.RESULTS], pruned[Pruned.RESULTS]) == (False, 0, 1)
    assert await left(pool) == {QUEUE_RESULT: 1}
    assert await store.result(1) is not None


async def test_recorded_actions_are_forgotten_only_where_asked_and_their_hashes_stay(pool: Pool) -> None:
    store, ledger = a_store(pool, max_concurrent_jobs=2), PostgresLedger(pool)
    claims = [await claimed(store, job_id) for job_id in (1, 2)]
    for claim in claims:
        await ledger.commit([finished(run) for run in await planned_runs(pool, claim)])
    await store.finish(claims[0], JobStatus.CANCELLED, a_result("CANCELLED"))
    await pool.execute("UPDATE jobs SET finished_at = finished_at - interval '2 days' WHERE job_id = 1")
    rules = replace(HOUR, traces_age_seconds=86_400.0)

    never = await Retention(pool).prune(HOUR)
    would_be = await Retention(pool).prune(rules, dry_run=True)
    pruned = await Retention(pool).prune(rules)

    kept = await pool.fetch("SELECT job_id FROM episodes WHERE action_trace IS NOT NULL")
    hashes = await pool.fetchval("SELECT count(action_trace_sha256) FROM episodes")
    assert Pruned.ACTION_TRACES not in never
    assert would_be[Pruned.ACTION_TRACES] == pruned[Pruned.ACTION_TRACES] == 3
    assert ({row["job_id"] for row in kept}, hashes) == ({2}, 6)


async def test_a_dry_run_counts_and_drops_nothing(pool: Pool) -> None:
    await fill(pool, 4, *OUTGOING_QUEUES, hours=2)
    before = await left(pool)

    would_be = await Retention(pool).prune(HOUR, dry_run=True)

    assert (would_be[Pruned.STEPS], await left(pool)) == (4, before)
    assert would_be == await Retention(pool).prune(HOUR)


@pytest.mark.parametrize("only", [Pruned.STEPS, Pruned.QUEUE_LOG])
async def test_one_kind_alone_may_be_pruned(pool: Pool, only: Pruned) -> None:
    await fill(pool, 4, *OUTGOING_QUEUES, hours=2)

    pruned = await Retention(pool).prune(HOUR, only=only)

    assert set(pruned) == {only}
    assert (await left(pool))[QUEUE_EPISODE] == 4


async def test_rows_that_others_have_locked_are_passed_over_without_waiting(pool: Pool) -> None:
    await fill(pool, 3, QUEUE_STEP, hours=2)
    async with pool.acquire() as consumer, consumer.transaction():
        locked = await consumer.fetchval("SELECT min(id) FROM pgqueuer")
        await consumer.fetch("SELECT FROM pgqueuer WHERE id = $1 FOR UPDATE", locked)

        pruned = await Retention(pool).prune(HOUR)

    assert pruned[Pruned.STEPS] == 2
    assert await pool.fetchval("SELECT id FROM pgqueuer") == locked


async def test_neither_producers_nor_consumers_wait_for_a_batch_that_is_being_dropped(pool: Pool) -> None:
    await fill(pool, 3, QUEUE_STEP)
    async with pool.acquire() as pruner:
        batch = pruner.transaction()
        await batch.start()
        await Retention(pruner).prune(replace(HOUR, rows_per_queue=2, age_seconds=99_999.0))

        # Would they wait for the open transaction, they would wait for ever.
        async with asyncio.timeout(60):
            await Queries.from_asyncpg_pool(pool).enqueue(QUEUE_STEP, b"{}")
            async with take_rows(pool, QUEUE_STEP, rows=10) as rows:
                taken = len(rows)
        await batch.commit()

    assert taken == 3
    assert await left(pool) == {}
