"""One job from claim to result, on a real database, with workers and a submission that only seem to be."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from orchestrator.actors.episode_runner import RunKind, RunReport
from orchestrator.actors.job_supervision import JobSupervision, SupervisionParts
from orchestrator.adapters.postgres.ledger import PostgresLedger
from orchestrator.domain.episodes import EpisodeRun, FinishedEpisode
from orchestrator.domain.errors import InfrastructureError, SubmissionError
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.ports import BenchmarkDescription, Claim, ClaimRefusal, Evidence
from tests.job_fixtures import a_job, a_store, finished
from tests.unit.actors.control_fakes import eventually

if TYPE_CHECKING:
    from tests.conftest import Pool

pytestmark = pytest.mark.usefixtures("unrendered_log")

EPISODES = 3


@dataclass
class Workers:
    """`Cluster` of one worker, which plays once it may go on."""

    ledger: PostgresLedger
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    playing: asyncio.Event = field(default_factory=asyncio.Event)
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    drained: asyncio.Event = field(default_factory=asyncio.Event)
    start_error: Exception | None = None
    size: int = 1

    async def start(self, waiting: Callable[[str], Awaitable[None]]) -> None:
        if self.start_error is not None:
            raise self.start_error

    async def describe(self) -> BenchmarkDescription:
        return BenchmarkDescription(("CartPole-v1",), EPISODES, "a rule", (), {"gymnasium": "1"})

    async def prepare(self, index: int, connector: Any) -> None:
        return None

    async def run(self, index: int, runs: list[EpisodeRun]) -> list[RunReport]:
        self.playing.set()
        await self.go_on.wait()
        episodes = [finished(run) for run in runs]
        commits = await self.ledger.commit(episodes)
        return [
            RunReport(run, RunKind.FINISHED, commit=commit) for run, commit in zip(runs, commits, strict=True)
        ]

    async def replace(self, index: int) -> None:
        raise NotImplementedError

    async def settle(self, finished: FinishedEpisode) -> Any:
        raise NotImplementedError

    async def drain(self) -> None:
        self.drained.set()

    async def stop(self) -> None:
        self.stopped.set()


@dataclass
class Submission:
    """`PolicySource` of a container that only has a log. `removed` notes who removed it."""

    workers: Workers
    removed: list[int] = field(default_factory=list)
    start_error: Exception | None = None
    removal: Callable[[], Awaitable[Any]] | None = None

    async def start(self, claim: Claim, say: Any = None) -> Any:
        if self.start_error is not None:
            raise self.start_error
        return object()

    async def replace(self, claim: Claim) -> Any:
        raise NotImplementedError

    async def evidence(self) -> Evidence:
        raise NotImplementedError

    async def logs(self) -> str:
        return "what it printed"

    async def remove(self, claim: Claim) -> None:
        assert self.workers.stopped.is_set(), "workers may still use it"
        if self.removal is not None:
            await self.removal()
        self.removed.append(claim.epoch)


@dataclass
class Scene:
    """A supervision of job 1 with all that it works with."""

    pool: Pool
    workers: Workers
    submission: Submission
    supervision: JobSupervision

    async def job(self) -> Any:
        return await self.pool.fetchrow("SELECT * FROM jobs WHERE job_id = 1")

    async def results(self) -> int:
        return int(await self.pool.fetchval("SELECT count(*) FROM results"))


async def a_scene(pool: Pool, *, lease_seconds: float = 30.0, store: Any = None, **job: Any) -> Scene:
    real = a_store(pool, lease_seconds=lease_seconds)
    await real.insert(a_job(1, **job), enqueue=False)
    ledger = PostgresLedger(pool)
    workers = Workers(ledger)
    submission = Submission(workers)
    parts = SupervisionParts(
        store=real if store is None else store(real),
        ledger=ledger,
        cluster=lambda claim: workers,
        policy=lambda claim: submission,
        seed_secret=b"secret",
        validator_hotkey="local",
        lease_seconds=lease_seconds,
        max_containers=3,
    )
    return Scene(pool, workers, submission, JobSupervision(parts, 1, uuid4(), time.monotonic()))


async def ended(run: asyncio.Task[Any]) -> Any:
    return await asyncio.wait_for(run, 30)


async def lapse(pool: Pool) -> None:
    await pool.execute("UPDATE jobs SET lease_expires_at = clock_timestamp() - interval '1 s'")


async def test_a_job_that_is_played_to_its_end_is_completed_and_leaves_nothing(pool: Pool) -> None:
    scene = await a_scene(pool)
    scene.workers.go_on.set()

    status = await scene.supervision.run()

    assert status is JobStatus.COMPLETED
    assert scene.supervision.decided.result() is None
    result = await a_store(pool).result(1)
    assert result is not None
    assert (result.total_episodes, result.logs) == (EPISODES, "what it printed")
    assert scene.submission.removed == [1]
    assert scene.workers.stopped.is_set()


async def test_a_drained_job_keeps_what_came_to_its_end_and_is_free_for_others(pool: Pool) -> None:
    scene = await a_scene(pool)
    run = asyncio.create_task(scene.supervision.run())
    await scene.workers.playing.wait()

    under_way = await scene.supervision.drain()
    assert scene.workers.drained.is_set()
    scene.workers.go_on.set()

    assert under_way
    assert await ended(run) is None
    kept = await pool.fetchval("SELECT count(*) FROM episodes WHERE finished")
    assert 0 < kept < EPISODES
    assert (await scene.job())["status"] == "RUNNING"
    assert scene.submission.removed == []  # whoever goes on adopts it
    assert scene.workers.stopped.is_set()
    assert not isinstance(await a_store(pool).claim(1, uuid4()), ClaimRefusal)


async def test_before_the_first_episode_there_is_nothing_to_drain(pool: Pool) -> None:
    scene = await a_scene(pool)

    assert not await scene.supervision.drain()


async def test_a_refused_claim_is_told_and_touches_nothing(pool: Pool) -> None:
    scene = await a_scene(pool)
    await a_store(pool).claim(1, uuid4())

    status = await scene.supervision.run()

    assert status is None
    assert scene.supervision.decided.result() is ClaimRefusal.LEASED
    assert scene.submission.removed == []


async def test_a_process_that_has_grown_too_old_claims_nothing(pool: Pool) -> None:
    scene = await a_scene(pool)
    scene.supervision.started_at -= 11  # more than a third of the lease

    with pytest.raises(InfrastructureError, match="too old"):
        await scene.supervision.run()

    assert (await scene.job())["epoch"] == 0


async def test_a_cancel_flag_ends_a_running_job_cancelled(pool: Pool) -> None:
    scene = await a_scene(pool, lease_seconds=3.0)
    run = asyncio.create_task(scene.supervision.run())
    await scene.workers.playing.wait()

    await a_store(pool).request_cancel(1, "enough")

    assert await ended(run) is JobStatus.CANCELLED
    assert scene.submission.removed == [1]
    assert await scene.results() == 1


async def test_a_deadline_that_passes_ends_a_running_job_timeout(pool: Pool) -> None:
    scene = await a_scene(pool, lease_seconds=3.0)
    run = asyncio.create_task(scene.supervision.run())
    await scene.workers.playing.wait()

    await pool.execute("UPDATE jobs SET deadline_at = clock_timestamp()")

    assert await ended(run) is JobStatus.TIMEOUT
    assert await scene.results() == 1


async def test_the_lease_is_kept_while_a_job_that_was_ended_is_cleaned_up(pool: Pool) -> None:
    scene = await a_scene(pool, lease_seconds=3.0)

    async def until_it_is_renewed_twice() -> None:
        for _ in range(2):
            before = (await scene.job())["lease_expires_at"]

            async def renewed(before: Any = before) -> bool:
                return bool((await scene.job())["lease_expires_at"] > before)

            await eventually(renewed)

    scene.submission.removal = until_it_is_renewed_twice
    run = asyncio.create_task(scene.supervision.run())
    await scene.workers.playing.wait()

    await a_store(pool).request_cancel(1, "enough")

    assert await ended(run) is JobStatus.CANCELLED


async def test_the_lease_is_kept_while_cancelled_work_comes_to_its_end(pool: Pool) -> None:
    scene = await a_scene(pool, lease_seconds=3.0)
    renewed = asyncio.Event()

    async def run_on(index: int, runs: list[EpisodeRun]) -> list[RunReport]:
        scene.workers.playing.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            before = (await scene.job())["lease_expires_at"]

            async def later() -> bool:
                return bool((await scene.job())["lease_expires_at"] > before)

            await eventually(later)
            renewed.set()
            raise
        raise AssertionError

    scene.workers.run = run_on  # type: ignore[method-assign]
    run = asyncio.create_task(scene.supervision.run())
    await scene.workers.playing.wait()

    await a_store(pool).request_cancel(1, "enough")

    assert await ended(run) is JobStatus.CANCELLED
    assert renewed.is_set()


async def test_a_supervisor_whose_job_was_claimed_by_another_stops_and_removes_nothing(pool: Pool) -> None:
    scene = await a_scene(pool, lease_seconds=3.0)
    run = asyncio.create_task(scene.supervision.run())
    await scene.workers.playing.wait()

    async def claimed() -> bool:
        await lapse(pool)
        return not isinstance(await a_store(pool).claim(1, uuid4()), ClaimRefusal)

    await eventually(claimed)  # a renewal may come between

    assert await ended(run) is None
    assert scene.workers.stopped.is_set()
    assert scene.submission.removed == []
    assert await scene.results() == 0


class DeadConnection:
    """The store once its database is away without a word: a question cannot even be cancelled."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.back = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def renew(self, claim: Claim) -> Any:
        while not self.back.is_set():
            with suppress(asyncio.CancelledError):
                await self.back.wait()
        raise ConnectionError

    watch = renew


