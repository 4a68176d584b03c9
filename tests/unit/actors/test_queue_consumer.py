from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from pgqueuer.adapters.persistence.queries import Queries
from pgqueuer.core.buffers import JobStatusLogBuffer
from pgqueuer.domain.errors import RetryRequested
from pgqueuer.domain.models import Job

from orchestrator.actors import queue_consumer
from orchestrator.actors.queue_consumer import BoundedQueueManager, QueueConsumer, RowHeld
from orchestrator.adapters.postgres.job_store import PostgresJobStore
from orchestrator.adapters.postgres.queue import enqueue_job
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.messages import QUEUE_ADD_JOB
from tests.job_fixtures import a_job, a_result, a_store, claimed
from tests.unit.actors.control_fakes import FakeSupervisors, a_reconciler, consuming, eventually

if TYPE_CHECKING:
    from tests.conftest import Pool

pytestmark = pytest.mark.usefixtures("unrendered_log")


async def enqueue(pool: Pool, payload: bytes | str) -> int:
    """Put a payload into the queue as a validator would; the id of its row."""
    raw = payload.encode() if isinstance(payload, str) else payload
    (row,) = await Queries.from_asyncpg_pool(pool).enqueue(QUEUE_ADD_JOB, raw)
    return int(row)


async def row_status(pool: Pool, row: int) -> str | None:
    """The status of a row; None once it is acknowledged."""
    status: str | None = await pool.fetchval("SELECT status::text FROM pgqueuer WHERE id = $1", row)
    return status


async def until(pool: Pool, row: int, status: str | None, *, attempts: int = 0) -> None:
    async def there() -> bool:
        tried = await pool.fetchval("SELECT attempts FROM pgqueuer WHERE id = $1", row)
        return await row_status(pool, row) == status and (tried or 0) >= attempts

    await eventually(there)


async def logged(pool: Pool, row: int) -> list[dict[str, Any]]:
    """What pgqueuer noted of the errors of a row."""
    texts = await pool.fetch(
        "SELECT traceback::text FROM pgqueuer_log WHERE job_id = $1 AND traceback IS NOT NULL ORDER BY id",
        row,
    )
    return [json.loads(text["traceback"]) for text in texts]


async def test_a_row_is_acknowledged_once_a_supervisor_holds_its_job(pool: Pool) -> None:
    store = a_store(pool)
    supervisors = FakeSupervisors(store)

    async with consuming(pool, store, supervisors):
        row = await enqueue(pool, a_job(4).to_json())
        await until(pool, row, None)

    job = await store.get(4)
    assert job is not None
    assert (job.status, job.epoch, supervisors.ensured) == (JobStatus.STARTING, 1, [4])


async def test_a_redelivered_row_under_a_live_lease_is_only_acknowledged(pool: Pool) -> None:
    store = a_store(pool)
    claim = await claimed(store, 4)

    async with consuming(pool, store, FakeSupervisors(store)):
        row = await enqueue(pool, a_job(4, timestamp=claim.job.message.timestamp).to_json())
        await until(pool, row, None)

    job = await store.get(4)
    assert job is not None
    assert (job.epoch, job.lease_holder, job.lease_is_live) == (1, claim.holder, True)


async def test_a_refusal_for_capacity_puts_the_row_back_until_there_is_room(pool: Pool) -> None:
    store = a_store(pool, max_concurrent_jobs=1)
    other = await claimed(store, 1)

    # The consumer believes in more room than the claim finds, as when two consumers overlap.
    async with consuming(pool, store, FakeSupervisors(store), max_concurrent_jobs=2):
        row = await enqueue(pool, a_job(4).to_json())
        await until(pool, row, "queued", attempts=1)
        refused = await store.get(4)
        await store.finish(other, JobStatus.CANCELLED, a_result("CANCELLED"))
        await until(pool, row, None)

    taken = await store.get(4)
    assert refused is not None
    assert taken is not None
    assert (refused.status, taken.status) == (JobStatus.QUEUED, JobStatus.STARTING)


