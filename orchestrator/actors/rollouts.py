"""The episodes of a running job: handed to workers, and each report turned into an outcome or another run."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from orchestrator.actors.episode_board import EpisodeBoard
from orchestrator.actors.episode_logger import with_fault
from orchestrator.actors.episode_runner import UNDECIDED, RunKind, RunReport
from orchestrator.actors.submission_container import PolicySource
from orchestrator.domain.episodes import CommitOutcome, EpisodeKey, FaultClass
from orchestrator.domain.errors import InfrastructureError, SubmissionError
from orchestrator.ports import Claim, Ledger, PolicyConnector, Verdict

if TYPE_CHECKING:
    from orchestrator.actors.job_supervision import Cluster

log = structlog.get_logger(__name__)

# Episodes handed over at once: enough that a short episode does not wait for a round trip through us.
MAX_RUNS_AT_ONCE = 8
# Our own faults in a row, without any outcome in between, before the job is given back.
MAX_FRUITLESS_FAULTS = 5
MAX_PAUSE_SECONDS = 5.0


class WorkerLost(InfrastructureError):
    """A rollout worker died or does not answer; its unfinished episodes run again elsewhere."""


@dataclass(frozen=True)
class RolloutTools:
    """What the rollouts of a job work with."""

    claim: Claim
    ledger: Ledger
    cluster: Cluster
    policy: PolicySource
    max_containers: int


class Rollouts:
    """Runs every episode of the board to an outcome."""

    def __init__(
        self,
        tools: RolloutTools,
        board: EpisodeBoard,
        connector: PolicyConnector,
        note: Callable[[int], None],
    ) -> None:
        self._tools = tools
        self._board = board
        self._connector = connector
        self._note = note
        self._changed = asyncio.Condition()
        self._container = 1  # counts the containers of this incarnation
        self._connected_to = [1] * tools.cluster.size
        self._replacing = asyncio.Lock()
        self._fruitless_faults = 0

    async def run(self) -> None:
        """Returns when the board is done.

        Raises:
            SubmissionError: the submission ended more often than `max_containers` allows.
            InfrastructureError: too many faults of ours without any progress.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for index in range(self._tools.cluster.size):
                    group.create_task(self._feed(index))
        except* (SubmissionError, InfrastructureError) as errors:
            raise _first(errors) from None

    async def _feed(self, index: int) -> None:
        """Keep one worker busy until nothing is left that it could do."""
        while (keys := await self._take(index)) is not None:
            again: list[EpisodeKey] = []
            alone: list[EpisodeKey] = []
            try:
                reports = await self._run(index, keys)
                again = [key for key in keys if key not in {report.run.key for report in reports}]
                again = await self._without_outcome(again)
                for report in reports:
                    await self._digest(index, report, again, alone)
            except WorkerLost as error:
                log.warning("worker_lost", job_id=self._tools.claim.job.job_id, worker=index, why=str(error))
                again = await self._without_outcome(keys)
                await self._count_fault(str(error))
                await self._tools.cluster.replace(index)
                self._connected_to[index] = 0
            await self._land(index, again, alone)

    async def _take(self, index: int) -> list[EpisodeKey] | None:
        async with self._changed:
            while not self._board.is_done:
                share = -(-self._board.unfinished // (2 * self._tools.cluster.size))
                keys = self._board.take(index, max(1, min(MAX_RUNS_AT_ONCE, share)))
                if keys:
                    return keys
                await self._changed.wait()
            return None

    async def _land(self, index: int, again: Sequence[EpisodeKey], alone: Sequence[EpisodeKey]) -> None:
        async with self._changed:
            self._board.landed(index, again=again, alone=alone)
            self._note(self._board.unfinished)
            self._changed.notify_all()

    async def _run(self, index: int, keys: Sequence[EpisodeKey]) -> list[RunReport]:
        if self._connected_to[index] != self._container:
            container = self._container
            await self._tools.cluster.prepare(index, self._connector)
            self._connected_to[index] = container
        runs = await self._tools.ledger.assign(self._tools.claim, keys)
        return await self._tools.cluster.run(index, runs) if runs else []

    async def _without_outcome(self, keys: Sequence[EpisodeKey]) -> list[EpisodeKey]:
        """Those of the episodes that the ledger still misses: the others were committed before the loss."""
        if not keys:
            return []
        missing = {episode.key for episode in await self._tools.ledger.missing(self._tools.claim.job.job_id)}
        return [key for key in keys if key in missing]

    async def _digest(
        self, index: int, report: RunReport, again: list[EpisodeKey], alone: list[EpisodeKey]
    ) -> None:
        key = report.run.key
        if report.kind in UNDECIDED:
            await self._judge(index, report, again, alone)
        elif report.kind is RunKind.ENVIRONMENT_ERROR:
            log.warning("environment_failed", job_id=report.run.job_id, task=key.task_id, why=report.detail)
            await self._count_fault(f"the environment of {key.task_id} failed: {report.detail}")
            again.append(key)
        elif report.kind is RunKind.STOPPED or report.commit is CommitOutcome.STALE:
            again.extend(await self._without_outcome([key]))
        else:
            self._fruitless_faults = 0

    async def _judge(
        self, index: int, report: RunReport, again: list[EpisodeKey], alone: list[EpisodeKey]
    ) -> None:
        """A connection was lost, or a reply did not come: the container's evidence decides what it was."""
        key = report.run.key
        lone = self._board.ran_alone(key)
        container = self._connected_to[index]
        async with self._replacing:
            if container != self._container:
                # Another worker's report has ended this container; this episode was in flight with it.
                alone.append(key)
                return
            evidence = await self._tools.policy.evidence()
            log.info(
                "connection_judged",
                job_id=report.run.job_id,
                task=key.task_id,
                episode=key.episode_id,
                kind=report.kind.value,
                evidence=evidence.reason,
                alone=lone,
            )
            if evidence.verdict is Verdict.INFRASTRUCTURE:
                await self._count_fault(f"the container ended: {evidence.reason}")
                again.append(key)
                await self._fresh_container(evidence.reason, charged=False)
                return
            first_loss = (
                evidence.running and report.kind is RunKind.POLICY_LOST and not self._board.losses[key]
            )
            if not lone or first_loss:
                alone.append(key)
            else:
                await self._charge(report, evidence.fault, evidence.reason)
            if not evidence.running or report.kind is RunKind.POLICY_LATE:
                # A policy that hangs may hang for the next episode too.
                await self._fresh_container(evidence.reason, charged=True)

    async def _charge(self, report: RunReport, fault: FaultClass | None, reason: str) -> None:
        finished = report.finished
        assert finished is not None
        if fault is not None:
            detail = f"{report.detail}; the container: {reason}"
            finished = with_fault(finished, fault, detail)
        await self._tools.cluster.settle(finished)
        self._fruitless_faults = 0

    async def _fresh_container(self, reason: str, *, charged: bool) -> None:
        if charged and self._container >= self._tools.max_containers:
            raise SubmissionError(
                f"the submission ended or hung in {self._container} containers, the limit; last: {reason}",
                await self._tools.policy.logs(),
            )
        self._connector = await self._tools.policy.replace(self._tools.claim)
        self._container += 1

    async def _count_fault(self, reason: str) -> None:
        self._fruitless_faults += 1
        if self._fruitless_faults > MAX_FRUITLESS_FAULTS:
            raise InfrastructureError(f"{self._fruitless_faults} faults without progress; last: {reason}")
        await asyncio.sleep(
            min(MAX_PAUSE_SECONDS, 0.1 * 2**self._fruitless_faults) * random.uniform(0.5, 1.0)  # noqa: S311
        )


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first leaf: its siblings are the echo of one cause."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
