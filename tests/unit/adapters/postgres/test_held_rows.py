from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from pgqueuer.adapters.persistence.queries import Queries
from structlog.testing import capture_logs

from orchestrator.adapters.postgres.held_rows import NO_REASON, held_rows, requeue_held_row
from orchestrator.domain.messages import QUEUE_ADD_JOB
from tests.job_fixtures import a_job, a_store
from tests.unit.actors.control_fakes import FakeSupervisors, consuming, eventually

if TYPE_CHECKING:
    from tests.conftest import Pool


@pytest.fixture(autouse=True)
def unrendered_log() -> Iterator[None]:
    """Refusals are what these tests are about, and drawing tracebacks takes a second each."""
    with capture_logs():
        yield


async def enqueue(pool: Pool, *payloads: bytes) -> list[int]:
    queries = Queries.from_asyncpg_pool(pool)
    return [int(row) for payload in payloads for row in await queries.enqueue(QUEUE_ADD_JOB, payload)]


async def until_held(pool: Pool, count: int) -> None:
    async def all_held() -> bool:
        return len(await held_rows(pool, 100)) == count

    await eventually(all_held)


async def test_held_rows_come_newest_first_each_with_its_reason_and_a_printable_payload(pool: Pool) -> None:
    store = a_store(pool)
    await store.insert(a_job(4), enqueue=False)
    other = a_job(4, benchmark_name="Acrobot-v1").to_json()

    async with consuming(pool, store, FakeSupervisors(store)):
        ids = await enqueue(pool, b"\x00\xff\x1b[2J not json", other, b'{"tags": "' + b"x" * 9000 + b'"}')
        await until_held(pool, 3)

    long, duplicate, garbage = await held_rows(pool, 10)
    assert [row.row_id for row in (garbage, duplicate, long)] == ids
    assert [row.job_id for row in (garbage, duplicate, long)] == [None, 4, None]
    assert garbage.payload == r"\x00\xff\x1b[2J not json"
    assert "JSON" in garbage.reason
    assert "exists with other content" in duplicate.reason
    assert len(long.payload) == 403
    assert [row.row_id for row in await held_rows(pool, 1)] == [ids[2]]
    assert all(row.queued_at.tzinfo is not None for row in (garbage, duplicate, long))


async def test_a_held_row_whose_log_is_gone_says_so(pool: Pool) -> None:
    store = a_store(pool)
    async with consuming(pool, store, FakeSupervisors(store)):
        await enqueue(pool, b"not json")
        await until_held(pool, 1)
    await pool.execute("TRUNCATE pgqueuer_log")

    (row,) = await held_rows(pool, 10)

    assert row.reason == NO_REASON


async def test_a_held_row_that_is_requeued_is_taken_again(pool: Pool) -> None:
    store = a_store(pool)
    await store.insert(a_job(4), enqueue=False)
    async with consuming(pool, store, FakeSupervisors(store)):
        (row_id,) = await enqueue(pool, a_job(4, benchmark_name="Acrobot-v1").to_json())
        await until_held(pool, 1)
        await pool.execute("DELETE FROM jobs")  # what stood in its way

        assert await requeue_held_row(pool, row_id)

        async def taken() -> bool:
            return await pool.fetchval("SELECT count(*) FROM pgqueuer WHERE id = $1", row_id) == 0

        await eventually(taken)
    job = await store.get(4)
    assert job is not None
    assert job.message.benchmark_name == "Acrobot-v1"


async def test_only_held_rows_of_add_job_are_requeued(pool: Pool) -> None:
    (queued,) = await enqueue(pool, b"{}")
    (result,) = await Queries.from_asyncpg_pool(pool).enqueue("eval_result", b"{}")
    await pool.execute("UPDATE pgqueuer SET status = 'failed' WHERE id = $1", result)

    answers = [await requeue_held_row(pool, row) for row in (queued, int(result), 10**6)]

    assert answers == [False, False, False]
    assert await held_rows(pool, 10) == []