NAMELESS = [
    '{"tags": {"\\u0000": 1}}',
    '{"job_id": "\\u0000", "tags": {"\\u0000": "a"}}',
    b"\x00\xff not json",
    b"",
    '{"job_id": -1}',
    json.dumps({"tags": {"k" * 100_000: 1}}),
]


async def test_rows_that_name_no_job_are_held_and_stop_no_later_acknowledgement(pool: Pool) -> None:
    store = a_store(pool)

    async with consuming(pool, store, FakeSupervisors(store)):
        held = [await enqueue(pool, payload) for payload in NAMELESS]
        good = await enqueue(pool, a_job(4).to_json())
        await until(pool, good, None)
        for row in held:
            await until(pool, row, "failed")

    for row in held:
        (error,) = await logged(pool, row)
        assert error["exception_type"] == "RowHeld"
        assert any(word in error["exception_message"] for word in ("job_id", "JSON", "empty"))
        assert len(error["exception_message"]) <= queue_consumer.MAX_REASON_CHARS
        assert error["exception_message"].isprintable()


async def test_an_invalid_job_with_an_id_fails_with_its_reason_and_its_row_is_acknowledged(
    pool: Pool,
) -> None:
    store = a_store(pool)

    async with consuming(pool, store, FakeSupervisors(store)):
        row = await enqueue(pool, '{"job_id": 4, "env_provider": "x", "tags": {"\\u0000": 1}}')
        await until(pool, row, None)

    job = await store.get(4)
    assert job is not None
    assert job.status is JobStatus.FAILED
    assert "benchmark_name" in (job.error or "")
    assert "\\x00" in (job.error or "")


async def test_a_row_with_another_job_under_the_same_id_is_held(pool: Pool) -> None:
    store = a_store(pool)
    await store.insert(a_job(4), enqueue=False)

    async with consuming(pool, store, FakeSupervisors(store)):
        row = await enqueue(pool, a_job(4, benchmark_name="Acrobot-v1").to_json())
        await until(pool, row, "failed")

    (error,) = await logged(pool, row)
    assert "exists with other content" in error["exception_message"]


async def test_an_error_of_ours_never_holds_a_row(pool: Pool) -> None:
    store = a_store(pool, max_concurrent_jobs=9)
    errors = [RuntimeError("boom \0 \udc80"), KeyError("x"), TimeoutError(), OSError("away")]
    supervisors = FakeSupervisors(store, troubles=dict(enumerate(errors)))

    async with consuming(pool, store, supervisors, max_concurrent_jobs=9):
        rows = [await enqueue(pool, a_job(job_id).to_json()) for job_id in supervisors.troubles]
        for row in rows:
            await until(pool, row, "queued", attempts=1)
        supervisors.troubles.clear()
        for row in rows:
            await until(pool, row, None)

    notes = [(await logged(pool, row))[0] for row in rows]
    assert {note["exception_type"] for note in notes} == {"RetryRequested"}
    assert notes[0]["exception_message"] == "boom \\x00 \\udc80"
    assert supervisors.claims.keys() == {0, 1, 2, 3}


@dataclass
class Acknowledgements:
    """What pgqueuer would write."""

    written: list[Any] = field(default_factory=list)

    async def log_jobs(self, job_status: list[Any]) -> None:
        self.written += job_status


@pytest.mark.parametrize(
    ("error", "written"),
    [(RowHeld("no job"), 1), (RuntimeError("the retry was not stored"), 0), (RetryRequested(), 0)],
)
async def test_only_a_fault_of_the_row_itself_is_written_as_failed(
    pool: Pool, error: Exception, written: int
) -> None:
    async def take(job: Job) -> None:
        raise NotImplementedError

    manager = BoundedQueueManager(Queries.from_asyncpg_pool(pool))
    manager.entrypoint(QUEUE_ADD_JOB, on_failure="hold")(take)
    (executor,) = manager.entrypoint_registry.values()
    await enqueue(pool, a_job(4).to_json())
    row = Job.model_validate(dict(await pool.fetchrow("SELECT * FROM pgqueuer")))
    acknowledgements = Acknowledgements()

    async with JobStatusLogBuffer(max_size=1, repository=acknowledgements) as buffer:
        await manager.log_failure(row, executor, error, buffer)

    assert [status for _, status, _ in acknowledgements.written] == ["failed"] * written


