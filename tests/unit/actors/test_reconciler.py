from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest

from orchestrator.adapters.postgres.client_leases import renew
from orchestrator.adapters.postgres.job_store import JobClient, PostgresJobStore
from orchestrator.adapters.postgres.queue import enqueue_job, queue_of
from orchestrator.adapters.postgres.retention import RetentionRules
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.messages import (
    OUTGOING_QUEUES,
    QUEUE_EPISODE,
    QUEUE_RESULT,
    QUEUE_STATUS,
    QUEUE_STEP,
    EvalJobMessage,
)
from orchestrator.ports import Claim, ContainerRecord
from tests.job_fixtures import a_job, a_result, a_store, claimed
from tests.unit.actors.control_fakes import FakeContainers, FakeSupervisors, a_reconciler, eventually

if TYPE_CHECKING:
    from tests.conftest import Pool

pytestmark = pytest.mark.usefixtures("unrendered_log")


async def lapse_leases(pool: Pool) -> None:
    await pool.execute(
        "UPDATE jobs SET lease_expires_at = clock_timestamp() - interval '1 s' WHERE lease_holder IS NOT NULL"
    )


async def queued_long_ago(pool: Pool, store: PostgresJobStore, *jobs: EvalJobMessage) -> None:
    for job in jobs:
        await store.insert(job, enqueue=False)
    await pool.execute("UPDATE jobs SET created_at = created_at - interval '1 minute'")


async def statuses(pool: Pool) -> dict[int, str]:
    return {row["job_id"]: row["status"] for row in await pool.fetch("SELECT job_id, status FROM jobs")}


async def rows(pool: Pool, queue: str) -> int:
    return int(await pool.fetchval("SELECT count(*) FROM pgqueuer WHERE entrypoint = $1", queue))


async def a_container(store: PostgresJobStore, claim: Claim) -> UUID:
    record = ContainerRecord(uuid4(), claim.job.job_id, 1, None)
    await store.register_container(claim, record)
    return record.container_id


# ------------------------------------------------------------------------------ overdue and cancelled


async def test_overdue_and_cancelled_jobs_that_nobody_holds_end_with_exactly_one_result(pool: Pool) -> None:
    store = a_store(pool, max_concurrent_jobs=9)
    for job_id in (1, 2):
        await claimed(store, job_id)
    await pool.execute("UPDATE jobs SET deadline_at = clock_timestamp() - interval '1 s' WHERE job_id = 1")
    await lapse_leases(pool)
    await store.insert(a_job(3), enqueue=False)
    for job_id in (2, 3):
        await store.request_cancel(job_id, "not wanted any more")
    reconciler = a_reconciler(pool, store)

    await asyncio.gather(reconciler.reconcile(), reconciler.reconcile())
    await reconciler.reconcile()

    assert await statuses(pool) == {1: "TIMEOUT", 2: "CANCELLED", 3: "CANCELLED"}
    assert await pool.fetchval("SELECT count(*) FROM results") == 3
    assert await rows(pool, QUEUE_RESULT) == 3
    result = await store.result(2)
    assert result is not None
    assert result.error == "not wanted any more"


async def test_a_held_job_is_left_to_its_supervisor(pool: Pool) -> None:
    store = a_store(pool)
    await claimed(store, 1)
    await pool.execute("UPDATE jobs SET deadline_at = clock_timestamp() - interval '1 s'")
    await store.request_cancel(1, "not wanted any more")
    supervisors = FakeSupervisors(store)

    await a_reconciler(pool, store, supervisors=supervisors).reconcile()

    assert await statuses(pool) == {1: "STARTING"}
    assert supervisors.revived == []


async def test_a_job_whose_client_went_silent_is_cancelled_and_ended(pool: Pool) -> None:
    store = a_store(pool)
    await queued_long_ago(pool, store, a_job(1), a_job(2))
    await pool.execute(
        "UPDATE jobs SET client_lease_expires_at = clock_timestamp() + interval '1 s' * (2 * job_id - 3)"
    )
    supervisors = FakeSupervisors(store)
    reconciler = a_reconciler(pool, store, supervisors=supervisors)

    await reconciler.cancel_for_silent_clients()
    await reconciler.end_overdue_jobs()

    assert await statuses(pool) == {1: "CANCELLED", 2: "QUEUED"}
    assert await pool.fetchval("SELECT error FROM jobs WHERE job_id = 1") == "its client has gone away"


