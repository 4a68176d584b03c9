"""Plays episodes as a rollout worker does, and remembers every exchange with the policy."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NoReturn, TypeVar

from orchestrator.actors.episode_logger import EpisodeLogger
from orchestrator.actors.episode_runner import EpisodeLimits, RunKind, RunReport, run_episode
from orchestrator.actors.worker_resources import EnvironmentCache, PolicyLine
from orchestrator.adapters.benchmarks.registry import load_benchmark
from orchestrator.adapters.policies.websocket import WebSocketConnection, WebSocketConnector
from orchestrator.domain.episodes import EpisodeRun, PlannedEpisode
from orchestrator.domain.errors import InfrastructureError
from orchestrator.domain.messages import EvalJobMessage
from orchestrator.ports import Benchmark, Observation, PolicyConnection, PolicyConnector
from orchestrator.submission.wire import packb
from orchestrator.waiting import uninterrupted

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Exchange:
    """One observation and its answer. `actions` is as packed on the wire; `step` that of the episode."""

    step: int
    observation_sha256: bytes
    actions: bytes
    seconds: float


@dataclass(frozen=True, slots=True)
class Played:
    """One run of an episode, with all that was said in it."""

    episode: PlannedEpisode
    report: RunReport
    exchanges: tuple[Exchange, ...]
    reset_seconds: float

    @property
    def is_sound(self) -> bool:
        return self.report.kind is RunKind.FINISHED

    @property
    def policy_seconds(self) -> float:
        return sum(exchange.seconds for exchange in self.exchanges)


@dataclass
class _RecordedPolicy(PolicyConnection):
    """A connection that notes what goes over it."""

    connection: PolicyConnection
    step: Callable[[], int]
    exchanges: list[Exchange] = field(default_factory=list)
    reset_seconds: float = 0.0

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.connection.metadata

    @property
    def supports_reset(self) -> bool:
        return self.connection.supports_reset

    def reset(self, episode: int, seed: int, timeout_seconds: float) -> None:
        started_at = time.monotonic()
        self.connection.reset(episode, seed, timeout_seconds)
        self.reset_seconds = time.monotonic() - started_at

    def act(self, observation: Observation, timeout_seconds: float) -> Any:
        started_at = time.monotonic()
        actions = self.connection.act(observation, timeout_seconds)
        seconds = time.monotonic() - started_at
        digest = hashlib.sha256(packb(observation)).digest()
        self.exchanges.append(Exchange(self.step(), digest, packb(actions), seconds))
        return actions

    def close(self) -> None:
        self.connection.close()


class PolicyInstance:
    """One instance of a policy, kept from episode to episode as a rollout worker keeps it."""

    def __init__(self, connector: WebSocketConnector, *, stateless: bool, connect_seconds: float) -> None:
        self._connector = _AbortableConnector(connector)
        self.line = PolicyLine(self._connector, stateless=stateless, connect_timeout_seconds=connect_seconds)

    def abort(self) -> None:
        """Let nothing wait for the policy any longer; from any thread."""
        self._connector.abort()

    def close(self) -> None:
        self.line.close()


class _AbortableConnector(PolicyConnector):
    """Remembers the connection of the one line that it serves."""

    def __init__(self, connector: WebSocketConnector) -> None:
        self._connector = connector
        self._connection: WebSocketConnection | None = None
        self._is_aborted = False

    def connect(self, timeout_seconds: float) -> PolicyConnection:
        connection = self._connection = self._connector.connect(timeout_seconds)
        if self._is_aborted:
            connection.abort()
        return connection

    def abort(self) -> None:
        self._is_aborted = True
        if self._connection is not None:
            self._connection.abort()


class Player:
    """Plays episodes of one benchmark. All methods but `stop` belong to one thread, as environments do."""

    def __init__(self, job: EvalJobMessage, benchmark: Benchmark, limits: EpisodeLimits) -> None:
        self._job = job
        self._benchmark = benchmark
        self._limits = limits
        self._environments = EnvironmentCache(benchmark)
        self._stop = threading.Event()

    @property
    def task_ids(self) -> Sequence[str]:
        return self._benchmark.task_ids

    def action_space(self, task_id: str) -> Any:
        """The space of the task's actions."""
        return self._environments.get(task_id).action_space

    def first_observation(self, episode: PlannedEpisode) -> Observation:
        """What a policy sees first in this episode."""
        return self._environments.get(episode.task_id).reset(episode.seed)

    def play(
        self, instance: PolicyInstance, episode: PlannedEpisode, *, max_steps: int | None = None
    ) -> Played:
        """One episode, cut after `max_steps`.

        Raises:
            PolicyError: no connection could be opened.
            InfrastructureError: the environment failed, or the player was stopped.
        """
        environment = self._environments.get(episode.task_id)
        run, logger = self._begin(episode)
        policy = _RecordedPolicy(instance.line.connection(), lambda: logger.steps)
        limits = self._limits if max_steps is None else replace(self._limits, max_steps=max_steps)
        succeeded = partial(self._benchmark.succeeded, episode.task_id)
        sound = False
        try:
            report = run_episode(environment, policy, run, logger, limits, succeeded, self._stop)
            sound = report.kind is RunKind.FINISHED
        finally:
            instance.line.release(sound=sound)
        if report.kind in (RunKind.ENVIRONMENT_ERROR, RunKind.STOPPED):
            raise InfrastructureError(f"the environment of {episode.task_id} failed: {report.detail}")
        return Played(episode, report, tuple(policy.exchanges), policy.reset_seconds)

    def _begin(self, episode: PlannedEpisode) -> tuple[EpisodeRun, EpisodeLogger]:
        run = EpisodeRun(
            job_id=self._job.job_id,
            epoch=1,
            run=1,
            task_id=episode.task_id,
            episode_id=episode.episode_id,
            seed=episode.seed,
            policy_seed=episode.policy_seed,
        )
        logger = EpisodeLogger(
            self._job,
            run,
            self._benchmark.env_name(episode.task_id),
            step_log_interval=1,
            byte_cap=2**20,
            stage=_stage_nothing,
            log_steps=False,
        )
        return run, logger

    def stop(self) -> None:
        """End the episode in hand after its current step. From any thread."""
        self._stop.set()

    def close(self) -> None:
        self._environments.close()


