"""A job in memory: a ledger, containers and workers whose runs follow a script, one behaviour a run."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import Enum, auto
from typing import Any, cast
from uuid import UUID

from orchestrator.actors.episode_board import EpisodeBoard
from orchestrator.actors.episode_runner import UNDECIDED, RunKind, RunReport
from orchestrator.actors.rollouts import Rollouts, RolloutTools, WorkerLost
from orchestrator.domain.episodes import (
    CommitOutcome,
    EpisodeKey,
    EpisodeOutcome,
    EpisodeRun,
    FaultClass,
    FinishedEpisode,
    PlannedEpisode,
)
from orchestrator.domain.errors import InfrastructureError, SubmissionError
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.ports import (
    BenchmarkDescription,
    Claim,
    Evidence,
    Job,
    PolicyConnection,
    PolicyConnector,
    Verdict,
)
from tests.job_fixtures import a_job, finished

STEPS = 3
TASK = "task"
RUNNING = Evidence(True, "running")
CRASHED = Evidence(False, "exit code 139 (SIGSEGV)", Verdict.SUBMISSION, FaultClass.CRASH, 139)
GONE = Evidence(False, "gone", Verdict.INFRASTRUCTURE)


class Does(Enum):
    """What happens in a run of an episode."""

    PLAY = auto()
    RAISE = auto()  # the policy raises: certainly its fault, and the container stays
    CRASH = auto()
    HANG = auto()  # no answer to this one, nor to any other in the container
    SLOW = auto()  # the episode's time is over
    RESET = auto()  # the connection is lost, the container runs
    DEAF = auto()  # from now on the container accepts no connection
    CRASH_IN_COMPANY = auto()  # crashes only if another episode is in flight
    LATE_IN_COMPANY = auto()
    CONTAINER_GONE = auto()  # through no fault of the submission
    WORKER_DIES = auto()  # and may play on for a while, unheard, until it is replaced
    WORKER_DIES_AFTER_COMMIT = auto()
    BROKEN_ENVIRONMENT = auto()
    STOPPED = auto()
    UNACKNOWLEDGED = auto()  # played to its end, but the worker was stopped before the sink answered
    STALE = auto()


CHARGED_WITH = {
    Does.RAISE: FaultClass.POLICY_EXCEPTION,
    Does.CRASH: FaultClass.CRASH,
    Does.HANG: FaultClass.STEP_TIMEOUT,
    Does.SLOW: FaultClass.EPISODE_TIMEOUT,
    Does.RESET: FaultClass.CONNECTION_LOST,
    Does.DEAF: FaultClass.STEP_TIMEOUT,
}


def key(episode_id: int) -> EpisodeKey:
    return EpisodeKey(TASK, episode_id)


def a_claim() -> Claim:
    job = Job(
        job_id=1,
        message=a_job(),
        status=JobStatus.RUNNING,
        detail=None,
        epoch=1,
        lease_holder=UUID(int=1),
        lease_is_live=True,
        deadline_seconds_left=None,
        cancel_requested=False,
        container_id=None,
        outcomes_at_claim=0,
        error=None,
        created_at=datetime.now(UTC),
        finished_at=None,
        local=True,
    )
    return Claim(job, 1, UUID(int=1))


def failed(run: EpisodeRun, fault: FaultClass) -> FinishedEpisode:
    return replace(finished(run), success=False, fault=fault, fault_detail=fault.value)


@dataclass
class MemoryLedger:
    """`ports.Ledger` for one job."""

    plan: list[EpisodeKey]
    runs: Counter[EpisodeKey] = field(default_factory=Counter)
    committed: dict[EpisodeKey, FinishedEpisode] = field(default_factory=dict)

    async def store_plan(self, claim: Claim, episodes: Sequence[PlannedEpisode]) -> None:
        raise NotImplementedError

    async def stage_part(self, run: EpisodeRun, part: int, step_messages: Sequence[bytes]) -> bool:
        raise NotImplementedError

    async def missing(self, job_id: int) -> list[PlannedEpisode]:
        missing = [each for each in self.plan if each not in self.committed]
        return [PlannedEpisode(each.task_id, each.episode_id, 0, 0) for each in missing]

    async def assign(self, claim: Claim, keys: Sequence[EpisodeKey]) -> list[EpisodeRun]:
        free = [each for each in keys if each not in self.committed]
        self.runs.update(free)
        return [
            EpisodeRun(1, claim.epoch, self.runs[each], each.task_id, each.episode_id, 0, 0) for each in free
        ]

    async def commit(self, finished: Sequence[FinishedEpisode]) -> list[CommitOutcome]:
        return [self._commit(episode) for episode in finished]

    def _commit(self, episode: FinishedEpisode) -> CommitOutcome:
        first = self.committed.get(episode.run.key)
        if first is not None:
            return CommitOutcome.ALREADY if first.run == episode.run else CommitOutcome.STALE
        if episode.run.run != self.runs[episode.run.key]:
            return CommitOutcome.STALE
        self.committed[episode.run.key] = episode
        return CommitOutcome.COMMITTED

    async def outcomes(self, job_id: int) -> list[EpisodeOutcome]:
        return [
            EpisodeOutcome(
                each.task_id,
                each.episode_id,
                0,
                episode.run.run,
                episode.episode_return,
                episode.steps,
                episode.success,
                episode.terminated,
                episode.truncated,
                episode.fault,
                episode.fault_detail,
                episode.started_at,
                episode.ended_at,
                episode.action_trace_sha256,
            )
            for each, episode in self.committed.items()
        ]

    @property
    def faults(self) -> dict[int, FaultClass | None]:
        """The class of fault of each outcome, by episode number."""
        return {each.episode_id: episode.fault for each, episode in self.committed.items()}


@dataclass
class FakeContainer:
    """A container that is its own connector."""

    end: Evidence | None = None
    removed: bool = False
    hung: bool = False
    deaf: bool = False

    def connect(self, timeout_seconds: float) -> PolicyConnection:
        raise NotImplementedError


@dataclass
class FakePolicySource:
    """`PolicySource` of such containers. The errors are raised by the next calls, one each."""

    containers: list[FakeContainer] = field(default_factory=lambda: [FakeContainer()])
    replace_errors: list[Exception] = field(default_factory=list)
    evidence_errors: list[Exception] = field(default_factory=list)
    log_error: Exception | None = None
    printed: str = "the log's end"

    async def start(self, claim: Claim, say: Any = None) -> PolicyConnector:
        raise NotImplementedError

    async def replace(self, claim: Claim) -> PolicyConnector:
        self.containers[-1].removed = True
        await asyncio.sleep(0)
        if self.replace_errors:
            raise self.replace_errors.pop(0)
        self.containers.append(FakeContainer())
        return self.containers[-1]

    async def evidence(self) -> Evidence:
        await asyncio.sleep(0)
        if self.evidence_errors:
            raise self.evidence_errors.pop(0)
        return self.containers[-1].end or RUNNING

    async def logs(self) -> str:
        if self.log_error is not None:
            raise self.log_error
        return self.printed

    async def remove(self, claim: Claim) -> None:
        raise NotImplementedError


@dataclass
class FakeCluster:
    """`Cluster` whose workers play the script. `turns` says how often a step lets others go first."""

    size: int
    script: Mapping[EpisodeKey, Sequence[Does]]
    ledger: MemoryLedger
    turns: Callable[[], int]
    prepared: list[FakeContainer | None]
    replace_errors: list[Exception] = field(default_factory=list)
    prepare_errors: list[Exception] = field(default_factory=list)
    playing: dict[int, EpisodeRun] = field(default_factory=dict)
    in_company: set[EpisodeRun] = field(default_factory=set)
    replaced: list[int] = field(default_factory=list)
    settled: list[EpisodeRun] = field(default_factory=list)
    played: Counter[EpisodeKey] = field(default_factory=Counter)
    draining: bool = False

    async def start(self, waiting: Callable[[str], Awaitable[None]]) -> None:
        raise NotImplementedError

    async def stop(self) -> None:
        raise NotImplementedError

    async def describe(self) -> BenchmarkDescription:
        raise NotImplementedError

    async def drain(self) -> None:
        self.draining = True

    async def prepare(self, index: int, connector: PolicyConnector) -> None:
        await asyncio.sleep(0)
        if self.prepare_errors:
            raise self.prepare_errors.pop(0)
        self.prepared[index] = cast(FakeContainer, connector)

    async def replace(self, index: int) -> None:
        for _ in range(3):
            await asyncio.sleep(0)
        self.playing.pop(index, None)
        self.prepared[index] = None
        self.replaced.append(index)
        await asyncio.sleep(0)
        if self.replace_errors:
            raise self.replace_errors.pop(0)

    async def settle(self, finished: FinishedEpisode) -> Any:
        assert finished.run not in self.in_company, "a run in company was charged"
        self.settled.append(finished.run)
        return (await self.ledger.commit([finished]))[0]

    async def run(self, index: int, runs: list[EpisodeRun]) -> list[RunReport]:
        container = self.prepared[index]
        assert container is not None, "a new worker was not prepared"
        reports: list[RunReport] = []
        undecided = False
        for run in runs:
            if undecided or self.draining:
                reports.append(RunReport(run, RunKind.STOPPED, "not begun"))
                continue
            reports.append(await self._play(index, run, container))
            undecided = reports[-1].kind in UNDECIDED
        return reports

    async def _play(self, index: int, run: EpisodeRun, container: FakeContainer) -> RunReport:
        does = self._next(run.key)
        others = [other for worker, other in self.playing.items() if worker != index]
        assert run.key not in {other.key for other in others}, "an episode was played by two workers at once"
        if others:
            self.in_company.update([run, *others])
        self.playing[index] = run
        for _ in range(STEPS):
            for _ in range(self.turns()):
                await asyncio.sleep(0)
            if (report := self._trouble(run, container)) is not None:
                break
        else:
            # WorkerLost leaves the run in `playing`: its process may only be frozen.
            report = await self._end(run, does, container)
        del self.playing[index]
        return report

    def _next(self, key: EpisodeKey) -> Does:
        behaviours = self.script[key]
        does = behaviours[min(self.played[key], len(behaviours) - 1)]
        self.played[key] += 1
        return does

    def _trouble(self, run: EpisodeRun, container: FakeContainer) -> RunReport | None:
        """What the container does to all that run in it."""
        if container.end is not None or container.removed:
            return self._undecided(run, RunKind.POLICY_LOST, FaultClass.CONNECTION_LOST)
        if container.deaf:
            return self._undecided(run, RunKind.POLICY_LOST, FaultClass.STEP_TIMEOUT)
        if container.hung:
            return self._undecided(run, RunKind.POLICY_LATE, FaultClass.STEP_TIMEOUT)
        return None

    def _undecided(self, run: EpisodeRun, kind: RunKind, fault: FaultClass) -> RunReport:
        detail = f"step 0: {fault.value} in episode {run.episode_id}"
        return RunReport(run, kind, detail, failed(run, fault), place="step 0")

    async def _end(self, run: EpisodeRun, does: Does, container: FakeContainer) -> RunReport:
        in_company = run in self.in_company
        match does:
            case Does.WORKER_DIES:
                raise WorkerLost("killed")
            case Does.WORKER_DIES_AFTER_COMMIT:
                await self.ledger.commit([finished(run)])
                raise WorkerLost("killed")
            case Does.BROKEN_ENVIRONMENT:
                return RunReport(run, RunKind.ENVIRONMENT_ERROR, "Traceback: no display")
            case Does.STOPPED:
                return RunReport(run, RunKind.STOPPED, "stopped")
            case Does.UNACKNOWLEDGED:
                return RunReport(run, RunKind.FINISHED, finished=finished(run))
            case Does.STALE:
                return RunReport(run, RunKind.FINISHED, finished=finished(run), commit=CommitOutcome.STALE)
            case Does.RAISE:
                episode = failed(run, FaultClass.POLICY_EXCEPTION)
                [commit] = await self.ledger.commit([episode])
                return RunReport(run, RunKind.SUBMISSION_FAULT, finished=episode, commit=commit)
            case Does.SLOW:
                return self._undecided(run, RunKind.POLICY_LATE, FaultClass.EPISODE_TIMEOUT)
            case Does.LATE_IN_COMPANY if in_company:
                return self._undecided(run, RunKind.POLICY_LATE, FaultClass.STEP_TIMEOUT)
            case Does.RESET:
                return self._undecided(run, RunKind.POLICY_LOST, FaultClass.CONNECTION_LOST)
            case Does.CRASH:
                container.end = CRASHED
            case Does.CRASH_IN_COMPANY if in_company:
                container.end = CRASHED
            case Does.CONTAINER_GONE:
                container.end = GONE
            case Does.HANG:
                container.hung = True
            case Does.DEAF:
                container.deaf = True
        trouble = self._trouble(run, container)
        if trouble is not None:
            return trouble
        [commit] = await self.ledger.commit([finished(run)])
        return RunReport(run, RunKind.FINISHED, finished=finished(run), commit=commit)


class SimulatedJob:
    """A job whose episodes follow `script`, from 0 on: behaviours run by run, the last one for ever."""

    def __init__(
        self,
        script: Sequence[Sequence[Does] | Does],
        *,
        workers: int = 1,
        max_containers: int = 1000,
        seed: int | None = None,
        ledger: MemoryLedger | None = None,
    ) -> None:
        keys = [key(number) for number in range(len(script))]
        behaviours = [[each] if isinstance(each, Does) else each for each in script]
        chance = random.Random(seed)
        self.ledger = ledger or MemoryLedger(keys)
        self.policy = FakePolicySource()
        self.cluster = FakeCluster(
            workers,
            dict(zip(keys, behaviours, strict=True)),
            self.ledger,
            turns=(lambda: 1) if seed is None else (lambda: chance.randrange(5)),
            prepared=[self.policy.containers[0]] * workers,
        )
        self.board = EpisodeBoard(each for each in keys if each not in self.ledger.committed)
        self.left: list[int] = []
        self.pauses: list[float] = []
        self.rollouts = Rollouts(
            RolloutTools(a_claim(), self.ledger, self.cluster, self.policy, max_containers),
            self.board,
            self.policy.containers[0],
            self.left.append,
            self._pause,
        )

    async def _pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        await asyncio.sleep(0)

    async def run(self) -> dict[int, FaultClass | None]:
        """The outcomes' faults by episode number, once every episode has one."""
        async with asyncio.timeout(20):
            await self.rollouts.run()
        assert self.board.is_done
        return self.ledger.faults

    async def run_to_failure(self) -> SubmissionError | InfrastructureError:
        """The error that ends the job."""
        try:
            await self.run()
        except (SubmissionError, InfrastructureError) as error:
            return error
        raise AssertionError("the job completed")