async def test_a_job_whose_client_is_dead_ends_in_the_same_round_and_is_not_revived(pool: Pool) -> None:
    store = a_store(pool, max_concurrent_jobs=9)
    for job_id in (1, 2):
        await store.insert(a_job(job_id), enqueue=False, client=JobClient(f"client {job_id}", 3600))
        await claimed(store, job_id)
    await lapse_leases(pool)
    supervisors = FakeSupervisors(store)

    await a_reconciler(
        pool, store, supervisors=supervisors, client_is_dead=lambda client: client == "client 1"
    ).reconcile()

    assert (await statuses(pool))[1] == "CANCELLED"
    assert supervisors.revived == [2]


async def test_a_client_whose_lease_lapsed_while_nobody_could_renew_it_may_come_back(pool: Pool) -> None:
    store = a_store(pool)
    for job_id in (1, 2):
        await store.insert(a_job(job_id), enqueue=False, client=JobClient("client", 0.001))
    reconciler = a_reconciler(pool, store, client_grace_seconds=0.05)

    async def cancelled() -> list[int]:
        await reconciler.cancel_for_silent_clients()
        rows = await pool.fetch("SELECT job_id FROM jobs WHERE cancel_reason = 'its client has gone away'")
        return [row["job_id"] for row in rows]

    at_first = await cancelled()
    await renew(pool, [2], 3600)
    async with asyncio.timeout(20):
        while not (later := await cancelled()):
            await asyncio.sleep(0.01)

    assert (at_first, later) == ([], [1])


async def test_a_job_that_cannot_be_ended_does_not_keep_the_others(pool: Pool) -> None:
    store = a_store(pool)
    for job_id in (1, 2):
        await store.insert(a_job(job_id), enqueue=False)
        await store.request_cancel(job_id, "enough")
    # A result that is there already, of a job that is not over: it cannot be stored a second time.
    await pool.execute("INSERT INTO results (job_id, message) VALUES (1, '{}')")

    await a_reconciler(pool, store).reconcile()

    assert await statuses(pool) == {1: "QUEUED", 2: "CANCELLED"}


# ---------------------------------------------------------------------------------------- supervisors


async def test_held_jobs_without_a_live_lease_are_revived(pool: Pool) -> None:
    store = a_store(pool, max_concurrent_jobs=9)
    for job_id in (1, 2):
        await claimed(store, job_id)
    await lapse_leases(pool)
    await claimed(store, 3)
    supervisors = FakeSupervisors(store)

    await a_reconciler(pool, store, supervisors=supervisors).reconcile()

    assert supervisors.revived == [1, 2]


async def test_a_revival_that_fails_or_hangs_keeps_nothing_else_from_its_turn(pool: Pool) -> None:
    store = a_store(pool, max_concurrent_jobs=9)
    for job_id in (1, 2, 3):
        await claimed(store, job_id)
    await lapse_leases(pool)
    await queued_long_ago(pool, store, a_job(4))
    hangs = asyncio.Event()
    supervisors = FakeSupervisors(store, troubles={1: RuntimeError("no"), 2: hangs})
    reconciler = a_reconciler(pool, store, supervisors=supervisors, patience_seconds=0.2)

    await reconciler.reconcile()
    await reconciler.reconcile()

    assert supervisors.ensured == [4]
    # The failed one was tried again, and the one that hangs was not begun a second time.
    assert sorted(supervisors.revived) == [1, 1, 2, 3, 3]
    hangs.set()
    await reconciler.close()