def _stage_nothing(*_: object) -> NoReturn:
    raise AssertionError("no step is logged, so no part is ever staged")


class PlayingThread:
    """A player on a thread of its own, for an event loop that must go on."""

    def __init__(self, player: Player, executor: ThreadPoolExecutor) -> None:
        self._player = player
        self._executor = executor

    async def call(self, work: Callable[[Player], T]) -> T:
        """What `work` gives on that thread. Who is cancelled leaves the work to `playing`."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work, self._player)

    @asynccontextmanager
    async def using(self, instance: PolicyInstance) -> AsyncIterator[PolicyInstance]:
        """The instance for the block, closed on this thread; what waits for it ends where the block fails."""
        try:
            yield instance
        except BaseException:
            instance.abort()
            raise
        finally:
            await uninterrupted(self.call(lambda _: instance.close()))


@asynccontextmanager
async def playing(job: EvalJobMessage, limits: EpisodeLimits) -> AsyncIterator[PlayingThread]:
    """A player of the job's benchmark for the block. An episode in hand ends after its current step.

    Raises:
        UsageError: the benchmark is unknown, or its config unusable.
    """
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="play")
    loop = asyncio.get_running_loop()
    try:
        player = await loop.run_in_executor(executor, _player, job, limits)
        try:
            yield PlayingThread(player, executor)
        finally:
            player.stop()
            await uninterrupted(asyncio.to_thread(executor.submit(player.close).result))
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _player(job: EvalJobMessage, limits: EpisodeLimits) -> Player:
    benchmark = load_benchmark(job.env_provider, job.benchmark_name, job.config, job.benchmark_spec)
    return Player(job, benchmark, limits)
