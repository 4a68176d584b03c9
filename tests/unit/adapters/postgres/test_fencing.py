"""What the fence lets through and what it refuses; tests/interleavings steps it against itself."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from orchestrator.adapters.postgres.ledger import PostgresLedger
from orchestrator.domain.episodes import CommitOutcome
from orchestrator.domain.errors import Fenced, IllegalTransition, InfrastructureError
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.ports import ClaimRefusal, ContainerRecord
from tests.job_fixtures import a_job, a_plan, a_result, a_store, claimed, finished, planned_runs

if TYPE_CHECKING:
    from collections.abc import Awaitable

    import asyncpg

    Pool = asyncpg.Pool[asyncpg.Record]


async def waits_for_a_lock(pool: Pool, count: int = 1) -> None:
    """Return once `count` sessions of this database wait for a lock; fail if they never do."""
    async with asyncio.timeout(20):
        while True:
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


def started(work: Awaitable[Any]) -> asyncio.Task[Any]:
    return asyncio.ensure_future(work)


async def queue_rows(pool: Pool, queue: str) -> int:
    return int(await pool.fetchval("SELECT count(*) FROM pgqueuer WHERE entrypoint = $1", queue))


# ------------------------------------------------------------------------------- claim against claim


async def test_of_two_claims_at_once_exactly_one_holds_the_job(pool: Pool) -> None:
    store = a_store(pool)
    await store.insert(a_job(), enqueue=False)

    answers = await asyncio.gather(*(store.claim(1, uuid4()) for _ in range(4)))

    refusals = [answer for answer in answers if isinstance(answer, ClaimRefusal)]
    assert refusals == [ClaimRefusal.LEASED] * 3
    assert await pool.fetchval("SELECT epoch FROM jobs") == 1


async def test_claims_of_different_jobs_at_once_never_exceed_the_capacity(pool: Pool) -> None:
    store = a_store(pool, max_concurrent_jobs=2)
    for job_id in range(1, 7):
        await store.insert(a_job(job_id), enqueue=False)

    answers = await asyncio.gather(*(store.claim(job_id, uuid4()) for job_id in range(1, 7)))

    assert sum(not isinstance(answer, ClaimRefusal) for answer in answers) == 2
    assert answers.count(ClaimRefusal.CAPACITY) == 4
    assert await store.held_count() == 2


async def test_a_live_lease_refuses_everybody_but_its_holder(pool: Pool) -> None:
    store, holder = a_store(pool), uuid4()
    first = await claimed(store, holder=holder)

    stranger = await store.claim(1, uuid4())
    again = await store.claim(1, holder)

    assert stranger is ClaimRefusal.LEASED
    assert not isinstance(again, ClaimRefusal)
    assert again.epoch == first.epoch + 1


async def test_a_lapsed_lease_may_be_claimed_by_anybody_and_raises_the_epoch(pool: Pool) -> None:
    store = a_store(pool)
    first = await claimed(store)
    await lapse(pool)

    second = await store.claim(1, uuid4())

    assert not isinstance(second, ClaimRefusal)
    assert second.epoch == first.epoch + 1


# --------------------------------------------------------------------------------- runs of episodes


async def test_a_later_assignment_makes_the_earlier_one_void(pool: Pool) -> None:
    claim, ledger = await claimed(a_store(pool)), PostgresLedger(pool)
    (first, *_) = await planned_runs(pool, claim)
    (second,) = await ledger.assign(claim, [first.key])

    assert second.run == first.run + 1
    assert await ledger.commit([finished(first)]) == [CommitOutcome.STALE]
    assert await ledger.commit([finished(second)]) == [CommitOutcome.COMMITTED]


async def test_a_commit_sent_twice_has_one_effect_and_is_told_so(pool: Pool) -> None:
    claim, ledger = await claimed(a_store(pool)), PostgresLedger(pool)
    (run, *_) = await planned_runs(pool, claim)

    answers = [await ledger.commit([finished(run), finished(run)]), await ledger.commit([finished(run)])]

    assert answers == [[CommitOutcome.COMMITTED, CommitOutcome.ALREADY], [CommitOutcome.ALREADY]]
    assert await queue_rows(pool, "episode_data") == 1


async def test_two_sinks_with_the_same_episodes_commit_each_once_and_never_deadlock(pool: Pool) -> None:
    claim, ledger = await claimed(a_store(pool)), PostgresLedger(pool)
    runs = await planned_runs(pool, claim, episodes=20)
    batches = [[finished(run) for run in runs], [finished(run) for run in reversed(runs)]]

    answers = await asyncio.gather(*(ledger.commit(batch) for batch in batches for _ in range(3)))

    committed = [answer for batch in answers for answer in batch if answer is CommitOutcome.COMMITTED]
    assert len(committed) == 20
    assert len(await ledger.outcomes(1)) == 20


async def test_staged_parts_of_a_void_run_never_reach_the_validator(pool: Pool) -> None:
    claim, ledger = await claimed(a_store(pool)), PostgresLedger(pool)
    (first, *_) = await planned_runs(pool, claim)
    assert await ledger.stage_part(first, 0, [b'{"step":0,"run":1}'])
    (second,) = await ledger.assign(claim, [first.key])
    assert not await ledger.stage_part(first, 1, [b'{"step":1,"run":1}'])
    assert await ledger.stage_part(second, 0, [b'{"step":0,"run":2}'])
    assert await ledger.stage_part(second, 0, [b'{"step":0,"run":2}'])  # sent again

    import dataclasses

    await ledger.commit([dataclasses.replace(finished(second, steps=0), staged_parts=1)])

    payloads = await pool.fetch("SELECT payload FROM pgqueuer WHERE entrypoint = 'episode_step_data'")
    assert [bytes(row["payload"]) for row in payloads] == [b'{"messages":[{"step":0,"run":2}]}']
    assert await pool.fetchval("SELECT count(*) FROM episode_parts") == 0


# ------------------------------------------------------------------------ renewal, status and result


async def test_every_write_of_a_fenced_out_supervisor_is_refused_and_changes_nothing(pool: Pool) -> None:
    store, ledger = a_store(pool), PostgresLedger(pool)
    old = await claimed(store)
    await ledger.store_plan(old, a_plan())
    container = ContainerRecord(uuid4(), 1, 1, None)
    await store.register_container(old, container)
    await lapse(pool)
    await store.claim(1, uuid4())
    before = await pool.fetchrow("SELECT * FROM jobs")

    for write in (
        lambda: store.renew(old),
        lambda: store.watch(old),
        lambda: store.release(old, "bye"),
        lambda: store.set_status(old, JobStatus.RUNNING),
        lambda: store.finish(old, JobStatus.FAILED, a_result("FAILED")),
        lambda: store.register_container(old, ContainerRecord(uuid4(), 1, 2, None)),
        lambda: store.set_container_handle(old, container.container_id, "x"),
        lambda: store.mark_container_removing(old, container.container_id),
        lambda: ledger.assign(old, [a_plan()[0].key]),
        lambda: ledger.store_plan(old, a_plan()),
    ):
        with pytest.raises(Fenced):
            await write()

    assert await pool.fetchrow("SELECT * FROM jobs") == before
    assert await pool.fetchval("SELECT count(*) FROM results") == 0


async def test_a_job_is_completed_only_once_every_planned_episode_has_an_outcome(pool: Pool) -> None:
    store, ledger = a_store(pool), PostgresLedger(pool)
    claim = await claimed(store)
    runs = await planned_runs(pool, claim)
    await ledger.commit([finished(run) for run in runs[:2]])
    await store.set_status(claim, JobStatus.RUNNING)

    with pytest.raises(InfrastructureError, match="1 of 3 episodes"):
        await store.finish(claim, JobStatus.COMPLETED, a_result())
    await ledger.commit([finished(runs[2])])
    result = await store.finish(claim, JobStatus.COMPLETED, a_result())

    assert result.total_episodes == 3
    # Sent again after a lost answer: the same result, and no second one.
    assert await store.finish(claim, JobStatus.COMPLETED, a_result()) == result
    assert await pool.fetchval("SELECT count(*) FROM results") == 1
    assert await queue_rows(pool, "eval_result") == 1


async def test_a_job_under_a_live_lease_is_not_ended_by_the_reconciler(pool: Pool) -> None:
    store = a_store(pool)
    await claimed(store)
    build = store.failed_result

    assert not await store.finish_unheld(1, JobStatus.TIMEOUT, "too late", build)
    await lapse(pool)
    assert await store.finish_unheld(1, JobStatus.TIMEOUT, "too late", build)
    assert not await store.finish_unheld(1, JobStatus.TIMEOUT, "too late", build)


async def test_an_illegal_status_change_is_loud(pool: Pool) -> None:
    store = a_store(pool)
    claim = await claimed(store)
    await store.set_status(claim, JobStatus.RUNNING)

    with pytest.raises(IllegalTransition):
        await store.set_status(claim, JobStatus.QUEUED)


# ------------------------------------------------------------------------------ poison and containers


async def test_claims_in_a_row_without_progress_end_the_job_with_their_history(pool: Pool) -> None:
    store = a_store(pool, max_claims_without_progress=3)
    await claimed(store)
    answers = []
    for _ in range(3):
        await lapse(pool)
        answers.append(await store.claim(1, uuid4()))

    assert answers[-1] is ClaimRefusal.POISONED
    assert not any(isinstance(answer, ClaimRefusal) for answer in answers[:-1])
    job = await store.get(1)
    assert job is not None
    assert job.status is JobStatus.FAILED
    assert "3 claims in a row without a new outcome: epochs 1 to 3, from" in (job.error or "")
    assert await queue_rows(pool, "eval_result") == 1


async def test_what_interrupted_each_claim_is_in_the_history_of_a_job_that_is_given_up(pool: Pool) -> None:
    store = a_store(pool, max_claims_without_progress=2)
    for why in ("the archive's server failed", "no worker came up"):
        await store.release(await claimed(store), why)
        await lapse(pool)

    assert await store.claim(1, uuid4()) is ClaimRefusal.POISONED
    job = await store.get(1)
    assert job is not None
    assert "the archive's server failed; epoch 2" in (job.error or "")
    assert (job.error or "").endswith("no worker came up")


async def test_a_hand_over_may_be_claimed_at_once_and_counts_against_nobody(pool: Pool) -> None:
    store = a_store(pool, max_claims_without_progress=2)
    for _ in range(5):
        await store.release(await claimed(store), None)


async def test_after_a_failure_the_next_claim_waits_longer_each_time(pool: Pool) -> None:
    store = a_store(pool)
    await store.release(await claimed(store), "no")

    assert await store.claim(1, uuid4()) is ClaimRefusal.LEASED


async def test_jobs_that_were_held_do_not_keep_each_other_out_after_a_restart_with_fewer_places(
    pool: Pool,
) -> None:
    for job_id in (1, 2, 3):
        await claimed(a_store(pool, max_concurrent_jobs=3), job_id)
        await lapse(pool, job_id)
    store = a_store(pool, max_concurrent_jobs=1)

    answers = [await store.claim(job_id, uuid4()) for job_id in (1, 2, 3)]

    assert [isinstance(answer, ClaimRefusal) for answer in answers] == [False, True, True]


async def test_a_job_that_makes_progress_is_never_given_up(pool: Pool) -> None:
    store, ledger = a_store(pool, max_claims_without_progress=2), PostgresLedger(pool)
    claim = await claimed(store)
    runs = await planned_runs(pool, claim, episodes=5)
    for run in runs:
        (again,) = await ledger.assign(claim, [run.key])
        await ledger.commit([finished(again)])
        await lapse(pool)
        claim = await store.claim(1, uuid4())

        assert not isinstance(claim, ClaimRefusal)


async def test_a_container_marked_for_removal_is_never_adopted(pool: Pool) -> None:
    store, container_id = a_store(pool), uuid4()
    claim = await claimed(store)
    await store.register_container(claim, ContainerRecord(container_id, 1, 1, None))
    assert not await store.mark_unclaimed_removing(container_id)

    await store.mark_container_removing(claim, container_id)

    assert await store.current_container(claim) is None
    assert await store.mark_unclaimed_removing(container_id)
    await store.forget_container(container_id)
    assert await pool.fetchval("SELECT count(*) FROM containers") == 0


async def test_the_container_of_a_finished_job_is_nobodys(pool: Pool) -> None:
    store, container_id = a_store(pool), uuid4()
    claim = await claimed(store)
    await store.register_container(claim, ContainerRecord(container_id, 1, 1, None))

    await store.finish(claim, JobStatus.FAILED, a_result("FAILED"))

    assert await store.mark_unclaimed_removing(container_id)