async def test_what_runs_beside_the_rounds_ends_with_the_reconciler(pool: Pool) -> None:
    store = a_store(pool)
    await claimed(store, 1)
    await lapse_leases(pool)
    supervisors = FakeSupervisors(store, troubles={1: asyncio.Event()})
    reconciler = a_reconciler(pool, store, supervisors=supervisors, patience_seconds=0.2)
    others = asyncio.all_tasks()
    await reconciler.revive_unsupervised_jobs()

    await reconciler.close()

    assert {task for task in asyncio.all_tasks() - others if not task.done()} == set()


async def test_queued_jobs_without_a_queue_row_are_started_by_priority_within_capacity(pool: Pool) -> None:
    store = a_store(pool, max_concurrent_jobs=3)
    await claimed(store, 1)
    await queued_long_ago(pool, store, *(a_job(job_id, priority=job_id) for job_id in (2, 3, 4, 5)))
    async with pool.acquire() as connection:
        await enqueue_job(connection, a_job(5, priority=5))
    await store.insert(a_job(6, priority=9), enqueue=False)  # its queue row may be committed in a moment
    supervisors = FakeSupervisors(store)

    await a_reconciler(pool, store, supervisors=supervisors).reconcile()

    assert supervisors.ensured == [4, 3]
    assert await statuses(pool) == {
        1: "STARTING",
        2: "QUEUED",
        3: "STARTING",
        4: "STARTING",
        5: "QUEUED",
        6: "QUEUED",
    }


async def test_supervisors_of_jobs_that_ended_a_while_ago_are_ended(pool: Pool) -> None:
    store = a_store(pool, max_concurrent_jobs=9)
    for job_id in (1, 2, 3):
        claim = await claimed(store, job_id)
        if job_id != 3:
            await store.finish(claim, JobStatus.CANCELLED, a_result("CANCELLED", job_id))
    await pool.execute("UPDATE jobs SET finished_at = finished_at - interval '1 hour' WHERE job_id = 1")
    supervisors = FakeSupervisors(store, present=[1, 2, 3, 99])

    await a_reconciler(pool, store, supervisors=supervisors).reconcile()

    # The second may still clean up, the third works; of the last there is no job.
    assert sorted(supervisors.ended) == [1, 99]


# ----------------------------------------------------------------------------------------- containers


async def test_orphaned_containers_are_removed_and_claimed_ones_kept(pool: Pool) -> None:
    store = a_store(pool, max_concurrent_jobs=9)
    containers = FakeContainers()
    working, lapsed, over = [await claimed(store, job_id) for job_id in (1, 2, 3)]
    kept = [containers.add(await a_container(store, claim)) for claim in (working, lapsed)]
    replaced = containers.add(await a_container(store, over))
    left = containers.add(await a_container(store, over))
    await store.finish(over, JobStatus.CANCELLED, a_result("CANCELLED", 3))
    unknown, expired = containers.add(), containers.add(expired=True)
    await pool.execute("UPDATE jobs SET lease_expires_at = '-infinity' WHERE job_id = 2")

    await a_reconciler(pool, store, containers=containers).reconcile()

    assert list(containers.owned) == kept
    noted = await pool.fetch("SELECT container_id FROM containers")
    assert {row["container_id"] for row in noted} == set(kept)
    assert not {replaced, left, unknown, expired} & containers.owned.keys()


async def test_a_container_is_marked_before_it_is_removed_and_forgotten_after(pool: Pool) -> None:
    store = a_store(pool)
    claim = await claimed(store, 1)
    container_id = await a_container(store, claim)
    await store.finish(claim, JobStatus.CANCELLED, a_result("CANCELLED"))
    containers = FakeContainers(troubles={container_id: RuntimeError("busy")})
    containers.add(container_id)
    reconciler = a_reconciler(pool, store, containers=containers)

    await reconciler.reconcile()
    marked = await pool.fetchval("SELECT removing FROM containers")
    containers.troubles.clear()
    await reconciler.reconcile()

    assert marked is True
    assert containers.owned == {}
    assert await pool.fetchval("SELECT count(*) FROM containers") == 0


async def test_the_row_of_a_container_that_vanished_while_it_was_removed_is_forgotten(pool: Pool) -> None:
    store = a_store(pool)
    claim = await claimed(store, 1)
    container_id = await a_container(store, claim)
    await store.mark_container_removing(claim, container_id)

    await a_reconciler(pool, store).reconcile()

    assert await pool.fetchval("SELECT count(*) FROM containers") == 0