async def test_a_supervisor_that_cannot_renew_its_lease_stops_its_workers(pool: Pool) -> None:
    dead: list[DeadConnection] = []

    def store(real: Any) -> DeadConnection:
        dead.append(DeadConnection(real))
        return dead[0]

    scene = await a_scene(pool, lease_seconds=1.0, store=store)

    status = await ended(asyncio.create_task(scene.supervision.run()))

    assert status is None
    assert scene.workers.stopped.is_set()
    assert scene.submission.removed == []
    assert await scene.results() == 0
    dead[0].back.set()


async def test_a_fault_of_the_submission_fails_the_job_with_the_log(pool: Pool) -> None:
    scene = await a_scene(pool)
    scene.submission.start_error = SubmissionError("it does not load", "Traceback of theirs")

    status = await scene.supervision.run()

    assert status is JobStatus.FAILED
    result = await a_store(pool).result(1)
    assert result is not None
    assert result.error == "it does not load"
    assert (result.extra_data or {})["failure"] == "submission"
    assert scene.submission.removed == [1]


async def test_a_fault_of_ours_gives_the_job_back_with_the_reason(pool: Pool) -> None:
    scene = await a_scene(pool)
    scene.workers.start_error = InfrastructureError("no worker came up")

    status = await scene.supervision.run()

    assert status is None
    job = await scene.job()
    assert (job["status"], job["epoch"]) == ("STARTING", 1)
    assert "no worker came up" in job["detail"]
    assert job["lease_holder"] != scene.supervision.holder
    assert await scene.results() == 0
    assert scene.submission.removed == []


async def test_a_supervisor_that_is_stopped_hands_the_job_over_to_whoever_comes_first(pool: Pool) -> None:
    scene = await a_scene(pool)
    run = asyncio.create_task(scene.supervision.run())
    await scene.workers.playing.wait()

    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ended(run)

    assert scene.workers.stopped.is_set()
    claim = await a_store(pool).claim(1, uuid4())
    assert not isinstance(claim, ClaimRefusal)
    assert claim.epoch == 2


async def test_an_incarnation_that_finds_every_outcome_there_only_stores_the_result(pool: Pool) -> None:
    first = await a_scene(pool)
    first.submission.removal = lambda: asyncio.sleep(3600)  # it dies right before the result
    first.workers.go_on.set()
    run = asyncio.create_task(first.supervision.run())
    await first.workers.stopped.wait()
    run.cancel()
    with suppress(asyncio.CancelledError):
        await ended(run)
    second = await a_scene(pool)

    status = await second.supervision.run()

    assert status is JobStatus.COMPLETED
    assert not second.workers.playing.is_set()
    assert await second.results() == 1
