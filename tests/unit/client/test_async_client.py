"""The client against a real database, with jobs that the real store and ledger put there."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest

from orchestrator.adapters.postgres.ledger import PostgresLedger
from orchestrator.client import (
    AsyncClient,
    EpisodeOutcome,
    InvalidJob,
    JobIdTaken,
    JobNotFinished,
    JobStatus,
    OrchestratorError,
    StatusChange,
    UnknownJob,
    UsageError,
)
from orchestrator.settings import Settings
from tests.job_fixtures import a_job, a_result, a_store
from tests.job_states import TASKS, ended, played, queued, running, starting

if TYPE_CHECKING:
    from orchestrator.adapters.postgres.pool import Database
    from tests.conftest import Pool

JOB = {"env_provider": "gymnasium", "benchmark_name": "CartPole-v1"}
PATIENCE_SECONDS = 60


@pytest.fixture
async def client(database: Database) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(database.dsn) as client:
        yield client


# --------------------------------------------------------------------------------------- submitting


async def test_a_job_of_fields_is_queued_under_a_fresh_id(client: AsyncClient, pool: Pool) -> None:
    job_id = await client.submit(JOB, priority=3, tags={"team": "blue"})

    job = await client.get(job_id)
    assert (job.status, job.priority, job.tags, job.local) == (JobStatus.QUEUED, 3, {"team": "blue"}, False)
    payload = await pool.fetchval("SELECT payload FROM pgqueuer WHERE entrypoint = 'add_job'")
    assert json.loads(payload)["job_id"] == job_id


async def test_the_same_job_twice_is_one_job_and_another_under_its_id_is_refused(client: AsyncClient) -> None:
    message = a_job(5)

    assert await client.submit(message) == await client.submit(message) == 5
    assert await client.submit(job_id=5, submission_id="s", **JOB) == 5
    with pytest.raises(JobIdTaken, match="job 5 exists with other content"):
        await client.submit(message, priority=1)

    assert len(await client.jobs()) == 1


async def test_fields_that_are_no_job_are_refused_with_what_is_wrong(client: AsyncClient) -> None:
    with pytest.raises(InvalidJob, match="env_provider"):
        await client.submit(benchmark_name="CartPole-v1")
    with pytest.raises(InvalidJob, match="JSON"):
        await client.submit(JOB, config={"seed": object()})

    assert await client.jobs() == []


async def test_a_fresh_id_that_is_taken_gives_way_to_another(
    client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = iter([1, 1, 2])
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    monkeypatch.setattr(random, "randrange", lambda _: next(draws))

    first = await client.submit(JOB)
    second = await client.submit(JOB, priority=1)

    assert (first, second) == (1, 2)


# ------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("call", ["get", "result", "wait", "cancel", "log", "retry"])
async def test_a_job_that_is_unknown_is_said_to_be_so(client: AsyncClient, call: str) -> None:
    with pytest.raises(UnknownJob, match=r"there is no job 9 on 127\.0\.0\.1"):
        await getattr(client, call)(9)


async def test_a_job_tells_its_history_its_claims_and_what_it_waits_for(
    client: AsyncClient, pool: Pool
) -> None:
    claim, _ = await running(pool, 1, done=4)

    job = await client.get(1)

    assert [(change.status, change.detail, change.epoch) for change in job.history] == [
        (JobStatus.QUEUED, "waits in the queue", 0),
        (JobStatus.STARTING, "claimed, epoch 1", 1),
        (JobStatus.STARTING, "starts the submission", 1),
        (JobStatus.RUNNING, "10 episodes to run", 1),
    ]
    assert [(one.epoch, one.holder, one.ended_because) for one in job.claims] == [(1, claim.holder, None)]
    assert (job.episodes.planned, job.episodes.finished, job.episodes.succeeded) == (10, 4, 3)
    assert [(task.task_id, task.episodes.finished) for task in job.tasks] == [(TASKS[0], 4), (TASKS[1], 0)]
    assert job.lease is not None
    assert job.lease.is_live
    assert job.waits_for is not None
    assert "no" in job.waits_for
    assert "orchestrator up" in job.waits_for


async def test_jobs_are_listed_newest_first_by_status_benchmark_and_tag(
    client: AsyncClient, pool: Pool
) -> None:
    await ended(pool, 1, env_provider="metaworld", benchmark_name="MT10")
    await queued(pool, 2, tags={"team": "blue", "try": "1"})
    await queued(pool, 3, tags={"team": "red"})
    await starting(pool, 4, tags={"team": "blue"})

    async def listed(**wanted: Any) -> list[int]:
        return [job.job_id for job in await client.jobs(**wanted)]

    assert await listed() == [4, 3, 2, 1]
    assert await listed(limit=2) == [4, 3]
    assert await listed(statuses=[JobStatus.QUEUED]) == [3, 2]
    assert await listed(benchmark="metaworld/MT10") == [1]
    assert await listed(benchmark="CartPole-v1", tags={"team": "blue"}) == [4, 2]
    assert await listed(tags={"team": "blue", "try": "1"}, limit=1) == [2]


async def test_more_jobs_than_a_page_are_looked_through(
    client: AsyncClient, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.adapters.postgres.job_reports.PAGE_JOBS", 2)
    for job_id in range(1, 6):
        await queued(pool, job_id, tags={"odd": str(job_id % 2)})

    assert [job.job_id for job in await client.jobs(tags={"odd": "1"})] == [5, 3, 1]


async def test_a_message_with_a_nul_character_disturbs_no_list(client: AsyncClient, pool: Pool) -> None:
    await queued(pool, 1, note="\0")
    await queued(pool, 2, tags={"team": "\0"})

    assert [job.job_id for job in await client.jobs(tags={"team": "\0"})] == [2]


# ---------------------------------------------------------------------------------------- following


async def test_a_wait_ends_with_the_result(client: AsyncClient, pool: Pool) -> None:
    claim, _ = await starting_with_plan(pool)
    waiting = asyncio.create_task(client.results([1], timeout_seconds=PATIENCE_SECONDS))

    await a_store(pool).finish(claim, JobStatus.FAILED, a_result("FAILED"))

    (result,) = await waiting
    assert (result.job_id, result.status) == (1, JobStatus.FAILED)
    assert await client.result(1) == result


async def test_a_wait_that_is_too_long_says_how_the_job_stands(client: AsyncClient, pool: Pool) -> None:
    await starting(pool, 1)

    with pytest.raises(JobNotFinished, match=r"job 1 is still STARTING after 0\.1 s"):
        await client.wait(1, timeout_seconds=0.1)
    with pytest.raises(JobNotFinished):
        async for _ in client.stream(1, timeout_seconds=0.1):
            pass
    assert await client.result(1) is None


async def starting_with_plan(pool: Pool) -> tuple[Any, Any]:
    return await running(pool, 1, tasks=("task",), episodes=4)


async def test_a_stream_yields_each_change_and_outcome_once_and_the_end_last(
    client: AsyncClient, pool: Pool
) -> None:
    claim, runs = await starting_with_plan(pool)
    ledger, store = PostgresLedger(pool), a_store(pool)
    seen: list[str] = []

    async for event in client.stream(1, timeout_seconds=PATIENCE_SECONDS):
        seen.append(event.status.value if isinstance(event, StatusChange) else f"episode {event.episode_id}")
        # Each step follows what was seen of the last one, the episodes out of order.
        if seen[-1] == "RUNNING":
            await ledger.commit([played(runs[2])])
        elif seen[-1] == "episode 2":
            await ledger.commit([played(run) for run in (runs[0], runs[3])])
        elif seen[-1] == "episode 3":
            await ledger.commit([played(runs[1])])
        elif seen[-1] == "episode 1":
            await store.finish(claim, JobStatus.COMPLETED, a_result())

    assert seen[:5] == ["QUEUED", "STARTING", "STARTING", "RUNNING", "episode 2"]
    assert (sorted(seen[5:7]), seen[7:]) == (["episode 0", "episode 3"], ["episode 1", "COMPLETED"])
    again = [event async for event in client.stream(1)]
    assert [type(event) for event in again] == [StatusChange] * 4 + [EpisodeOutcome] * 4 + [StatusChange]


async def test_a_stream_of_more_outcomes_than_a_page_leaves_none_out(
    client: AsyncClient, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.adapters.postgres.job_reports.PAGE_OUTCOMES", 3)
    await ended(pool, 1)

    events = [event async for event in client.stream(1)]

    episodes = [(one.task_id, one.episode_id) for one in events if isinstance(one, EpisodeOutcome)]
    assert episodes == [(task, number) for task in TASKS for number in range(5)]


# --------------------------------------------------------------------------------------- cancelling


async def test_a_queued_job_is_cancelled_without_a_control_plane(client: AsyncClient, pool: Pool) -> None:
    await queued(pool, 1)

    job = await client.cancel(1, "not needed\0")

    assert (job.status, job.detail) == (JobStatus.CANCELLED, "not needed\\0")
    result = await client.result(1)
    assert result is not None
    assert result.error == "not needed\\0"


async def test_a_held_job_ends_once_its_supervisors_lease_has_lapsed(client: AsyncClient, pool: Pool) -> None:
    await running(pool, 1, done=2)
    before = await client.cancel(1, "enough", wait=False)
    cancelling = asyncio.create_task(client.cancel(1, "another reason", timeout_seconds=PATIENCE_SECONDS))

    await pool.execute("UPDATE jobs SET lease_expires_at = clock_timestamp() - interval '1 s'")

    job = await cancelling
    assert (before.status, before.cancel_reason) == (JobStatus.RUNNING, "enough")
    assert (job.status, job.detail) == (JobStatus.CANCELLED, "enough")
    assert job.episodes.finished == 2


async def test_a_cancellation_that_takes_too_long_says_so(client: AsyncClient, pool: Pool) -> None:
    await running(pool, 1)

    with pytest.raises(JobNotFinished, match="job 1 is still RUNNING"):
        await client.cancel(1, timeout_seconds=0.1)


async def test_a_job_that_has_ended_stays_as_it_is(client: AsyncClient, pool: Pool) -> None:
    await ended(pool, 1)

    assert (await client.cancel(1)).status is JobStatus.COMPLETED


# -------------------------------------------------------------------------------------- the client


async def test_the_leases_of_a_client_are_renewed_though_its_connections_are_lost(
    database: Database, pool: Pool
) -> None:
    settings = Settings(database_url=database.dsn, client_lease_seconds=0.3)
    async with AsyncClient(settings=settings, application_name="followed") as client:
        await client.enqueue(a_job(1), followed=True)
        async with client.keeping_alive([1]):
            for _ in range(2):
                await lease_is_renewed(pool)
                await pool.execute(
                    """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                       WHERE application_name = 'followed' AND datname = current_database()"""
                )
            await lease_is_renewed(pool)


async def lease_is_renewed(pool: Pool) -> None:
    query = "SELECT client_lease_expires_at FROM jobs"
    before = await pool.fetchval(query)
    async with asyncio.timeout(PATIENCE_SECONDS):
        while await pool.fetchval(query) == before:
            await asyncio.sleep(0.02)


async def test_jobs_without_a_client_get_no_lease(client: AsyncClient, pool: Pool) -> None:
    await client.submit(JOB)
    await client.enqueue(a_job(1))

    async with client.keeping_alive([1]):
        pass

    assert await pool.fetchval("SELECT count(*) FROM jobs WHERE client_lease_expires_at IS NOT NULL") == 0


async def test_a_client_outside_of_its_block_says_how_to_use_it(database: Database) -> None:
    client = AsyncClient(database.dsn)

    with pytest.raises(UsageError, match="async with"):
        await client.jobs()
    with pytest.raises(UsageError, match="or settings"):
        AsyncClient(database.dsn, settings=Settings())


async def test_what_postgres_refuses_is_an_error_of_ours(client: AsyncClient, pool: Pool) -> None:
    await pool.execute("DROP TABLE job_events")

    with pytest.raises(OrchestratorError, match="refused"):
        await client.submit(JOB)