async def test_a_container_that_is_not_there_is_reported_to_its_supervisor_once_it_was_missed_twice(
    pool: Pool,
) -> None:
    store = a_store(pool, max_concurrent_jobs=9)
    containers, supervisors = FakeContainers(), FakeSupervisors(store)
    there, lost, begins = [await claimed(store, job_id) for job_id in (1, 2, 3)]
    for claim in (there, lost):
        container_id = await a_container(store, claim)
        await store.set_container_handle(claim, container_id, str(container_id))
        containers.add(container_id)
    await a_container(store, begins)  # it has no handle yet
    reconciler = a_reconciler(
        pool, store, containers=containers, supervisors=supervisors, lists_every_container=True
    )

    del containers.owned[container_id]
    await reconciler.reconcile()
    after_one_round = list(supervisors.told_missing)
    await reconciler.reconcile()

    assert after_one_round == []
    assert supervisors.told_missing == [(2, container_id)]


async def test_where_only_the_own_machines_containers_are_listed_none_counts_as_missing(pool: Pool) -> None:
    store = a_store(pool)
    supervisors = FakeSupervisors(store)
    claim = await claimed(store, 1)
    container_id = await a_container(store, claim)
    await store.set_container_handle(claim, container_id, str(container_id))
    reconciler = a_reconciler(pool, store, supervisors=supervisors)

    for _ in range(3):
        await reconciler.reconcile()

    assert supervisors.told_missing == []


async def test_a_removal_that_hangs_delays_neither_the_others_nor_the_round(pool: Pool) -> None:
    store = a_store(pool)
    containers = FakeContainers()
    first, _ = containers.add(), containers.add()
    containers.troubles[first] = asyncio.Event()
    reconciler = a_reconciler(pool, store, containers=containers, patience_seconds=0.2)

    await asyncio.wait_for(reconciler.reconcile(), 30)

    async def only_the_first_is_left() -> bool:
        return list(containers.owned) == [first]

    await eventually(only_the_first_is_left)
    await reconciler.close()


# ------------------------------------------------------------------------------------------ retention


async def fill(pool: Pool, count: int) -> None:
    """Every outgoing queue with as many rows."""
    async with pool.acquire() as connection:
        for queue in OUTGOING_QUEUES:
            payloads = [json.dumps({"number": number}).encode() for number in range(count)]
            await queue_of(connection).enqueue([queue] * count, payloads, [0] * count)


async def test_what_nobody_consumes_is_bounded_every_now_and_then(pool: Pool) -> None:
    reconciler = a_reconciler(pool, a_store(pool), retention_rules=RetentionRules(3600.0, rows_per_queue=2))
    await fill(pool, 5)
    await reconciler.reconcile()
    after_the_first = {queue: await rows(pool, queue) for queue in OUTGOING_QUEUES}

    await fill(pool, 1)
    await reconciler.reconcile()

    assert after_the_first == {QUEUE_RESULT: 5, QUEUE_STATUS: 2, QUEUE_EPISODE: 2, QUEUE_STEP: 2}
    assert await rows(pool, QUEUE_STEP) == 3  # looking through whole queues is not for every round


# --------------------------------------------------------------------------------------------- rounds


async def test_a_step_that_fails_keeps_no_other_step_from_running(pool: Pool) -> None:
    store = a_store(pool)
    await claimed(store, 1)
    await lapse_leases(pool)
    supervisors = FakeSupervisors(store)

    class NoContainers(FakeContainers):
        async def list_owned(self, installation_id: UUID) -> list[object]:  # type: ignore[override]
            raise KeyError("the disk is away")

    await fill(pool, 5)
    reconciler = a_reconciler(
        pool,
        store,
        supervisors=supervisors,
        containers=NoContainers(),
        retention_rules=RetentionRules(3600.0, rows_per_queue=1),
    )

    await reconciler.reconcile()

    assert supervisors.revived == [1]
    assert await rows(pool, QUEUE_STEP) == 1
