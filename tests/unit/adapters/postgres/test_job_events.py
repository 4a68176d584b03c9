"""The history of a job: complete for ordinary ones, bounded for those that flap."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from orchestrator.adapters.postgres import migrate as migrations
from orchestrator.adapters.postgres.job_events import FIRST_KEPT, LATEST_KEPT, read_events
from orchestrator.adapters.postgres.migrate import migrate
from orchestrator.adapters.postgres.pool import Database, open_connection
from orchestrator.domain.lifecycle import JobStatus
from tests.job_fixtures import a_job, a_result, a_store, claimed

if TYPE_CHECKING:
    from tests.conftest import Pool


async def history(pool: Pool, job_id: int = 1) -> list[tuple[int, str, str | None]]:
    async with pool.acquire() as connection:
        changes = await read_events(connection, job_id)
    assert [change.at for change in changes] == sorted(change.at for change in changes)
    return [(change.epoch, change.status.value, change.detail) for change in changes]


async def test_every_change_is_there_with_its_epoch_and_reason(pool: Pool) -> None:
    store = a_store(pool)
    first = await claimed(store)
    await store.set_status(first, JobStatus.STARTING, "waits for its workers")
    await store.set_status(first, JobStatus.STARTING, "waits for its workers")  # repeated: no change
    await store.release(first, "a node was lost")
    await pool.execute("UPDATE jobs SET lease_expires_at = clock_timestamp()")
    second = await claimed(store)
    await store.set_status(second, JobStatus.RUNNING, "3 episodes to run")
    await store.finish(second, JobStatus.FAILED, a_result("FAILED"))

    assert await history(pool) == [
        (0, "QUEUED", "waits in the queue"),
        (1, "STARTING", "claimed, epoch 1"),
        (1, "STARTING", "waits for its workers"),
        (1, "STARTING", "will be taken up again: a node was lost"),
        (2, "STARTING", "claimed, epoch 2"),
        (2, "RUNNING", "3 episodes to run"),
        (2, "FAILED", None),
    ]


async def test_of_very_many_changes_the_first_and_the_latest_stay(pool: Pool) -> None:
    store = a_store(pool)
    claim = await claimed(store)
    for number in range(200):
        await store.set_status(claim, JobStatus.STARTING, f"change {number}")

    async with pool.acquire() as connection:
        changes = await read_events(connection, 1)

    # The insertion and the claim came before.
    assert [change.number for change in changes] == [*range(1, 21), *range(123, 203)]
    assert len(changes) == FIRST_KEPT + LATEST_KEPT
    assert changes[-1].detail == "change 199"


async def test_a_change_that_is_rolled_back_leaves_no_event(pool: Pool) -> None:
    store = a_store(pool)
    await store.insert(a_job(1), enqueue=False)
    await pool.execute("INSERT INTO results (job_id, message) VALUES (1, '{}')")

    with pytest.raises(asyncpg.UniqueViolationError, match="results"):
        await store.finish_unheld(1, JobStatus.CANCELLED, "enough", store.failed_result)

    assert await history(pool) == [(0, "QUEUED", "waits in the queue")]


async def test_jobs_from_before_the_history_keep_what_is_known_of_them(
    empty_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_of_them = migrations.MIGRATIONS
    async with open_connection(empty_database.dsn) as connection:
        monkeypatch.setattr(migrations, "MIGRATIONS", all_of_them[:1])
        await migrate(connection)
        await connection.execute(
            """INSERT INTO jobs (job_id, message, status, detail, epoch, finished_at) VALUES
                   (1, '{}', 'QUEUED', 'waits in the queue', 0, NULL),
                   (2, '{}', 'FAILED', 'no agent.py', 3, clock_timestamp())"""
        )
        monkeypatch.setattr(migrations, "MIGRATIONS", all_of_them)
        await migrate(connection)

        kept: list[Any] = [await read_events(connection, job_id) for job_id in (1, 2)]

    assert [[(change.epoch, change.detail) for change in changes] for changes in kept] == [
        [(0, "waits in the queue")],
        [(0, "waits in the queue"), (3, "no agent.py")],
    ]
