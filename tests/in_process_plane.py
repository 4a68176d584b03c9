"""A control plane in this process: everything real but Ray. Workers are threads, supervisors are tasks.

Postgres, consumer, reconciler, supervision, result sink and the workers' code are those of the product; only
the actors round them are missing. So many jobs run in little time, and a test sees all of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from structlog.testing import capture_logs

from orchestrator.actors.control_actors import ServiceLoop
from orchestrator.actors.episode_publisher import until_acknowledged
from orchestrator.actors.episode_runner import RunReport
from orchestrator.actors.job_supervision import Cluster, JobSupervision
from orchestrator.actors.queue_consumer import QueueConsumer
from orchestrator.actors.reconciler import Reconciler
from orchestrator.actors.result_sink import ResultSink
from orchestrator.actors.rollout_worker import RolloutWorkerActor, RolloutWorkerCore, WorkerSetup
from orchestrator.adapters.artifacts.pack import pack_directory
from orchestrator.adapters.policies.websocket import WebSocketConnector
from orchestrator.adapters.postgres.installation import take_generation
from orchestrator.adapters.postgres.pool import Database, open_pool
from orchestrator.adapters.postgres.reconciliation import ReconciliationQueries
from orchestrator.adapters.postgres.retention import Retention
from orchestrator.app import ControlPlaneRecipe, retention_rules
from orchestrator.domain.episodes import CommitOutcome, EpisodeRun, FinishedEpisode
from orchestrator.domain.errors import InfrastructureError
from orchestrator.domain.messages import EvalJobMessage, EvalResultMessage
from orchestrator.limits import episode_limits
from orchestrator.ports import BenchmarkDescription, Claim, ClaimRefusal, Containers, PolicyConnector
from orchestrator.settings import Settings
from orchestrator.stores import job_store, submission_containers

if TYPE_CHECKING:
    import asyncpg

    Pool = asyncpg.Pool[asyncpg.Record]

SINK_SECONDS = 30.0
STOP_SECONDS = 30.0


@dataclass(frozen=True)
class LoopPublisher:
    """Publishes to a sink on the event loop, from a worker's threads."""

    sink: ResultSink
    loop: asyncio.AbstractEventLoop
    stop: Event

    def publish(self, episodes: Sequence[FinishedEpisode]) -> list[CommitOutcome]:
        return self._answer(lambda: self.sink.commit(list(episodes)))

    def stage(self, run: EpisodeRun, part: int, messages: Sequence[bytes]) -> bool:
        return self._answer(lambda: self.sink.stage(run, part, list(messages)))

    def _answer(self, call: Callable[[], Any]) -> Any:
        def send() -> Any:
            return asyncio.run_coroutine_threadsafe(call(), self.loop).result(SINK_SECONDS)

        return until_acknowledged(send, self.stop, retried=(InfrastructureError, TimeoutError))


class ThreadWorker(RolloutWorkerActor):
    """The worker without its actor: the same thread, the same core, another way to the sink."""

    def __init__(self, job_id: int, index: int, sink: ResultSink) -> None:
        super().__init__(job_id, index)
        self._sink = sink
        self._loop = asyncio.get_running_loop()

    def _prepare(self, setup: WorkerSetup) -> None:
        self._close_core()
        publisher = LoopPublisher(self._sink, self._loop, self._stop)
        self._core = RolloutWorkerCore(setup, self._environments_for(setup.job), publisher, self._stop)


@dataclass
class ThreadCluster:
    """`job_supervision.Cluster` whose workers are threads."""

    setup: WorkerSetup
    size: int
    sink: ResultSink
    workers: list[ThreadWorker] = field(default_factory=list)

    async def start(self, waiting: Callable[[str], Awaitable[None]]) -> None:
        self.workers = [self._worker(index) for index in range(self.size)]

    async def describe(self) -> BenchmarkDescription:
        return await self.workers[0].describe(self.setup.job)

    async def prepare(self, index: int, connector: PolicyConnector) -> None:
        await self.workers[index].prepare(replace(self.setup, connector=connector))

    async def run(self, index: int, runs: list[EpisodeRun]) -> list[RunReport]:
        return await self.workers[index].run(runs)

    async def replace(self, index: int) -> None:
        await self.workers[index].stop()
        self.workers[index] = self._worker(index)

    async def settle(self, finished: FinishedEpisode) -> CommitOutcome:
        return (await self.sink.commit([finished]))[0]

    async def stop(self) -> None:
        workers, self.workers = self.workers, []
        await asyncio.gather(*(worker.stop() for worker in workers))

    def _worker(self, index: int) -> ThreadWorker:
        return ThreadWorker(self.setup.job.job_id, index, self.sink)


