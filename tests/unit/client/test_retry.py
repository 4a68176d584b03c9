"""A job once more: a new id, the same content, the same seeds."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pgqueuer.adapters.persistence.queries import Queries

from orchestrator.client import AsyncClient, EvalJobMessage, JobStatus, UsageError
from orchestrator.domain.episodes import open_secret, plan_episodes
from tests.job_fixtures import a_store
from tests.job_states import ended, queued, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from orchestrator.adapters.postgres.pool import Database
    from tests.conftest import Pool


@pytest.fixture
async def client(database: Database) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(database.dsn) as client:
        yield client


def seeds(message: EvalJobMessage) -> list[tuple[int, int]]:
    """The seeds that a supervisor gives the job's episodes."""
    seed = message.job_config.seed
    secret = b"secret" if seed is None else open_secret(seed)
    plan = plan_episodes(["task"], 3, secret=secret, seed_group=message.effective_seed_group)
    return [(episode.seed, episode.policy_seed) for episode in plan]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"config": {"seed": 7}},
        {"competition_id": "spring"},
        {"seed_group": "pairs", "config": {"seed": 7}},
        {"seed_group": "", "competition_id": "spring", "config": {"seed": 7}},
    ],
)
async def test_it_keeps_content_and_seeds_under_a_new_id(
    client: AsyncClient, pool: Pool, fields: dict[str, Any]
) -> None:
    await ended(pool, 1, JobStatus.FAILED, done=0, priority=3, tags={"team": "blue"}, note="kept", **fields)
    first = (await client.get(1)).message

    fresh = await client.retry(1)

    again = (await client.get(fresh)).message
    assert seeds(again) == seeds(first)
    assert again.tags == {"team": "blue", "retry_of": "1"}
    same = {"exclude": {"job_id", "timestamp", "seed_group", "tags"}}
    assert again.model_dump(**same) == first.model_dump(**same)
    assert (await client.get(fresh)).status is JobStatus.QUEUED
    assert (await client.get(1)).status is JobStatus.FAILED


async def test_a_retry_of_a_retry_has_the_first_ones_seeds(client: AsyncClient, pool: Pool) -> None:
    await ended(pool, 1, JobStatus.TIMEOUT, done=0)
    second = await client.retry(1)
    await client.cancel(second)

    third = (await client.get(await client.retry(second))).message

    assert seeds(third) == seeds((await client.get(1)).message)
    assert third.tags["retry_of"] == str(second)


async def test_what_a_local_job_may_its_retry_may_too(
    client: AsyncClient, pool: Pool, tmp_path: Path
) -> None:
    archive = tmp_path / "with space.tar.gz"
    archive.touch()
    await queued(pool, 1, local=True, artifact_url=archive.as_uri())
    await client.cancel(1)

    assert (await client.get(await client.retry(1))).local

    archive.unlink()
    with pytest.raises(UsageError, match=r"archive .*with space.tar.gz is gone"):
        await client.retry(1)


async def test_a_job_that_has_not_ended_or_is_complete_is_refused(client: AsyncClient, pool: Pool) -> None:
    await running(pool, 1)
    await ended(pool, 2)

    with pytest.raises(UsageError, match="job 1 is RUNNING"):
        await client.retry(1, force=True)
    with pytest.raises(UsageError, match="job 2 is COMPLETED"):
        await client.retry(2)

    assert (await client.get(await client.retry(2, force=True))).status is JobStatus.QUEUED


async def test_a_job_that_can_never_run_is_refused(client: AsyncClient, pool: Pool) -> None:
    await a_store(pool).insert_invalid(1, b"{}", "no provider")
    expired = datetime.now(UTC) - timedelta(hours=1)
    await queued(pool, 2, artifact_url="https://example.org/a.tar.gz", artifact_expires_at=expired)
    await client.cancel(2)

    with pytest.raises(UsageError, match="job 1 never had a valid message"):
        await client.retry(1)
    with pytest.raises(UsageError, match="URL of its archive expired"):
        await client.retry(2)

    assert len(await client.jobs()) == 2


async def test_a_held_row_is_shown_with_its_reason_and_put_back(client: AsyncClient, pool: Pool) -> None:
    queries = Queries.from_asyncpg_pool(pool)
    (other, row) = await queries.enqueue(["eval_result", "add_job"], [b"{}", b"not json"], [0, 0])
    await pool.execute("UPDATE pgqueuer SET status = 'failed'")

    (held,) = await client.held_rows()
    await client.retry_held(int(row))

    assert (held.row_id, held.payload) == (int(row), "not json")
    assert await client.held_rows() == []
    statuses = await pool.fetch("SELECT status::text FROM pgqueuer ORDER BY id")
    assert [each["status"] for each in statuses] == ["failed", "queued"]
    for unknown in (int(row), int(other), 99):
        with pytest.raises(UsageError, match=f"no held queue row has the id {unknown}"):
            await client.retry_held(unknown)
