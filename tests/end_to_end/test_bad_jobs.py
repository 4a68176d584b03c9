"""Jobs that cannot be run or are cancelled, each at another moment: all on one control plane."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.adapters.postgres.pool import Database
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.messages import EvalJobMessage, EvalResultMessage
from tests.conftest import installed_database
from tests.end_to_end.conftest import EXAMPLES, PATIENCE_SECONDS, Plane, running_plane
from tests.end_to_end.shown_results import shown
from tests.golden_texts import check_golden

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

SHORT = {"seed": 7, "episodes_per_task": 2, "max_episode_steps": 5}

# Stands still while it is loaded, or in the second episode.
STANDING_AGENT = """
import pathlib, time

def stand():
    pathlib.Path({gate!r}, "reached").touch()
    while not pathlib.Path({gate!r}, "open").exists():
        time.sleep(0.02)

{at_load}

class Agent:
    def reset(self, episode, seed):
        if episode == 1:
            stand()

    def act(self, observation):
        return 0
"""


@dataclass(frozen=True)
class Standing:
    """A submission that stands still until it is let go."""

    directory: Path

    @classmethod
    def make(cls, directory: Path, *, at_load: bool) -> Standing:
        (directory / "submission").mkdir(parents=True)
        text = STANDING_AGENT.format(gate=str(directory), at_load="stand()" if at_load else "")
        (directory / "submission" / "agent.py").write_text(text)
        return cls(directory)

    async def reached(self) -> None:
        await until(lambda: self._exists("reached"))

    async def _exists(self, name: str) -> bool:
        return (self.directory / name).exists()

    def open(self) -> None:
        (self.directory / "open").touch()


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not await condition():
            await asyncio.sleep(0.05)


@dataclass(frozen=True)
class Scene:
    """One control plane with two places, and what happens on it."""

    plane: Plane
    directory: Path

    def standing(self, name: str, *, at_load: bool) -> Standing:
        return Standing.make(self.directory / name, at_load=at_load)

    def job(self, submission: Path = EXAMPLES / "cartpole", **fields: Any) -> EvalJobMessage:
        return self.plane.job(submission, **{"config": SHORT} | fields)

    async def play(self) -> dict[str, EvalResultMessage]:
        return (
            await self.cancel_at_three_moments()
            | await self.run_bad_ones()
            | await self.cancel_while_storing()
        )

    async def cancel_at_three_moments(self) -> dict[str, EvalResultMessage]:
        """Two jobs fill the plane and stand still, one in an episode and one at its start; a third waits."""
        running = self.standing("running", at_load=False)
        starting = self.standing("starting", at_load=True)
        jobs = {
            "cancelled_while_running": self.job(running.directory / "submission"),
            "cancelled_while_starting": self.job(starting.directory / "submission"),
            "cancelled_while_queued": self.job(),
        }
        await self.plane.submit(*jobs.values())
        await running.reached()
        await starting.reached()
        await until(lambda: self.has_outcomes(jobs["cancelled_while_running"], 1))
        assert [await self.status(job) for job in jobs.values()] == ["RUNNING", "STARTING", "QUEUED"]

        for case in reversed(jobs):  # the one that waits first: it needs nobody's place to be ended
            await self.plane.store.request_cancel(jobs[case].job_id, "the season is over")
            await self.plane.result(jobs[case])
        return {case: await self.plane.result(job) for case, job in jobs.items()}

    async def run_bad_ones(self) -> dict[str, EvalResultMessage]:
        never = self.standing("never", at_load=True)
        jobs = {
            "unknown_provider": self.job(env_provider="gymnasum"),
            "unknown_benchmark": self.job(env_provider="metaworld", benchmark_name="MT11"),
            "unknown_key_of_config": self.job(config=SHORT | {"epsiodes": 3}),
            "no_rule_of_success": self.job(benchmark_name="Pendulum-v1"),
            "more_than_the_cluster_has": self.job(resources={"workers": 100}),
            "timeout_of_one_second": self.job(never.directory / "submission", timeout_seconds=1),
            "good": self.job(),
        }
        await self.plane.submit(*jobs.values())
        return {case: await self.plane.result(job) for case, job in jobs.items()}

    async def cancel_while_storing(self) -> dict[str, EvalResultMessage]:
        """A lock keeps the result from being stored; the cancel comes meanwhile, and is too late."""
        storing = self.standing("storing", at_load=False)
        job = self.job(storing.directory / "submission")
        await self.plane.submit(job)
        await storing.reached()
        async with self.plane.pool.acquire() as connection, connection.transaction():
            await connection.execute("LOCK TABLE results IN SHARE MODE")
            storing.open()
            await until(lambda: self.is_waiting("INSERT INTO results"))
            cancel = asyncio.create_task(self.plane.store.request_cancel(job.job_id, "too late"))
            await until(lambda: self.is_waiting("SELECT pg_advisory_xact_lock"))
        result = await self.plane.result(job)
        await cancel
        return {"cancelled_while_storing": result}

    async def is_waiting(self, statement: str) -> bool:
        """Whether a backend waits for a lock in this statement."""
        waiting = await self.plane.pool.fetchval(
            """SELECT count(*) FROM pg_stat_activity
               WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE $1""",
            f"{statement}%",
        )
        return bool(waiting)

    async def has_outcomes(self, job: EvalJobMessage, count: int) -> bool:
        return len(await self.plane.outcomes(job)) == count

    async def status(self, job: EvalJobMessage) -> str:
        return str(await self.plane.pool.fetchval("SELECT status FROM jobs WHERE job_id = $1", job.job_id))


@pytest.fixture(scope="module")
def results(
    ray_cluster: None,
    postgres_server: Database,
    migrated_template: Database,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, EvalResultMessage]]:
    """What came of each job, by its case."""
    directory = tmp_path_factory.mktemp("jobs")
    with (
        installed_database(postgres_server) as database,
        asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner,
    ):

        async def run() -> dict[str, EvalResultMessage]:
            async with running_plane(database, directory, max_concurrent_jobs=2) as plane:
                played = await Scene(plane, directory).play()
                assert await plane.pool.fetchval("SELECT count(*) FROM containers") == 0
                return played

        yield runner.run(run())


@pytest.mark.parametrize(
    ("case", "status"),
    [
        ("unknown_provider", JobStatus.FAILED),
        ("unknown_benchmark", JobStatus.FAILED),
        ("unknown_key_of_config", JobStatus.FAILED),
        ("no_rule_of_success", JobStatus.FAILED),
        ("more_than_the_cluster_has", JobStatus.FAILED),
        ("timeout_of_one_second", JobStatus.TIMEOUT),
        ("cancelled_while_queued", JobStatus.CANCELLED),
        ("cancelled_while_starting", JobStatus.CANCELLED),
        ("cancelled_while_running", JobStatus.CANCELLED),
        ("cancelled_while_storing", JobStatus.COMPLETED),
        ("good", JobStatus.COMPLETED),
    ],
)
def test_each_job_ends_as_it_should_and_says_why(
    results: dict[str, EvalResultMessage], case: str, status: JobStatus
) -> None:
    result = results[case]

    assert result.status is status
    text = shown(result)
    if case == "timeout_of_one_second":  # how far it came is a matter of speed
        text = text.replace("  2 of 2 episodes missing", "")
    check_golden("bad_jobs", f"run_{case}", text)