class TaskSupervisors:
    """`reconciler.Supervisors`: one task for each job."""

    def __init__(self, recipe: InProcessRecipe) -> None:
        self._recipe = recipe
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._supervisions: dict[int, JobSupervision] = {}
        self._decided: dict[int, asyncio.Future[ClaimRefusal | None]] = {}

    async def ensure(self, job_id: int) -> ClaimRefusal | None:
        if job_id not in self._tasks:
            self._decided[job_id] = asyncio.get_running_loop().create_future()
            task = asyncio.create_task(self._supervise(job_id, self._decided[job_id]))
            self._tasks[job_id] = task
            task.add_done_callback(lambda _: self._tasks.pop(job_id, None))
        return await asyncio.shield(self._decided[job_id])

    async def revive(self, job_id: int) -> None:
        await self.ensure(job_id)

    async def report_missing(self, job_id: int, container_id: UUID) -> None:
        if (supervision := self._supervisions.get(job_id)) is not None:
            await supervision.report_missing(container_id)

    async def jobs(self) -> list[int]:
        return sorted(self._tasks)

    async def end(self, job_id: int) -> None:
        if (task := self._tasks.get(job_id)) is not None:
            task.cancel()
            await asyncio.wait({task}, timeout=STOP_SECONDS)

    async def kill_all(self) -> None:
        """As when the process dies: nothing is waited for, and the jobs are left as they are."""
        for job_id in list(self._tasks):
            await self.end(job_id)

    async def _supervise(self, job_id: int, decided: asyncio.Future[ClaimRefusal | None]) -> None:
        try:
            async with self._recipe.open_supervision(job_id, uuid4()) as supervision:
                supervision.decided.add_done_callback(
                    lambda made: decided.done() or decided.set_result(made.result())
                )
                self._supervisions[job_id] = supervision
                await supervision.run()
        except InfrastructureError as error:
            if not decided.done():
                decided.set_exception(error)
                decided.exception()
        finally:
            self._supervisions.pop(job_id, None)
            if not decided.done():
                decided.set_exception(InfrastructureError(f"job {job_id}: its supervisor ended"))
                decided.exception()


class InProcessRecipe(ControlPlaneRecipe):
    """The product's own recipe, but for the actors. Its parts outside are given."""

    sink: ResultSink
    outside: Containers

    @asynccontextmanager
    async def _open_containers(self) -> AsyncIterator[Containers]:
        yield self.outside

    def _cluster(self, claim: Claim) -> Cluster:
        job, settings = claim.job.message, self.settings
        setup = WorkerSetup(
            job=job,
            connector=WebSocketConnector("", 0),
            limits=episode_limits(job, settings),
            find_sink=lambda: None,
            step_log_interval=job.job_config.step_log_interval or settings.step_log_interval,
            log_steps=settings.telemetry_steps,
            byte_cap=settings.episode_buffer_bytes,
            connect_timeout_seconds=settings.connect_timeout_seconds,
        )
        return ThreadCluster(setup, job.resources.workers or settings.workers_per_job, self.sink)


@dataclass
class InProcessPlane:
    """A running control plane, and what a client does with it."""

    pool: Pool
    recipe: InProcessRecipe
    supervisors: TaskSupervisors
    scratch: Path
    logged: list[Any]  # every entry of the log so far

    def jobs(self, submission: Path, count: int, first_id: int = 1, **fields: Any) -> list[EvalJobMessage]:
        """So many jobs for a submission's directory."""
        packed = pack_directory(submission, self.scratch / "artifacts")
        return [
            EvalJobMessage.model_validate(
                {
                    "job_id": job_id,
                    "submission_id": submission.name,
                    "env_provider": "gymnasium",
                    "benchmark_name": "CartPole-v1",
                    "artifact_url": f"file://{packed.path}",
                    "artifact_sha256": packed.sha256,
                    "artifact_size_bytes": packed.size_bytes,
                }
                | fields
            )
            for job_id in range(first_id, first_id + count)
        ]

    async def submit(self, jobs: Sequence[EvalJobMessage]) -> None:
        store = job_store(self.pool, self.recipe.settings)
        for job in jobs:
            await store.insert(job, enqueue=True, local=True)

    async def results(self, jobs: Sequence[EvalJobMessage], seconds: float) -> list[EvalResultMessage]:
        """The result of each job, once all are there."""
        store = job_store(self.pool, self.recipe.settings)
        until = time.monotonic() + seconds
        wanted = [job.job_id for job in jobs]
        query = "SELECT count(*) FROM results WHERE job_id = ANY($1)"
        while (done := await self.pool.fetchval(query, wanted)) < len(jobs):
            assert time.monotonic() < until, f"{done} of {len(jobs)} results after {seconds:g} s"
            await asyncio.sleep(0.1)
        found = [await store.result(job.job_id) for job in jobs]
        assert None not in found
        return [result for result in found if result is not None]


