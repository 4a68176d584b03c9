"""The reconciler against a restart by Ray: a process with the old holder claims while a new one is made."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest

from orchestrator.adapters.postgres.reconciliation import ReconciliationQueries
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.ports import ClaimRefusal, ContainerRecord
from tests.interleavings.control import NewSupervisors
from tests.interleavings.sessions import is_claim, lapse, queue_rows, waits_for_a_lock, within_deadline
from tests.job_fixtures import a_job, a_result, a_store, claimed
from tests.stepping import in_session
from tests.unit.actors.control_fakes import a_reconciler

if TYPE_CHECKING:
    from orchestrator.adapters.postgres.job_store import PostgresJobStore
    from tests.conftest import Pool
    from tests.stepping import Stepper

CLAIM = "postgres.job_store.claim"
UNDER_THE_LOCK = ["lock_exclusive.after", "select_jobs.after", "update_jobs.after", "commit.before"]
LAPSED = UUID(int=7)


async def held_and_lapsed(store: PostgresJobStore, pool: Pool) -> None:
    """Job 1 is held by `LAPSED`, whose process has died; the lease is over."""
    await claimed(store, holder=LAPSED)
    await lapse(pool)


async def holder(pool: Pool) -> tuple[UUID, int]:
    row = await pool.fetchrow("SELECT lease_holder, epoch FROM jobs")
    return UUID(str(row["lease_holder"])), row["epoch"]


async def test_a_restart_that_claims_after_the_reconciler_looked_keeps_its_job(
    pool: Pool, steps: Stepper
) -> None:
    store = a_store(pool)
    await held_and_lapsed(store, pool)
    supervisors = NewSupervisors(store)
    held = steps.hold("postgres.reconciliation.unsupervised.*.after", "reconciler")
    round_ = in_session("reconciler", a_reconciler(pool, store, supervisors=supervisors).reconcile())
    await held.reached()

    restarted = await store.claim(1, LAPSED)
    held.go_on()
    await within_deadline(round_)

    assert is_claim(restarted)
    assert supervisors.answers == [ClaimRefusal.LEASED]
    assert await holder(pool) == (LAPSED, 2)


@pytest.mark.parametrize("point", UNDER_THE_LOCK)
async def test_a_restart_whose_claim_is_under_way_keeps_its_job(
    pool: Pool, steps: Stepper, point: str
) -> None:
    store = a_store(pool)
    await held_and_lapsed(store, pool)
    supervisors = NewSupervisors(store)
    looked = steps.hold("postgres.reconciliation.unsupervised.*.after", "reconciler")
    round_ = in_session("reconciler", a_reconciler(pool, store, supervisors=supervisors).reconcile())
    await looked.reached()
    held = steps.hold(f"{CLAIM}.{point}", "restarted")
    restarted = in_session("restarted", store.claim(1, LAPSED))
    await held.reached()

    looked.go_on()
    await waits_for_a_lock(pool, round_)
    held.go_on()
    await within_deadline(round_)

    assert is_claim(await within_deadline(restarted))
    assert supervisors.answers == [ClaimRefusal.LEASED]
    assert await holder(pool) == (LAPSED, 2)


@pytest.mark.parametrize("point", UNDER_THE_LOCK)
async def test_a_restart_that_comes_after_the_reconcilers_supervisor_is_refused(
    pool: Pool, steps: Stepper, point: str
) -> None:
    store = a_store(pool)
    await held_and_lapsed(store, pool)
    supervisors = NewSupervisors(store)
    held = steps.hold(f"{CLAIM}.{point}", "reconciler")
    round_ = in_session("reconciler", a_reconciler(pool, store, supervisors=supervisors).reconcile())
    await held.reached()

    restarted = in_session("restarted", store.claim(1, LAPSED))
    await waits_for_a_lock(pool, restarted)
    held.go_on()
    await within_deadline(round_)

    assert await within_deadline(restarted) is ClaimRefusal.LEASED
    assert supervisors.answers == [None]
    assert await holder(pool) == (supervisors.claims[1].holder, 2)


@pytest.mark.parametrize("cancelled", [False, True], ids=["over time", "cancelled"])
async def test_a_job_that_is_claimed_after_the_reconciler_found_it_overdue_is_left_to_its_supervisor(
    pool: Pool, steps: Stepper, cancelled: bool
) -> None:
    store = a_store(pool)
    await held_and_lapsed(store, pool)
    if cancelled:
        await store.request_cancel(1, "changed my mind")
    else:
        await pool.execute("UPDATE jobs SET deadline_at = clock_timestamp()")
    held = steps.hold("postgres.reconciliation.overdue.*.after", "reconciler")
    round_ = in_session("reconciler", a_reconciler(pool, store).reconcile())
    await held.reached()

    restarted = await store.claim(1, LAPSED)
    held.go_on()
    await within_deadline(round_)

    assert not isinstance(restarted, ClaimRefusal)
    assert await pool.fetchval("SELECT count(*) FROM results") == 0
    status = JobStatus.CANCELLED if cancelled else JobStatus.TIMEOUT
    await store.finish(restarted, status, a_result(status.value))
    assert await queue_rows(pool, "eval_result") == 1


@pytest.mark.parametrize(
    "point", ["lock_exclusive.after", "select_jobs.after", "insert_results.after", "commit.before"]
)
async def test_a_restart_that_comes_while_the_reconciler_ends_the_job_finds_it_over(
    pool: Pool, steps: Stepper, point: str
) -> None:
    store = a_store(pool)
    await held_and_lapsed(store, pool)
    await pool.execute("UPDATE jobs SET deadline_at = clock_timestamp()")
    held = steps.hold(f"postgres.job_store.finish_unheld.{point}", "reconciler")
    round_ = in_session("reconciler", a_reconciler(pool, store).reconcile())
    await held.reached()

    restarted = in_session("restarted", store.claim(1, LAPSED))
    await waits_for_a_lock(pool, restarted)
    held.go_on()
    await within_deadline(round_)

    assert await within_deadline(restarted) is ClaimRefusal.FINAL
    assert await pool.fetchval("SELECT status FROM jobs") == "TIMEOUT"
    assert await queue_rows(pool, "eval_result") == 1


async def test_a_job_that_a_consumer_takes_after_the_reconciler_found_it_forgotten_is_held_once(
    pool: Pool, steps: Stepper
) -> None:
    store = a_store(pool)
    await store.insert(a_job(), enqueue=False)
    await pool.execute("UPDATE jobs SET created_at = clock_timestamp() - interval '1 minute'")
    supervisors = NewSupervisors(store)
    held = steps.hold("postgres.reconciliation.queued_without_row.*.after", "reconciler")
    round_ = in_session("reconciler", a_reconciler(pool, store, supervisors=supervisors).reconcile())
    await held.reached()

    taken = await store.claim(1, uuid4())
    held.go_on()
    await within_deadline(round_)

    assert not isinstance(taken, ClaimRefusal)
    assert supervisors.answers == [ClaimRefusal.LEASED]
    assert await holder(pool) == (taken.holder, 1)


@pytest.mark.parametrize("point", ["select_containers.after", "lock_exclusive.before"])
async def test_a_container_that_a_restart_removes_first_is_removed_by_the_reconciler_all_the_same(
    pool: Pool, steps: Stepper, point: str
) -> None:
    store, container_id = a_store(pool), uuid4()
    old = await claimed(store, holder=LAPSED)
    await store.register_container(old, ContainerRecord(container_id, 1, 1, None))
    await lapse(pool)
    held = steps.hold(f"postgres.job_store.mark_unclaimed_removing.{point}", "reconciler")
    marking = in_session("reconciler", store.mark_unclaimed_removing(container_id))
    await held.reached()

    claim = await claimed(store, holder=LAPSED)
    await store.mark_container_removing(claim, container_id)
    held.go_on()

    assert await within_deadline(marking)
    assert await store.current_container(claim) is None


@pytest.mark.parametrize(
    "point", ["lock_exclusive.after", "select_jobs.after", "update_containers.after", "commit.before"]
)
async def test_a_container_that_the_reconciler_is_about_to_remove_is_not_adopted(
    pool: Pool, steps: Stepper, point: str
) -> None:
    store, left, fresh = a_store(pool), uuid4(), uuid4()
    old = await claimed(store, holder=LAPSED)
    await store.register_container(old, ContainerRecord(left, 1, 1, "a handle"))
    await pool.execute("UPDATE jobs SET container_id = NULL")  # replaced, and its removal was not begun
    await lapse(pool)
    claim = await claimed(store, holder=LAPSED)
    held = steps.hold(f"postgres.job_store.mark_unclaimed_removing.{point}", "reconciler")
    marking = in_session("reconciler", store.mark_unclaimed_removing(left))
    await held.reached()

    registering = in_session("restarted", store.register_container(claim, ContainerRecord(fresh, 1, 2, None)))
    await waits_for_a_lock(pool, registering)
    held.go_on()

    assert await within_deadline(marking)
    await within_deadline(registering)
    current = await store.current_container(claim)
    assert current is not None
    assert current.container_id == fresh


async def test_queries_of_the_reconciler_see_a_claim_as_a_whole(pool: Pool, steps: Stepper) -> None:
    store = a_store(pool)
    await held_and_lapsed(store, pool)
    held = steps.hold(f"{CLAIM}.commit.before", "restarted")
    restarted = in_session("restarted", store.claim(1, LAPSED))
    await held.reached()

    before = await ReconciliationQueries(pool).unsupervised()
    held.go_on()
    await within_deadline(restarted)
    after = await ReconciliationQueries(pool).unsupervised()

    assert (before, after) == ([1], [])
