"""What a submission printed: with the result, while it runs, or why it is not to be had."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from orchestrator.adapters.process.handles import Handle
from orchestrator.adapters.process.scratch import ContainerDirectory
from orchestrator.client import AsyncClient, InfrastructureError, JobStatus, UsageError
from orchestrator.ports import Claim, ContainerRecord
from tests.job_fixtures import a_store
from tests.job_states import ended, queued, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from orchestrator.adapters.postgres.pool import Database
    from tests.conftest import Pool


@pytest.fixture
async def client(database: Database) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(database.dsn) as client:
        yield client


async def a_container(pool: Pool, claim: Claim, base: Path) -> ContainerDirectory:
    """The job's container, as far as the tables know; its directory is not made."""
    record = ContainerRecord(uuid4(), claim.job.job_id, 1, None)
    directory = ContainerDirectory.of(base, uuid4(), record.container_id)
    store = a_store(pool)
    await store.register_container(claim, record)
    await store.set_container_handle(claim, record.container_id, Handle.here(directory).encode())
    return directory


async def test_the_log_of_an_ended_job_comes_from_its_result(client: AsyncClient, pool: Pool) -> None:
    await ended(pool, 1, JobStatus.FAILED, done=0, logs="loading\nno weights\n")
    await ended(pool, 2)

    assert await client.log(1) == "loading\nno weights\n"
    assert await client.log(1, tail_bytes=8) == "weights\n"
    assert await client.log(2) == ""


async def test_the_log_of_a_running_job_comes_from_its_container(
    client: AsyncClient, pool: Pool, tmp_path: Path
) -> None:
    claim, _ = await running(pool, 1)
    directory = await a_container(pool, claim, tmp_path)
    directory.log_file.parent.mkdir(parents=True)
    directory.log_file.write_bytes(b"loading\nready \x1b[2J\n")

    assert await client.log(1) == "loading\nready \\x1b[2J\n"


async def test_a_log_on_another_machine_comes_with_the_result(
    client: AsyncClient, pool: Pool, tmp_path: Path
) -> None:
    claim, _ = await running(pool, 1)
    await a_container(pool, claim, tmp_path)

    with pytest.raises(InfrastructureError, match="job 1 cannot be read from this machine"):
        await client.log(1)


async def test_where_nothing_of_ours_runs_there_is_no_log(client: AsyncClient, pool: Pool) -> None:
    await queued(pool, 1)
    await running(pool, 2, artifact_url="ws://policy.example.org:8000")

    with pytest.raises(UsageError, match="job 1 is QUEUED"):
        await client.log(1)
    with pytest.raises(UsageError, match=r"policy\.example\.org:8000"):
        await client.log(2)
