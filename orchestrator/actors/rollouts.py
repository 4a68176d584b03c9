"""The episodes of a running job: handed to workers, and each report turned into an outcome or another run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from orchestrator.actors.episode_board import EpisodeBoard
from orchestrator.actors.episode_runner import UNDECIDED, RunKind, RunReport
from orchestrator.actors.fruitless_faults import FruitlessFaults
from orchestrator.actors.policy_judge import PolicyJudge, Ruling
from orchestrator.actors.submission_container import PolicySource
from orchestrator.domain.episodes import CommitOutcome, EpisodeKey
from orchestrator.domain.errors import Fenced, HandedOver, InfrastructureError, SubmissionError, UsageError
from orchestrator.ports import Claim, Ledger, PolicyConnector

if TYPE_CHECKING:
    from orchestrator.actors.job_supervision import Cluster

log = structlog.get_logger(__name__)

# Episodes handed over at once: enough that a short episode does not wait for a round trip through us.
MAX_RUNS_AT_ONCE = 8


class WorkerLost(InfrastructureError):
    """A rollout worker died or does not answer; its unfinished episodes run again elsewhere."""


@dataclass(frozen=True)
class RolloutTools:
    """What the rollouts of a job work with. `PolicyJudge` says what `max_containers` limits."""

    claim: Claim
    ledger: Ledger
    cluster: Cluster
    policy: PolicySource
    max_containers: int


@dataclass(slots=True)
class _Worker:
    index: int
    container: int = 1  # the container that it was prepared for; 0: none
    lost: bool = False


@dataclass(slots=True)
class _Landing:
    """What a hand-over came to."""

    again: list[EpisodeKey] = field(default_factory=list)
    alone: list[EpisodeKey] = field(default_factory=list)
    unsure: list[EpisodeKey] = field(default_factory=list)  # the ledger knows whether they have an outcome
    outcomes: int = 0
    fault: str | None = None  # of ours; one for all the episodes that it spoiled


class Rollouts:
    """Runs every episode of the board to an outcome."""

    def __init__(
        self,
        tools: RolloutTools,
        board: EpisodeBoard,
        connector: PolicyConnector,
        note: Callable[[int], None],
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Every worker of the cluster is prepared for `connector`.

        `note` is told the number of episodes left; `pause` waits for some seconds after a fault of ours.
        """
        self._tools = tools
        self._board = board
        self._note = note
        self._faults = FruitlessFaults(pause)
        self._judge = PolicyJudge(tools, board, connector, self._faults)
        self._changed = asyncio.Condition()
        self._draining = False

    async def run(self) -> None:
        """Returns when the board is done. Of several errors at once, the gravest is raised.

        Raises:
            Fenced: another incarnation holds the job.
            SubmissionError: more than `max_containers` episodes end or hang the submission's container, or no
                fresh one comes up.
            UsageError: a new worker cannot run the benchmark.
            InfrastructureError: too many faults of ours without any progress.
            HandedOver: `drain` was called, and what was under way has come to its end.
        """
        await self._judge.recall()
        try:
            async with asyncio.TaskGroup() as group:
                for index in range(self._tools.cluster.size):
                    group.create_task(self._feed(_Worker(index)))
        except BaseExceptionGroup as errors:
            raise _gravest(errors) from None
        if not self._board.is_done:
            raise HandedOver(f"job {self._job_id}: {self._board.unfinished} episodes are left to others")

    async def drain(self) -> None:
        """Let the episodes under way come to their end, and begin no other."""
        async with self._changed:
            self._draining = True
            self._changed.notify_all()
        await self._tools.cluster.drain()

    @property
    def _goes_on(self) -> bool:
        return not (self._board.is_done or self._draining)

    async def look_at_container(self) -> None:
        """Find out whether the container is there still: no run is begun in one that is not."""
        await self._judge.look_at_container()

    async def _feed(self, worker: _Worker) -> None:
        """Keep one worker busy until nothing is left that it could do."""
        while self._goes_on:
            if worker.lost and not await self._replaced(worker):
                continue
            keys = await self._take(worker.index)
            if keys is None:
                return
            try:
                reports = await self._run(worker, keys)
            except WorkerLost as error:
                landing = await self._after_loss(worker, keys, error)
            else:
                landing = await self._digest(worker, keys, reports)
            await self._land(worker.index, landing)

    async def _take(self, index: int) -> list[EpisodeKey] | None:
        async with self._changed:
            while self._goes_on:
                share = -(-self._board.unfinished // (2 * self._tools.cluster.size))
                keys = self._board.take(index, max(1, min(MAX_RUNS_AT_ONCE, share)))
                if keys:
                    return keys
                await self._changed.wait()
            return None

    async def _land(self, index: int, landing: _Landing) -> None:
        async with self._changed:
            self._board.landed(index, again=landing.again, alone=landing.alone)
            self._note(self._board.unfinished)
            self._changed.notify_all()

    async def _run(self, worker: _Worker, keys: Sequence[EpisodeKey]) -> list[RunReport]:
        runs = await self._tools.ledger.assign(self._tools.claim, keys)
        if not runs:
            return []
        await self._connect(worker)
        return await self._tools.cluster.run(worker.index, runs)

    async def _connect(self, worker: _Worker) -> None:
        """Have the worker prepared for a container that may be used."""
        while True:
            container, connector = await self._judge.usable_container()
            if worker.container == container:
                return
            await self._tools.cluster.prepare(worker.index, connector)
            worker.container = container  # which may be spent by now

    async def _after_loss(self, worker: _Worker, keys: Sequence[EpisodeKey], error: WorkerLost) -> _Landing:
        log.warning("worker_lost", job_id=self._job_id, worker=worker.index, why=str(error))
        worker.lost, worker.container = True, 0
        again = await self._without_outcome(keys)
        if len(again) < len(keys):
            self._faults.progress()
        await self._faults.count(str(error))
        if again:
            # Before they run elsewhere: the old process may only be frozen, and wake up.
            await self._replaced(worker)
        return _Landing(again)

    async def _replaced(self, worker: _Worker) -> bool:
        """Whether a new process stands in for the lost one. The old one is dead either way."""
        try:
            await self._tools.cluster.replace(worker.index)
        except WorkerLost as error:
            log.warning("worker_not_replaced", job_id=self._job_id, worker=worker.index, why=str(error))
            await self._faults.count(str(error))
            return False
        worker.lost = False
        return True

    async def _digest(
        self, worker: _Worker, keys: Sequence[EpisodeKey], reports: Sequence[RunReport]
    ) -> _Landing:
        landing = _Landing()
        reported = {report.run.key for report in reports}
        landing.unsure += [key for key in keys if key not in reported]
        for report in reports:
            await self._sort(worker, report, landing)
        left = await self._without_outcome(landing.unsure)
        landing.outcomes += len(landing.unsure) - len(left)
        landing.again += left
        if landing.outcomes:
            self._faults.progress()
        elif landing.fault is not None:
            await self._faults.count(landing.fault)
        elif len(left) == len(keys) and not self._draining:
            await self._faults.count(f"worker {worker.index} gave every episode back unplayed")
        return landing

    async def _sort(self, worker: _Worker, report: RunReport, landing: _Landing) -> None:
        key = report.run.key
        if report.kind in UNDECIDED:
            judgement = await self._judge.judge(report, worker.container)
            ruling = judgement.ruling
            if ruling is Ruling.CHARGED:
                landing.outcomes += 1
            elif ruling is Ruling.STALE:
                landing.unsure.append(key)
            else:
                (landing.alone if ruling is Ruling.ALONE else landing.again).append(key)
            if ruling is Ruling.OUR_FAULT:
                landing.fault = judgement.reason
        elif report.kind is RunKind.ENVIRONMENT_ERROR:
            log.warning("environment_failed", job_id=self._job_id, task=key.task_id, why=report.detail)
            landing.fault = f"the environment of {key.task_id} failed: {report.detail}"
            landing.again.append(key)
        elif report.commit in (CommitOutcome.COMMITTED, CommitOutcome.ALREADY):
            landing.outcomes += 1
        else:
            landing.unsure.append(key)

    async def _without_outcome(self, keys: Sequence[EpisodeKey]) -> list[EpisodeKey]:
        """Those of the episodes that the ledger still misses: the others were committed all the same."""
        if not keys:
            return []
        missing = {episode.key for episode in await self._tools.ledger.missing(self._job_id)}
        return [key for key in keys if key in missing]

    @property
    def _job_id(self) -> int:
        return self._tools.claim.job.job_id


def _gravest(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Of errors that came together, the one that decides most; the first of equals."""
    errors = list(_leaves(group))
    gravest = min(errors, key=_rank)
    for error in errors:
        if error is not gravest:
            log.warning("error_beside_another", why=f"{type(error).__name__}: {error}")
    return gravest


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _rank(error: BaseException) -> int:
    """What says that the job is not ours any more, or can never complete, comes before what may pass."""
    if isinstance(error, Fenced):
        return 0
    if isinstance(error, (SubmissionError, UsageError)):
        return 1
    return 2 if isinstance(error, InfrastructureError) else 3
