"""Claim against claim: whatever the first one has done so far, exactly one holds the job."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from orchestrator.ports import ClaimRefusal
from tests.interleavings.sessions import is_claim, lost, waits_for_a_lock, within_deadline
from tests.job_fixtures import a_job, a_store
from tests.stepping import in_session

if TYPE_CHECKING:
    from tests.conftest import Pool
    from tests.stepping import Stepper

CLAIM = "postgres.job_store.claim"
BEFORE_THE_LOCK = ["begin.before", "begin.after", "lock_exclusive.before"]
UNDER_THE_LOCK = [
    "lock_exclusive.after",
    "select_installation.before",
    "select_installation.after",
    "select_jobs.after",
    "update_jobs.before",
    "update_jobs.after",
    "insert_claims.after",
    "insert_pgqueuer.after",
    "commit.before",
]


@pytest.mark.parametrize("point", BEFORE_THE_LOCK)
async def test_a_claim_that_has_no_lock_yet_comes_second(pool: Pool, steps: Stepper, point: str) -> None:
    store = a_store(pool)
    await store.insert(a_job(), enqueue=False)
    held = steps.hold(f"{CLAIM}.{point}", "first")
    first = in_session("first", store.claim(1, uuid4()))
    await held.reached()

    second = await store.claim(1, uuid4())
    held.go_on()

    assert is_claim(second)
    assert await within_deadline(first) is ClaimRefusal.LEASED
    assert await pool.fetchval("SELECT epoch FROM jobs") == 1


@pytest.mark.parametrize("point", UNDER_THE_LOCK)
async def test_a_claim_under_way_makes_the_next_one_wait_and_refuses_it(
    pool: Pool, steps: Stepper, point: str
) -> None:
    store = a_store(pool)
    await store.insert(a_job(), enqueue=False)
    held = steps.hold(f"{CLAIM}.{point}", "first")
    first = in_session("first", store.claim(1, uuid4()))
    await held.reached()

    second = in_session("second", store.claim(1, uuid4()))
    await waits_for_a_lock(pool, second)
    held.go_on()

    assert is_claim(await within_deadline(first))
    assert await within_deadline(second) is ClaimRefusal.LEASED
    assert await pool.fetchval("SELECT epoch FROM jobs") == 1
    assert await pool.fetchval("SELECT count(*) FROM claims") == 1


@pytest.mark.parametrize("point", UNDER_THE_LOCK)
async def test_a_claim_whose_process_dies_under_way_leaves_the_job_to_the_next_one(
    pool: Pool, steps: Stepper, point: str
) -> None:
    store = a_store(pool)
    await store.insert(a_job(), enqueue=False)
    held = steps.hold(f"{CLAIM}.{point}", "first")
    first = in_session("first", store.claim(1, uuid4()))
    await held.reached()

    second = in_session("second", store.claim(1, uuid4()))
    await waits_for_a_lock(pool, second)
    held.cut()

    await lost(first)
    assert is_claim(await within_deadline(second))
    assert await pool.fetchval("SELECT epoch FROM jobs") == 1


async def test_a_claim_whose_answer_was_lost_is_made_again_by_its_holder_alone(
    pool: Pool, steps: Stepper
) -> None:
    store, holder = a_store(pool), uuid4()
    await store.insert(a_job(), enqueue=False)
    held = steps.hold(f"{CLAIM}.commit.after", "first")
    first = in_session("first", store.claim(1, holder))
    await held.reached()
    held.cut()
    await lost(first)

    stranger = await store.claim(1, uuid4())
    again = await store.claim(1, holder)

    assert stranger is ClaimRefusal.LEASED
    assert not isinstance(again, ClaimRefusal)
    assert again.epoch == 2  # whatever the lost one might still write is void


@pytest.mark.parametrize("point", [each for each in UNDER_THE_LOCK if not each.startswith("lock")][1:])
async def test_claims_of_two_jobs_at_once_do_not_share_the_last_place(
    pool: Pool, steps: Stepper, point: str
) -> None:
    store = a_store(pool, max_concurrent_jobs=1)
    for job_id in (1, 2):
        await store.insert(a_job(job_id), enqueue=False)
    held = steps.hold(f"{CLAIM}.{point}", "first")
    first = in_session("first", store.claim(1, uuid4()))
    await held.reached()

    second = in_session("second", store.claim(2, uuid4()))
    await waits_for_a_lock(pool, second)
    held.go_on()

    assert is_claim(await within_deadline(first))
    assert await within_deadline(second) is ClaimRefusal.CAPACITY
