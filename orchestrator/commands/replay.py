"""`orchestrator replay`: recorded episodes against what their actions give now."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from orchestrator.actors.episode_replay import replay_and_compare
from orchestrator.actors.worker_resources import EnvironmentCache
from orchestrator.adapters.benchmarks.names import unknown_name
from orchestrator.adapters.benchmarks.registry import load_benchmark
from orchestrator.adapters.postgres.recorded_episodes import PlannedKey, planned_keys, recorded_episode
from orchestrator.commands.replay_report import ReplayReport
from orchestrator.commands.session import ReadSettings, command_pool
from orchestrator.domain.episodes import EpisodeKey
from orchestrator.domain.errors import InfrastructureError, UsageError
from orchestrator.domain.messages import EvalJobMessage
from orchestrator.domain.replay import EpisodeReplay, RecordedEpisode
from orchestrator.ports import Job
from orchestrator.runtime import open_database
from orchestrator.stores import job_store
from orchestrator.waiting import uninterrupted

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Selection:
    """The episodes that were asked for; None is every task, or every episode."""

    task_id: str | None
    episode_id: int | None

    @classmethod
    def of(cls, episode: str | None, task_id: str | None, *, every: bool) -> Selection:
        """What `[TASK:]EPISODE`, `--task` and `--all` ask for together.

        Raises:
            UsageError: nothing, or two things at once.
        """
        if every == (episode is not None):
            raise UsageError("name one episode by its number, or give --all for every one")
        if episode is None:
            return cls(task_id, None)
        task, _, number = episode.rpartition(":")
        if not (number.isascii() and number.isdigit() and len(number) <= 9):
            raise UsageError(f"{episode[:80]!r} is no episode: give its number, or TASK:NUMBER")
        if task and task_id not in (None, task):
            raise UsageError(f"--task {task_id} and {episode[:80]} name two tasks")
        return cls(task or task_id, int(number))

    def chosen(self, job: Job, planned: Sequence[PlannedKey]) -> list[EpisodeKey]:
        """The keys of the episodes that have an outcome, in the plan's order.

        Raises:
            UsageError: the job has no such task or episode, or it has no outcome.
        """
        job_id = job.job_id
        if not planned:
            why = f": {job.error}" if job.error else ""
            raise UsageError(f"job {job_id} has no episodes, it is {job.status}{why}")
        tasks = list(dict.fromkeys(one.key.task_id for one in planned))
        if self.task_id is not None and self.task_id not in tasks:
            raise unknown_name(f"task of job {job_id}", self.task_id, tasks)
        if self.task_id is None and self.episode_id is not None and len(tasks) > 1:
            raise UsageError(
                f"job {job_id} has {len(tasks)} tasks: name one with --task. There are: {', '.join(tasks)}"
            )
        found = [one for one in planned if self.task_id in (None, one.key.task_id)]
        if self.episode_id is not None:
            last = max(one.key.episode_id for one in found)
            found = [one for one in found if one.key.episode_id == self.episode_id]
            if not found:
                raise UsageError(
                    f"job {job_id} has no episode {self.episode_id} of {self.task_id or tasks[0]}: "
                    f"its episodes are 0 to {last}"
                )
        finished = [one.key for one in found if one.finished]
        if not finished:
            which = f"episode {found[0].key.episode_id}" if len(found) == 1 else "none of the episodes"
            raise UsageError(
                f"{which} of job {job_id} has {'no' if len(found) == 1 else 'an'} outcome: "
                f"the job is {job.status}"
            )
        return finished


async def replay_command(
    read_settings: ReadSettings,
    job_id: int,
    episode: str | None,
    task_id: str | None,
    *,
    every: bool,
    as_json: bool,
) -> int:
    """Replay what was asked for, one episode after another, and say what each one shows."""
    selection = Selection.of(episode, task_id, every=every)
    settings = read_settings()
    async with open_database(settings) as database, command_pool(database) as pool:
        store = job_store(pool, settings)
        job = await store.get(job_id)
        if job is None:
            raise UsageError(f"there is no job {job_id} in {database}")
        planned = await planned_keys(pool, job_id)
        keys = selection.chosen(job, planned)
        result = await store.result(job_id)
        async with _player(job.message) as player:
            report = ReplayReport(job.message, result, player.versions, quiet=as_json)
            for key in keys:
                recorded = await recorded_episode(pool, job_id, key)
                if recorded is not None:
                    report.add(await player.replay(recorded))
    if selection.episode_id is None:
        wanted = [one for one in planned if selection.task_id in (None, one.key.task_id)]
        report.left_out = len(wanted) - len(keys)
    report.close()
    return report.exit_code


@dataclass
class _Player:
    """Replays on one thread of its own: that of the environments, as in a worker."""

    job: EvalJobMessage
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "replay"))
    stop: threading.Event = field(default_factory=threading.Event)
    environments: EnvironmentCache = field(init=False)
    versions: dict[str, str] = field(init=False)

    async def replay(self, recorded: RecordedEpisode) -> EpisodeReplay:
        return await self.on_thread(
            partial(replay_and_compare, self.environments, self.job, recorded, self.stop)
        )

    async def on_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.thread, call)

    def load(self) -> None:
        job = self.job
        try:
            benchmark = load_benchmark(job.env_provider, job.benchmark_name, job.config, job.benchmark_spec)
            self.versions = benchmark.versions()
        except UsageError:
            raise
        except Exception as error:
            raise InfrastructureError(
                f"the benchmark {job.env_provider}/{job.benchmark_name} cannot be loaded here: "
                f"{type(error).__name__}: {error}"
            ) from error
        self.environments = EnvironmentCache(benchmark)


@asynccontextmanager
async def _player(job: EvalJobMessage) -> AsyncIterator[_Player]:
    """A player of the job's episodes for the block.

    Raises:
        UsageError: the benchmark is not there (any more); says what to install.
        InfrastructureError: it is there, but does not load.
    """
    player = _Player(job)
    try:
        await player.on_thread(player.load)
        try:
            yield player
        finally:
            player.stop.set()
            await uninterrupted(player.on_thread(player.environments.close))
    finally:
        player.thread.shutdown(wait=False)
