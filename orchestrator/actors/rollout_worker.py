"""A rollout worker: plays the episode runs that the supervisor hands it, and has them committed.

`RolloutWorkerCore` is the plain, blocking class; `RolloutWorker` is the Ray actor round it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import ray

from orchestrator import failpoints
from orchestrator.actors.episode_logger import EpisodeLogger, RunAbandoned, with_fault, without_telemetry
from orchestrator.actors.episode_publisher import Publisher, PublishingQueue, PublishingStopped, SinkPublisher
from orchestrator.actors.episode_runner import (
    UNDECIDED,
    EnvironmentFailed,
    EpisodeLimits,
    RunKind,
    RunReport,
    fault_of,
    fault_report,
    in_words,
    run_episode,
)
from orchestrator.actors.worker_resources import EnvironmentCache, PolicyLine
from orchestrator.adapters.benchmarks.registry import load_benchmark
from orchestrator.domain.episodes import CommitOutcome, EpisodeRun, FinishedEpisode
from orchestrator.domain.errors import InfrastructureError, PolicyError
from orchestrator.domain.messages import EvalJobMessage
from orchestrator.logging import bind_process, configure_logging, get_logger
from orchestrator.ports import BenchmarkDescription, PolicyConnector
from orchestrator.ray_session import end_with_parent

log = get_logger()

QUEUED_EPISODES = 16
QUEUED_BYTE_CAPS = 2

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class WorkerSetup:
    """All that a worker needs for one job and one container. Pickles.

    `find_sink` gives the handle of the ResultSink actor. An episode holds at most about `byte_cap` bytes of
    step messages in memory.
    """

    job: EvalJobMessage
    connector: PolicyConnector
    limits: EpisodeLimits
    find_sink: Callable[[], Any]
    step_log_interval: int = 1
    log_steps: bool = True
    byte_cap: int = 8 * 2**20
    connect_timeout_seconds: float = 10.0
    sink_timeout_seconds: float = 30.0
    log_level: str = "INFO"


class RolloutWorkerCore:
    """Plays episode runs one after the other. All methods but `stop` belong to one thread.

    That thread is also the only one that touches environments: rendering contexts are bound to theirs.
    """

    def __init__(
        self,
        setup: WorkerSetup,
        environments: EnvironmentCache,
        publisher: Publisher,
        stop: threading.Event,
        drain: threading.Event | None = None,
    ) -> None:
        """`stop` ends the run in hand after its current step; `drain` lets it end, and begins no other."""
        self._setup = setup
        self._environments = environments
        self._publisher = publisher
        self._stop = stop
        self._drain = drain or threading.Event()
        self._policy = PolicyLine(
            setup.connector,
            stateless=setup.job.job_config.stateless,
            connect_timeout_seconds=setup.connect_timeout_seconds,
        )
        self._queue = PublishingQueue(
            publisher, max_episodes=QUEUED_EPISODES, max_bytes=QUEUED_BYTE_CAPS * setup.byte_cap
        )
        self.played_episodes = 0
        self.current: EpisodeRun | None = None

    def run(self, runs: Sequence[EpisodeRun]) -> list[RunReport]:
        """One report for each run, in order, once all that is to be committed is.

        A lost or late policy ends the call: the runs after it are reported STOPPED, never begun. Reports of
        published runs carry no telemetry; their `commit` is None if the worker was stopped before the sink
        acknowledged.

        Raises:
            InfrastructureError: the sink refuses an episode for a reason that no second try would change.
        """
        reports: list[tuple[RunReport, Future[CommitOutcome] | None]] = []
        skip = ""
        for run in runs:
            if skip or self._stop.is_set() or self._drain.is_set():
                reports.append((RunReport(run, RunKind.STOPPED, skip or "stopped"), None))
                continue
            report = self._play(run)
            if report.kind in UNDECIDED:
                skip = f"not begun: {report.kind.value.replace('_', ' ')} in an earlier run"
            reports.append(self._publish(report))
        return [self._acknowledged(report, outcome) for report, outcome in reports]

    def settle(self, finished: FinishedEpisode) -> CommitOutcome:
        """Publish an episode whose fault the supervisor decided on.

        Raises:
            PublishingStopped: the worker was stopped before the sink acknowledged.
        """
        if finished.fault is not None:
            finished = with_fault(finished, finished.fault, finished.fault_detail)
        return self._queue.put(finished).result()

    def stop(self) -> None:
        """End the run in hand after its current step. From any thread."""
        self._stop.set()

    def close(self) -> None:
        """Publish what is queued, and let go of connection and thread. The environments stay."""
        self._queue.close()
        self._policy.close()

    def _play(self, run: EpisodeRun) -> RunReport:
        self.current = run
        sound = False
        try:
            report = self._report(run)
            sound = report.kind is RunKind.FINISHED
        finally:
            self.current = None
            self._policy.release(sound=sound)
        self.played_episodes += 1
        if report.kind is RunKind.ENVIRONMENT_ERROR:
            self._environments.discard(run.task_id)
        if report.kind not in (RunKind.FINISHED, RunKind.STOPPED):
            # What a submission does wrong is in its result; what we do wrong a person should look at.
            level = logging.WARNING if report.kind is RunKind.ENVIRONMENT_ERROR else logging.INFO
            log.log(level, "episode_run_failed", kind=report.kind.value, detail=report.detail, **_named(run))
        return report

    def _report(self, run: EpisodeRun) -> RunReport:
        try:
            environment = self._environments.get(run.task_id)
        except EnvironmentFailed as failure:
            return RunReport(run, RunKind.ENVIRONMENT_ERROR, failure.text)
        logger = self._logger(run)
        try:
            policy = self._policy.connection()
        except PolicyError as error:
            # Nothing is certain here: whoever answered may not even have been our container.
            _, fault = fault_of(error)
            return fault_report(run, logger, RunKind.POLICY_LOST, fault, "connect", in_words(error))
        succeeded = partial(self._environments.benchmark.succeeded, run.task_id)
        return run_episode(environment, policy, run, logger, self._setup.limits, succeeded, self._stop)

    def _logger(self, run: EpisodeRun) -> EpisodeLogger:
        return EpisodeLogger(
            self._setup.job,
            run,
            self._environments.benchmark.env_name(run.task_id),
            step_log_interval=self._setup.step_log_interval,
            byte_cap=self._setup.byte_cap,
            stage=self._stage,
            log_steps=self._setup.log_steps,
        )

    def _stage(self, run: EpisodeRun, part: int, messages: Sequence[bytes]) -> None:
        try:
            current = self._publisher.stage(run, part, messages)
        except PublishingStopped as error:
            raise RunAbandoned("stopped") from error
        if not current:
            raise RunAbandoned("a later run of the episode was handed out", CommitOutcome.STALE)

    def _publish(self, report: RunReport) -> tuple[RunReport, Future[CommitOutcome] | None]:
        """Queue the outcome, and keep the report without the telemetry."""
        if report.finished is None or report.kind in UNDECIDED:
            return report, None
        light = replace(report, finished=without_telemetry(report.finished))
        try:
            return light, self._queue.put(report.finished)
        except PublishingStopped:
            return light, None

    def _acknowledged(self, report: RunReport, outcome: Future[CommitOutcome] | None) -> RunReport:
        if outcome is None:
            return report
        try:
            return replace(report, commit=outcome.result())
        except PublishingStopped:
            return report


class RolloutWorkerActor:
    """A responsive event loop beside the one thread on which everything else happens."""

    def __init__(self, job_id: int | None = None, index: int = 0, benchmark: str = "") -> None:
        self._job_id = job_id
        self._index = index
        self._benchmark = benchmark
        self._stop = threading.Event()
        self._drain = threading.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollout")
        self._job: EvalJobMessage | None = None
        self._environments: EnvironmentCache | None = None
        self._core: RolloutWorkerCore | None = None

    def __repr__(self) -> str:
        job = "no job" if self._job_id is None else f"job {self._job_id}"
        core = self._core
        if core is None:
            benchmark = f"{self._benchmark}, " if self._benchmark else ""
            return f"RolloutWorker({job}, {benchmark}worker {self._index})"
        run = core.current
        doing = "idle" if run is None else f"playing {run.task_id} #{run.episode_id}"
        return f"RolloutWorker({job}, worker {self._index}, {core.played_episodes} episodes, {doing})"

    async def describe(self, job: EvalJobMessage) -> BenchmarkDescription:
        """The job's benchmark, as this machine has it; before `prepare` or after.

        Raises:
            UsageError: the job's benchmark is unknown or its config is unusable.
        """
        return await self._on_thread(partial(self._describe, job))

    async def prepare(self, setup: WorkerSetup) -> None:
        """Get ready for the job, or for the next container of the same job; environments are kept then.

        Raises:
            UsageError: the job's benchmark is unknown or its config is unusable.
        """
        self._job_id = setup.job.job_id
        await self._on_thread(partial(self._prepare, setup))

    async def run(self, runs: Sequence[EpisodeRun]) -> list[RunReport]:
        """See `RolloutWorkerCore.run`."""
        return await self._on_thread(lambda: self._prepared().run(runs))

    async def settle(self, finished: FinishedEpisode) -> CommitOutcome:
        """See `RolloutWorkerCore.settle`; waits for a run in hand."""
        return await self._on_thread(lambda: self._prepared().settle(finished))

    async def ping(self) -> str:
        """What the worker is doing, also while it steps."""
        return repr(self)

    async def drain(self) -> None:
        """Begin no other run than the one in hand, whose end it takes as long as it takes."""
        self._drain.set()

    async def stop(self) -> None:
        """End the run in hand after its current step, and let go of everything; the actor is then used up."""
        if not self._stop.is_set():
            self._stop.set()
            await self._on_thread(self._let_go)
            self._thread.shutdown(wait=False)

    async def _on_thread(self, call: Callable[[], Answer]) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def _describe(self, job: EvalJobMessage) -> BenchmarkDescription:
        benchmark = self._environments_for(job).benchmark
        return BenchmarkDescription(
            task_ids=tuple(benchmark.task_ids),
            default_episodes_per_task=benchmark.default_episodes_per_task,
            success_rule=benchmark.success_rule,
            env_specs=tuple(benchmark.env_specs()),
            versions=benchmark.versions(),
        )

    def _prepare(self, setup: WorkerSetup) -> None:
        configure_logging("json", setup.log_level)
        bind_process(job_id=setup.job.job_id, worker=self._index)
        self._close_core()
        publisher = SinkPublisher(setup.find_sink, self._stop, timeout_seconds=setup.sink_timeout_seconds)
        environments = self._environments_for(setup.job)
        self._core = RolloutWorkerCore(setup, environments, publisher, self._stop, self._drain)

    def _environments_for(self, job: EvalJobMessage) -> EnvironmentCache:
        if self._environments is None or self._job != job:
            self._let_go()
            benchmark = load_benchmark(job.env_provider, job.benchmark_name, job.config, job.benchmark_spec)
            self._environments = EnvironmentCache(
                failpoints.instrumented(benchmark, "benchmark", {"make": "environment"})
            )
            self._job = job
        return self._environments

    def _prepared(self) -> RolloutWorkerCore:
        if self._core is None:
            raise InfrastructureError("the worker was not prepared, or is stopped")
        return self._core

    def _close_core(self) -> None:
        core, self._core = self._core, None
        if core is not None:
            core.close()

    def _let_go(self) -> None:
        self._close_core()
        environments, self._environments = self._environments, None
        if environments is not None:
            environments.close()


class RolloutWorkerProcess(RolloutWorkerActor):
    """The actor in a process of its own."""

    def __init__(self, job_id: int | None = None, index: int = 0, benchmark: str = "") -> None:
        end_with_parent()
        failpoints.enter_process(f"rollout-worker-{index}")
        super().__init__(job_id, index, benchmark)


# The supervisor replaces a dead worker; Ray must neither restart it nor run an episode a second time.
RolloutWorker = ray.remote(max_restarts=0, max_task_retries=0)(RolloutWorkerProcess)


def _named(run: EpisodeRun) -> dict[str, Any]:
    return {"task_id": run.task_id, "episode_id": run.episode_id, "run": run.run}