@dataclass(frozen=True)
class StoreWithTroubles(PostgresJobStore):
    """A store whose count of held jobs fails some times after the first one."""

    failures: list[Exception] = field(default_factory=list)
    counted: list[int] = field(default_factory=list)

    async def held_count(self) -> int:
        if self.counted and self.failures:
            raise self.failures.pop()
        self.counted.append(await super().held_count())
        return self.counted[-1]


async def test_the_watch_over_capacity_survives_any_error(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_consumer, "FAILED_AGAIN_SECONDS", 0.0)
    plain = a_store(pool, max_concurrent_jobs=1)
    store = StoreWithTroubles(
        pool, plain.rules, plain.failed_result, failures=[RuntimeError("unheard of"), KeyError("held")]
    )
    other = await claimed(plain, 1)

    async with consuming(pool, store, FakeSupervisors(store), max_concurrent_jobs=1):
        row = await enqueue(pool, a_job(4).to_json())
        await eventually(lambda: no_failures_left(store))
        await plain.finish(other, JobStatus.CANCELLED, a_result("CANCELLED"))
        await until(pool, row, None)


@dataclass(frozen=True)
class SlowStore(PostgresJobStore):
    """A store whose first count is on its way for a long time."""

    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def held_count(self) -> int:
        count = await super().held_count()
        if not self.arrived.is_set():
            self.arrived.set()
            await self.go_on.wait()
        return count


async def test_a_count_that_is_overtaken_by_a_later_one_gives_no_place_that_is_taken(pool: Pool) -> None:
    plain = a_store(pool, max_concurrent_jobs=1)
    store = SlowStore(pool, plain.rules, plain.failed_result)
    supervisors = FakeSupervisors(store)
    reconciler = a_reconciler(pool, store, supervisors=supervisors)
    consumer = QueueConsumer(
        pool, store, supervisors, reconciler, max_concurrent_jobs=1, reconcile_interval_seconds=60.0
    )
    early = asyncio.create_task(consumer._refresh_capacity())
    await store.arrived.wait()
    await claimed(plain, 1)
    await consumer._refresh_capacity()

    store.go_on.set()
    await early

    assert consumer._manager.free_slots == 0


async def no_failures_left(store: StoreWithTroubles) -> bool:
    return not store.failures


async def test_a_revival_that_hangs_does_not_delay_the_start_of_the_consumer(pool: Pool) -> None:
    store = a_store(pool)
    await claimed(store, 1, uuid4())
    await pool.execute("UPDATE jobs SET lease_expires_at = clock_timestamp() - $1::interval", timedelta(1))
    supervisors = FakeSupervisors(store, troubles={1: asyncio.Event()})

    async with consuming(pool, store, supervisors):
        row = await enqueue(pool, a_job(4).to_json())
        await until(pool, row, None)

    assert supervisors.revived == [1]


async def test_rows_are_taken_by_priority(pool: Pool) -> None:
    store = a_store(pool, max_concurrent_jobs=1)
    supervisors = FakeSupervisors(store)
    async with pool.acquire() as connection:
        for job_id, priority in ((1, 0), (2, 7), (3, 3)):
            await enqueue_job(connection, a_job(job_id, priority=priority))

    async with consuming(pool, store, supervisors, max_concurrent_jobs=1):
        for job_id in (2, 3, 1):
            await eventually(lambda job_id=job_id: holds(supervisors, job_id))
            await store.finish(supervisors.claims[job_id], JobStatus.CANCELLED, a_result("CANCELLED", job_id))

    assert supervisors.ensured == [2, 3, 1]


async def holds(supervisors: FakeSupervisors, job_id: int) -> bool:
    return job_id in supervisors.claims
