"""Cancel against result: one of them comes first, and the job ends once."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from orchestrator.adapters.postgres.ledger import PostgresLedger
from orchestrator.domain.episodes import CommitOutcome
from orchestrator.domain.errors import Fenced
from orchestrator.domain.lifecycle import JobStatus
from tests.interleavings.sessions import (
    is_claim,
    lapse,
    lost,
    queue_rows,
    waits_for_a_lock,
    within_deadline,
)
from tests.job_fixtures import a_result, a_store, claimed, finished, planned_runs
from tests.stepping import in_session
from tests.unit.actors.test_job_supervision import a_scene

if TYPE_CHECKING:
    from orchestrator.adapters.postgres.job_store import PostgresJobStore
    from orchestrator.ports import Claim
    from tests.conftest import Pool
    from tests.stepping import Stepper

FINISH = "postgres.job_store.finish"
CANCEL = "postgres.job_store.request_cancel"
BEFORE_THE_LOCK = ["begin.before", "begin.after", "lock_exclusive.before"]
UNDER_THE_LOCK = [
    "lock_exclusive.after",
    "select_results.after",
    "select_jobs.after",
    "select_episodes.after",
    "insert_results.before",
    "insert_results.after",
    "update_jobs.after",
    "insert_pgqueuer.after",
    "update_claims.after",
    "commit.before",
]


async def played(store: PostgresJobStore, pool: Pool) -> Claim:
    """A running job whose every episode has an outcome."""
    claim = await claimed(store)
    runs = await planned_runs(pool, claim)
    await store.set_status(claim, JobStatus.RUNNING)
    await PostgresLedger(pool).commit([finished(run) for run in runs])
    return claim


async def assert_one_end(pool: Pool, status: JobStatus) -> None:
    assert await pool.fetchval("SELECT status FROM jobs") == status
    assert await pool.fetchval("SELECT count(*) FROM results") == 1
    assert await pool.fetchval("SELECT message ->> 'status' FROM results") == status
    assert await queue_rows(pool, "eval_result") == 1


@pytest.mark.parametrize("point", UNDER_THE_LOCK)
async def test_a_cancel_that_comes_while_the_result_is_stored_waits_and_is_told_the_end(
    pool: Pool, steps: Stepper, point: str
) -> None:
    store = a_store(pool)
    claim = await played(store, pool)
    held = steps.hold(f"{FINISH}.{point}", "supervisor")
    finish = in_session("supervisor", store.finish(claim, JobStatus.COMPLETED, a_result()))
    await held.reached()

    cancel = in_session("client", store.request_cancel(1, "changed my mind"))
    await waits_for_a_lock(pool, cancel)
    held.go_on()

    await within_deadline(finish)
    assert await within_deadline(cancel) is JobStatus.COMPLETED
    assert not await pool.fetchval("SELECT cancel_requested_at IS NOT NULL FROM jobs")
    await assert_one_end(pool, JobStatus.COMPLETED)


@pytest.mark.parametrize("point", BEFORE_THE_LOCK)
async def test_a_cancel_that_comes_before_the_result_has_its_lock_is_noted_and_the_result_stands(
    pool: Pool, steps: Stepper, point: str
) -> None:
    store = a_store(pool)
    claim = await played(store, pool)
    held = steps.hold(f"{FINISH}.{point}", "supervisor")
    finish = in_session("supervisor", store.finish(claim, JobStatus.COMPLETED, a_result()))
    await held.reached()

    answer = await store.request_cancel(1, "changed my mind")
    held.go_on()

    await within_deadline(finish)
    assert answer is JobStatus.RUNNING
    await assert_one_end(pool, JobStatus.COMPLETED)


@pytest.mark.parametrize("point", ["lock_exclusive.after", "update_jobs.after", "commit.before"])
@pytest.mark.parametrize("dies", [False, True], ids=["goes on", "dies"])
async def test_a_result_that_comes_while_a_cancel_is_noted_waits_and_stands(
    pool: Pool, steps: Stepper, point: str, dies: bool
) -> None:
    store = a_store(pool)
    claim = await played(store, pool)
    held = steps.hold(f"{CANCEL}.{point}", "client")
    cancel = in_session("client", store.request_cancel(1, "changed my mind"))
    await held.reached()

    finish = in_session("supervisor", store.finish(claim, JobStatus.COMPLETED, a_result()))
    await waits_for_a_lock(pool, finish)
    if dies:
        held.cut()
        await lost(cancel)
    else:
        held.go_on()
        assert await within_deadline(cancel) is JobStatus.RUNNING

    await within_deadline(finish)
    await assert_one_end(pool, JobStatus.COMPLETED)


@pytest.mark.parametrize("point", UNDER_THE_LOCK)
async def test_a_result_whose_process_dies_while_it_is_stored_is_stored_by_the_next_one(
    pool: Pool, steps: Stepper, point: str
) -> None:
    store = a_store(pool)
    claim = await played(store, pool)
    await lapse(pool)
    held = steps.hold(f"{FINISH}.{point}", "supervisor")
    finish = in_session("supervisor", store.finish(claim, JobStatus.COMPLETED, a_result()))
    await held.reached()

    claiming = in_session("next", store.claim(1, uuid4()))
    await waits_for_a_lock(pool, claiming)
    held.cut()
    await lost(finish)
    following = await within_deadline(claiming)

    assert is_claim(following)
    with pytest.raises(Fenced):
        await store.finish(claim, JobStatus.COMPLETED, a_result())
    await store.set_status(following, JobStatus.RUNNING)
    await store.finish(following, JobStatus.COMPLETED, a_result())
    await assert_one_end(pool, JobStatus.COMPLETED)


async def test_a_result_whose_answer_was_lost_is_the_same_when_it_is_stored_again(
    pool: Pool, steps: Stepper
) -> None:
    store = a_store(pool)
    claim = await played(store, pool)
    held = steps.hold(f"{FINISH}.commit.after", "supervisor")
    finish = in_session("supervisor", store.finish(claim, JobStatus.COMPLETED, a_result()))
    await held.reached()
    held.cut()
    await lost(finish)

    again = await store.finish(claim, JobStatus.COMPLETED, a_result())

    assert again.status is JobStatus.COMPLETED
    await assert_one_end(pool, JobStatus.COMPLETED)


async def test_the_reconciler_and_a_supervisor_that_store_a_result_at_once_leave_one(
    pool: Pool, steps: Stepper
) -> None:
    store = a_store(pool)
    claim = await played(store, pool)
    await lapse(pool)
    held = steps.hold("postgres.job_store.finish_unheld.commit.before", "reconciler")
    ending = in_session(
        "reconciler", store.finish_unheld(1, JobStatus.TIMEOUT, "time is over", store.failed_result)
    )
    await held.reached()

    finish = in_session("supervisor", store.finish(claim, JobStatus.COMPLETED, a_result()))
    await waits_for_a_lock(pool, finish)
    held.go_on()

    assert await within_deadline(ending)
    with pytest.raises(Fenced):
        await within_deadline(finish)
    await assert_one_end(pool, JobStatus.TIMEOUT)


@pytest.mark.parametrize(
    "point", ["begin.before", "lock_exclusive.before", "update_jobs.before", "commit.before"]
)
async def test_a_supervision_that_is_cancelled_while_it_stores_its_result_ends_as_its_result_says(
    pool: Pool, steps: Stepper, point: str
) -> None:
    scene = await a_scene(pool, lease_seconds=9.0)
    scene.workers.go_on.set()
    held = steps.hold(f"{FINISH}.{point}", "supervisor")
    run = in_session("supervisor", scene.supervision.run())
    await held.reached()

    cancel = in_session("client", a_store(pool).request_cancel(1, "changed my mind"))
    if point.startswith(("begin", "lock")):
        await within_deadline(cancel)
    else:
        await waits_for_a_lock(pool, cancel)
    held.go_on()

    assert await within_deadline(run) is JobStatus.COMPLETED
    await within_deadline(cancel)
    await assert_one_end(pool, JobStatus.COMPLETED)
    assert scene.submission.removed == [1]


async def test_a_job_that_is_cancelled_while_it_is_claimed_ends_cancelled_once(
    pool: Pool, steps: Stepper
) -> None:
    scene = await a_scene(pool, lease_seconds=9.0)
    held = steps.hold("postgres.job_store.claim.update_jobs.after", "supervisor")
    run = in_session("supervisor", scene.supervision.run())
    await held.reached()

    cancel = in_session("client", a_store(pool).request_cancel(1, "changed my mind"))
    await waits_for_a_lock(pool, cancel)
    held.go_on()

    assert await within_deadline(cancel) is JobStatus.STARTING
    assert await within_deadline(run) is JobStatus.CANCELLED
    await assert_one_end(pool, JobStatus.CANCELLED)


@pytest.mark.parametrize("point", ["lock_shared.after", "update_episodes.after", "commit.before"])
@pytest.mark.parametrize("dies", [False, True], ids=["goes on", "dies"])
async def test_a_result_waits_for_a_commit_under_way_and_counts_it(
    pool: Pool, steps: Stepper, point: str, dies: bool
) -> None:
    store, ledger = a_store(pool), PostgresLedger(pool)
    claim = await claimed(store)
    runs = await planned_runs(pool, claim)
    held = steps.hold(f"postgres.ledger.commit.{point}", "sink")
    commit = in_session("sink", ledger.commit([finished(runs[0])]))
    await held.reached()

    finish = in_session("supervisor", store.finish(claim, JobStatus.TIMEOUT, a_result("TIMEOUT")))
    await waits_for_a_lock(pool, finish)
    held.cut() if dies else held.go_on()

    result = await within_deadline(finish)
    await (lost(commit) if dies else within_deadline(commit))
    assert result.total_episodes == (0 if dies else 1)
    assert await ledger.commit([finished(runs[1])]) == [CommitOutcome.STALE]


@pytest.mark.parametrize("point", ["lock_exclusive.after", "update_jobs.after", "commit.before"])
async def test_a_result_that_waited_for_a_claim_is_refused(pool: Pool, steps: Stepper, point: str) -> None:
    store = a_store(pool)
    claim = await played(store, pool)
    await lapse(pool)
    held = steps.hold(f"postgres.job_store.claim.{point}", "next")
    claiming = in_session("next", store.claim(1, uuid4()))
    await held.reached()

    finish = in_session("supervisor", store.finish(claim, JobStatus.COMPLETED, a_result()))
    await waits_for_a_lock(pool, finish)
    held.go_on()

    assert is_claim(await within_deadline(claiming))
    with pytest.raises(Fenced):
        await within_deadline(finish)
    assert await queue_rows(pool, "eval_result") == 0
