"""A submission that is killed while it starts: once may be anybody's doing, twice is its own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.adapters.postgres.pool import Database
from orchestrator.domain.lifecycle import JobStatus
from tests.in_process_plane import in_process_plane

# Killed at each start until the file has as many lines as there are deaths.
KILLED_AGENT = """
import os, pathlib, signal

deaths = pathlib.Path({deaths!r})
with deaths.open("a") as file:
    print("started", file=file)
if len(deaths.read_text().splitlines()) <= {times}:
    os.kill(os.getpid(), signal.SIGKILL)


class Agent:
    def act(self, observation):
        return 1
"""


@pytest.fixture
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="orc-killed-") as directory:
        yield Path(directory)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("times", "status", "starts"), [(1, JobStatus.COMPLETED, 2), (2, JobStatus.FAILED, 2)]
)
async def test_a_submission_that_is_killed_while_it_starts_gets_a_second_container_and_no_third(
    database: Database, scratch: Path, times: int, status: JobStatus, starts: int
) -> None:
    submission, deaths = scratch / "killed", scratch / "deaths"
    submission.mkdir()
    (submission / "agent.py").write_text(KILLED_AGENT.format(deaths=str(deaths), times=times))
    async with in_process_plane(database, scratch) as plane:
        jobs = plane.jobs(submission, 1, config={"episodes_per_task": 1, "max_episode_steps": 5})
        await plane.submit(jobs)
        [result] = await plane.results(jobs, seconds=120)

    assert (result.status, len(deaths.read_text().splitlines())) == (status, starts)
    if status is JobStatus.FAILED:
        assert "SIGKILL" in (result.error or "")