@asynccontextmanager
async def in_process_plane(
    database: Database,
    scratch: Path,
    **overrides: Any,
) -> AsyncIterator[InProcessPlane]:
    """The control plane for the block; `overrides` are settings."""
    values: dict[str, Any] = {"data_dir": scratch, "reconcile_interval_seconds": 1.0} | overrides
    settings = Settings(**values)
    # Drawing a traceback takes a second, in which nothing else in this process goes on.
    with capture_logs() as logged:
        outside = submission_containers(settings)
        try:
            async with _plane(database, scratch, settings, outside, logged) as plane:
                yield plane
        finally:
            if hasattr(outside, "close"):  # one that keeps connections
                await outside.close()


@asynccontextmanager
async def _plane(
    database: Database,
    scratch: Path,
    settings: Settings,
    outside: Containers,
    logged: list[Any],
) -> AsyncIterator[InProcessPlane]:
    async with open_pool(database, application_name="in-process plane", max_size=6) as pool:
        installation = await take_generation(pool, "test")
        recipe = InProcessRecipe(settings, database, installation)
        async with recipe.open_sink() as sink:
            object.__setattr__(recipe, "sink", sink)
            object.__setattr__(recipe, "outside", outside)
            supervisors = TaskSupervisors(recipe)
            committing = asyncio.create_task(sink.work())
            consuming = Consuming(database, recipe, supervisors)
            service = ServiceLoop("QueueConsumer", consuming.serve)
            try:
                yield InProcessPlane(pool, recipe, supervisors, scratch, logged)
            finally:
                consuming.stop()
                await service.end(STOP_SECONDS)
                await supervisors.kill_all()
                committing.cancel()
                await asyncio.wait({committing}, timeout=STOP_SECONDS)
                for owned in await outside.list_owned(installation.installation_id):
                    await outside.remove(owned.handle)  # of a test that failed


class Consuming:
    """Consumers one after the other: what ends one, such as a lost connection, begins the next."""

    def __init__(self, database: Database, recipe: InProcessRecipe, supervisors: TaskSupervisors) -> None:
        self._database = database
        self._recipe = recipe
        self._supervisors = supervisors
        self._consumer: QueueConsumer | None = None
        self._stopping = False

    async def serve(self) -> None:
        async with open_pool(self._database, application_name="consumer", max_size=6) as pool:
            if not self._stopping:
                self._consumer = _consumer(pool, self._recipe, self._supervisors)
                await self._consumer.work()

    def stop(self) -> None:
        self._stopping = True
        if self._consumer is not None:
            self._consumer.stop()


def _consumer(pool: Pool, recipe: InProcessRecipe, supervisors: TaskSupervisors) -> QueueConsumer:
    settings = recipe.settings
    store = job_store(pool, settings)
    reconciler = Reconciler(
        store=store,
        queries=ReconciliationQueries(pool),
        supervisors=supervisors,
        containers=recipe.outside,
        installation_id=recipe.installation.installation_id,
        max_concurrent_jobs=settings.max_concurrent_jobs,
        retention=Retention(pool),
        retention_rules=retention_rules(settings),
        unheld_result=store.failed_result,
        lists_every_container=settings.containers == "kubernetes",
    )
    return QueueConsumer(
        pool,
        store,
        supervisors,
        reconciler,
        max_concurrent_jobs=settings.max_concurrent_jobs,
        reconcile_interval_seconds=settings.reconcile_interval_seconds,
    )
