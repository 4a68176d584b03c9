"""A Ray cluster for the session, a control plane for a test, and submissions that tests can hold still."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

from orchestrator.actors.control_plane import start_control_plane, stop_control_plane, supervisor_name
from orchestrator.adapters.artifacts.pack import pack_directory
from orchestrator.adapters.postgres.installation import take_generation
from orchestrator.adapters.postgres.job_store import PostgresJobStore
from orchestrator.adapters.postgres.outgoing import messages_of
from orchestrator.adapters.postgres.patience import patient
from orchestrator.adapters.postgres.pool import Database, open_pool
from orchestrator.app import ControlPlaneRecipe
from orchestrator.domain.messages import EvalJobMessage, EvalResultMessage
from orchestrator.runtime import joined_or_local_ray
from orchestrator.settings import Settings
from orchestrator.stores import job_store, ledger

if TYPE_CHECKING:
    import asyncpg

    Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
PATIENCE_SECONDS = 180.0


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local cluster for all tests; each installation has a namespace of its own."""
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        cluster = joined_or_local_ray(cpus=8)
        runner.run(cluster.__aenter__())
        try:
            yield
        finally:
            runner.run(cluster.__aexit__(None, None, None))


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A directory with a short path, for containers and archives."""
    directory = Path(tempfile.mkdtemp(prefix="orc-e2e-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@dataclass
class Plane:
    """A running control plane, and what a validator and an operator would do with it."""

    pool: Pool
    recipe: ControlPlaneRecipe
    scratch: Path
    jobs: int = field(default=0)

    @property
    def store(self) -> PostgresJobStore:
        return patient(job_store(self.pool, self.recipe.settings), 60.0)

    def job(
        self, submission: Path, benchmark: str = "gymnasium/CartPole-v1", **fields: Any
    ) -> EvalJobMessage:
        """A job for a submission directory, packed as the command line packs it."""
        packed = pack_directory(submission, self.scratch / "artifacts")
        provider, _, name = benchmark.partition("/")
        self.jobs += 1
        return EvalJobMessage.model_validate(
            {
                "job_id": self.jobs,
                "submission_id": submission.name,
                "env_provider": provider,
                "benchmark_name": name,
                "artifact_url": f"file://{packed.path}",
                "artifact_sha256": packed.sha256,
                "artifact_size_bytes": packed.size_bytes,
            }
            | fields
        )

    async def submit(self, *jobs: EvalJobMessage) -> None:
        for job in jobs:
            await self.store.insert(job, enqueue=True, local=True)

    async def result(self, job: EvalJobMessage, seconds: float = PATIENCE_SECONDS) -> EvalResultMessage:
        """The job's result, once it is there."""
        async with asyncio.timeout(seconds):
            while (result := await self.store.result(job.job_id)) is None:
                await asyncio.sleep(0.1)
        return result

    async def evaluate(self, job: EvalJobMessage) -> EvalResultMessage:
        await self.submit(job)
        return await self.result(job)

    async def episodes(self, job: EvalJobMessage) -> list[Any]:
        """The ledger's rows of the job in plan order."""
        return await self.pool.fetch("SELECT * FROM episodes WHERE job_id = $1 ORDER BY ordinal", job.job_id)

    async def outcomes(self, job: EvalJobMessage) -> list[tuple[Any, ...]]:
        """What must not depend on how a job ran: (task, episode, return, steps, success)."""
        return [
            (outcome.task_id, outcome.episode_id, outcome.episode_return, outcome.steps, outcome.success)
            for outcome in await ledger(self.pool, self.recipe.settings).outcomes(job.job_id)
        ]

    async def queued_messages(self, queue: str) -> list[dict[str, Any]]:
        """All messages that wait in an outgoing queue."""
        from pgqueuer.domain.models import Job

        rows = await self.pool.fetch("SELECT * FROM pgqueuer WHERE entrypoint = $1 ORDER BY id", queue)
        return [message for row in rows for message in messages_of(Job.model_validate(dict(row)))]

    async def supervisor_pid(self, job: EvalJobMessage) -> int:
        import ray

        handle = ray.get_actor(supervisor_name(job.job_id), self.recipe.namespace)
        return int(await handle.process_id.remote())


@asynccontextmanager
async def running_plane(
    database: Database,
    scratch: Path,
    make_recipe: Callable[..., ControlPlaneRecipe] = ControlPlaneRecipe,
    **overrides: Any,
) -> AsyncIterator[Plane]:
    """A control plane on the session's cluster for the block; `overrides` are settings."""
    values: dict[str, Any] = {
        "data_dir": scratch,
        "lease_seconds": 9.0,
        "reconcile_interval_seconds": 1.0,
        "max_concurrent_jobs": 2,
        "cpus_per_worker": 0.5,
        "drain_seconds": 1.0,
    } | overrides
    settings = Settings(**values)
    async with open_pool(database, application_name="end-to-end test", max_size=6) as pool:
        installation = await take_generation(pool, "test")
        recipe = make_recipe(settings, database, installation)
        try:
            await start_control_plane(recipe)
            yield Plane(pool, recipe, scratch)
        finally:
            await stop_control_plane(recipe)


@pytest.fixture
async def plane(ray_cluster: None, database: Database, scratch: Path) -> AsyncIterator[Plane]:
    async with running_plane(database, scratch) as plane:
        yield plane


@dataclass(frozen=True)
class GatedSubmission:
    """A CartPole policy that stands still at one step of one episode until it is let go.

    It notes every reset, so that a test sees which episodes were really played, and how often.
    """

    directory: Path
    gate: Path
    notes: Path

    async def reached(self, seconds: float = PATIENCE_SECONDS) -> None:
        """Return once the policy stands at its gate."""
        async with asyncio.timeout(seconds):
            while not (self.gate / "reached").exists():
                await asyncio.sleep(0.05)

    def open(self) -> None:
        (self.gate / "open").touch()

    def played(self) -> list[int]:
        """The episode number of each reset, in order."""
        return [int(line.split()[0]) for line in self._lines()]

    def processes(self) -> set[int]:
        """The ids of the processes that served the policy."""
        return {int(line.split()[1]) for line in self._lines()}

    def _lines(self) -> list[str]:
        return self.notes.read_text().splitlines() if self.notes.exists() else []


GATED_AGENT = """
import os, pathlib, time

GATE = pathlib.Path({gate!r})
NOTES = pathlib.Path({notes!r})


class Agent:
    def reset(self, episode, seed):
        self.episode, self.step = episode, 0
        with NOTES.open("a") as file:
            file.write(f"{{self.episode}} {{os.getpid()}}\\n")

    def act(self, observation):
        self.step += 1
        if self.episode == {episode} and self.step == {step}:
            (GATE / "reached").touch()
            while not (GATE / "open").exists():
                time.sleep(0.02)
        return int(observation[2] + 0.5 * observation[3] > 0)
"""


@pytest.fixture
def gated(scratch: Path) -> GatedSubmission:
    """Stands still at step 5 of episode 6."""
    directory, gate = scratch / "gated", scratch / "gate"
    directory.mkdir()
    gate.mkdir()
    notes = scratch / "notes"
    text = GATED_AGENT.format(gate=str(gate), notes=str(notes), episode=6, step=5)
    (directory / "agent.py").write_text(text)
    return GatedSubmission(directory, gate, notes)
