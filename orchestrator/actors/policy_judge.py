"""Whose fault a lost or late policy was, and which container the next run may use."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import structlog

from orchestrator.actors.episode_board import EpisodeBoard
from orchestrator.actors.episode_logger import with_fault
from orchestrator.actors.episode_runner import RunKind, RunReport
from orchestrator.actors.fruitless_faults import FruitlessFaults
from orchestrator.domain.episodes import CommitOutcome, FaultClass
from orchestrator.domain.errors import InfrastructureError, OrchestratorError, SubmissionError
from orchestrator.ports import Evidence, PolicyConnector, Verdict

if TYPE_CHECKING:
    from orchestrator.actors.rollouts import RolloutTools

log = structlog.get_logger(__name__)

# What is charged to an episode that ended or hung its container. An episode timeout is not among them: the
# policy may only be slow, and next to the time of such an episode that of a fresh container is nothing.
CONTAINER_FAULTS = frozenset(
    {
        FaultClass.CRASH,
        FaultClass.OUT_OF_MEMORY,
        FaultClass.OUT_OF_DISK,
        FaultClass.CONNECTION_LOST,
        FaultClass.STEP_TIMEOUT,
    }
)
END_OF_LOG_CHARS = 4000


class Ruling(Enum):
    """What is to become of an episode run whose policy was lost or late."""

    CHARGED = "charged"  # it is a failure now, and committed
    ALONE = "alone"  # it is repeated with nothing else in flight
    AGAIN = "again"  # it is repeated: the submission has no part in this
    OUR_FAULT = "our fault"  # as AGAIN, and the first to tell of that fault
    STALE = "stale"  # it was to be charged, but the run was void: the ledger knows


@dataclass(frozen=True, slots=True)
class Judgement:
    """A ruling, and the reason where it is OUR_FAULT."""

    ruling: Ruling
    reason: str = ""


class PolicyJudge:
    """Judges undecided runs by the container's evidence, one at a time, and replaces spent containers.

    A submission may end or hang its container in `max_containers` episodes: each of these is charged with one
    of CONTAINER_FAULTS, and the rest goes on in a fresh container. The job fails when one more would be
    charged. Only charges count: not a container that ended with several episodes in flight (they repeat
    alone), nor one that ended through a fault of ours. So whether a job completes depends on its episodes
    alone: not on their order, on the number of workers, or on restarts of the supervisor, since the charges
    are in the ledger.

    A spent container is replaced by whoever needs one next. So episodes that run in it still may end well,
    and after the last episode none is made.
    """

    def __init__(
        self, tools: RolloutTools, board: EpisodeBoard, connector: PolicyConnector, faults: FruitlessFaults
    ) -> None:
        """`connector` is that of container 1: containers are numbered within this incarnation."""
        self._tools = tools
        self._board = board
        self._connector = connector
        self._faults = faults
        self._lock = asyncio.Lock()
        self._container = 1
        self._spent = False  # the container is not to be used for another run
        self._blameless: set[int] = set()  # containers that ended through a fault of ours
        self._charged = 0
        self._shared_ends = 0  # containers that were spent with several episodes in flight

    async def recall(self) -> None:
        """Take over what was charged in earlier incarnations."""
        outcomes = await self._tools.ledger.outcomes(self._tools.claim.job.job_id)
        self._charged = sum(outcome.fault in CONTAINER_FAULTS for outcome in outcomes)

    async def usable_container(self) -> tuple[int, PolicyConnector]:
        """The number of a container that is not spent, and its connector; a fresh one if need be.

        Raises:
            SubmissionError: the submission does not come up any more.
            InfrastructureError: no fresh container could be made, several times.
        """
        async with self._lock:
            while self._spent:
                try:
                    self._connector = await self._tools.policy.replace(self._tools.claim)
                except InfrastructureError as error:
                    await self._faults.count(f"no fresh container: {error}")
                else:
                    self._container += 1
                    self._spent = False
            return self._container, self._connector

    async def look_at_container(self) -> None:
        """Where the container has ended by a fault of ours, that is known before a run is lost to it."""
        async with self._lock:
            if self._spent:
                return
            try:
                evidence = await self._tools.policy.evidence()
            except InfrastructureError as error:
                log.warning("container_not_looked_at", why=str(error))
                return
            if evidence.verdict is Verdict.INFRASTRUCTURE:
                self._spent = True
                self._blameless.add(self._container)

    async def judge(self, report: RunReport, container: int) -> Judgement:
        """What becomes of a POLICY_LOST or POLICY_LATE run in that container.

        Raises:
            SubmissionError: one more episode would be charged for its container than the limit allows.
            InfrastructureError: the charge could not be committed.
        """
        alone = self._board.ran_alone(report.run.key)
        async with self._lock:
            if container != self._container or self._spent:
                # Another worker's report has settled how it ended, with this episode in flight.
                return Judgement(Ruling.AGAIN if container in self._blameless else Ruling.ALONE)
            try:
                evidence = await self._tools.policy.evidence()
            except InfrastructureError as error:
                return Judgement(Ruling.OUR_FAULT, f"nothing is known of the container: {error}")
            ruling = await self._rule(report, evidence, alone=alone)
            log.info(
                "connection_judged",
                job_id=report.run.job_id,
                task=report.run.task_id,
                episode=report.run.episode_id,
                kind=report.kind.value,
                evidence=evidence.reason,
                alone=alone,
                ruling=ruling.value,
            )
            return Judgement(ruling, f"the container ended: {evidence.reason}")

    async def _rule(self, report: RunReport, evidence: Evidence, *, alone: bool) -> Ruling:
        # A policy that hangs may hang for the next episode, too. And what one of several episodes has done to
        # the policy must not be charged to another one that runs alone after it.
        self._spent = not evidence.running or report.kind is RunKind.POLICY_LATE or not alone
        if evidence.verdict is Verdict.INFRASTRUCTURE:
            self._blameless.add(self._container)
            return Ruling.OUR_FAULT
        if not alone:
            self._count_shared_end(report)
            return Ruling.ALONE
        if self._is_forgiven(report, evidence):
            return Ruling.ALONE
        return await self._charge(report, evidence)

    def _is_forgiven(self, report: RunReport, evidence: Evidence) -> bool:
        """A lone run that loses its connection to a healthy container: once, it may have been the network.

        It is repeated at once, in the same container: no other episode can come between the two.
        """
        if not evidence.running or report.kind is not RunKind.POLICY_LOST:
            return False
        self._board.healthy_losses[report.run.key] += 1
        return self._board.healthy_losses[report.run.key] == 1

    async def _charge(self, report: RunReport, evidence: Evidence) -> Ruling:
        finished = report.finished
        assert finished is not None
        assert finished.fault is not None
        fault, detail = finished.fault, report.detail
        if evidence.fault is not None:
            fault, detail = evidence.fault, f"{report.place}: the submission ended: {evidence.reason}"
        counts = fault in CONTAINER_FAULTS
        log_tail = await self._log_tail() if counts else ""
        if counts and self._charged >= self._tools.max_containers:
            key = report.run.key
            raise SubmissionError(
                f"the submission ended or hung in more than {self._tools.max_containers} episodes, the limit "
                f"of this installation; the last was episode {key.episode_id} of {key.task_id}, {detail}",
                log_tail,
            )
        finished = with_fault(finished, fault, detail + _end_of_log(log_tail))
        if await self._tools.cluster.settle(finished) is CommitOutcome.STALE:
            return Ruling.STALE
        if counts:
            self._charged += 1
            # Also where it runs: a policy that accepts no one any more would be charged for every episode.
            self._spent = True
        return Ruling.CHARGED

    def _count_shared_end(self, report: RunReport) -> None:
        """Charge nobody; but a policy that cannot stand company must not use up containers without end."""
        self._shared_ends += 1
        if self._shared_ends == self._tools.max_containers:
            log.warning("one_worker_at_a_time", job_id=report.run.job_id, containers=self._shared_ends)
            self._board.one_worker_at_a_time()

    async def _log_tail(self) -> str:
        try:
            return await self._tools.policy.logs()
        except OrchestratorError as error:
            log.warning("log_not_read", why=str(error))
            return ""


def _end_of_log(log_tail: str) -> str:
    """The last words of a container for the fault that ends it: its log goes with it."""
    end = log_tail.rstrip()
    if not end:
        return ""
    if len(end) > END_OF_LOG_CHARS:
        cut = end[-END_OF_LOG_CHARS:]
        end = cut.partition("\n")[2] or cut
    return f"\nthe end of its log:\n{end}"
