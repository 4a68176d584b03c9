"""A database that does not commit slows rollouts down; nothing piles up meanwhile, and nothing is lost."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from orchestrator.actors.rollout_worker import QUEUED_EPISODES
from orchestrator.adapters.postgres.pool import Database, open_connection
from orchestrator.domain.lifecycle import JobStatus
from tests.in_process_plane import InProcessPlane, in_process_plane

EPISODES = 100
NOTING_AGENT = """
class Agent:
    def reset(self, episode, seed):
        with open({notes!r}, "a") as notes:
            print(episode, file=notes)

    def act(self, observation):
        return int(observation[2] + 0.5 * observation[3] > 0)
"""


@pytest.fixture
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="orc-slow-") as directory:
        yield Path(directory)


@asynccontextmanager
async def outcomes_held_up(database: Database) -> AsyncIterator[None]:
    """Nobody writes an outcome for the block; leases and statuses go on."""
    async with open_connection(database.dsn) as connection, connection.transaction():
        await connection.execute("LOCK TABLE episodes IN EXCLUSIVE MODE")
        yield


async def finished(plane: InProcessPlane) -> int:
    return int(await plane.pool.fetchval("SELECT count(*) FROM episodes WHERE finished"))


async def leases_renewed(plane: InProcessPlane, times: int) -> None:
    """Return after so many renewals: a measure of time that a slow machine stretches."""
    for _ in range(times):
        before = await plane.pool.fetchval("SELECT lease_expires_at FROM jobs")
        while await plane.pool.fetchval("SELECT lease_expires_at FROM jobs") == before:
            await asyncio.sleep(0.05)


@pytest.mark.timeout(300)
async def test_rollouts_wait_while_nothing_is_committed_and_go_on_afterwards(
    database: Database, scratch: Path
) -> None:
    submission, notes = scratch / "noting", scratch / "notes"
    submission.mkdir()
    (submission / "agent.py").write_text(NOTING_AGENT.format(notes=str(notes)))

    def played() -> int:
        return len(notes.read_text().splitlines())

    async with in_process_plane(database, scratch, lease_seconds=3.0) as plane:
        jobs = plane.jobs(submission, 1, config={"episodes_per_task": EPISODES, "max_episode_steps": 60})
        await plane.submit(jobs)
        async with asyncio.timeout(200):
            while await finished(plane) < 5:
                await asyncio.sleep(0.02)
            async with outcomes_held_up(database):
                committed = await finished(plane)
                await leases_renewed(plane, 3)
                waiting = played()
                await leases_renewed(plane, 2)
                still_waiting = played()
            [result] = await plane.results(jobs, seconds=120)
            claims = await plane.pool.fetchval("SELECT epoch FROM jobs")

    assert waiting == still_waiting < EPISODES
    assert waiting <= committed + QUEUED_EPISODES + 2  # one that is played, one that waits to be queued
    assert (result.status, result.total_episodes, claims) == (JobStatus.COMPLETED, EPISODES, 1)
    assert sorted(map(int, notes.read_text().split())) == list(range(EPISODES))
