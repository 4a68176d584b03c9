"""One job from claim to result, as a plain class: the JobSupervisor actor is a thin wrapper round it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol, TypeVar
from uuid import UUID

import structlog

from orchestrator.actors.episode_board import EpisodeBoard
from orchestrator.actors.episode_runner import RunReport
from orchestrator.actors.rollouts import Rollouts, RolloutTools
from orchestrator.actors.submission_container import PolicySource
from orchestrator.domain.episodes import (
    EpisodeOutcome,
    EpisodeRun,
    FinishedEpisode,
    PlannedEpisode,
    open_secret,
    plan_episodes,
)
from orchestrator.domain.errors import (
    Fenced,
    HandedOver,
    InfrastructureError,
    OrchestratorError,
    SubmissionError,
    UsageError,
)
from orchestrator.domain.lifecycle import TIME_IS_OVER, JobStatus
from orchestrator.domain.messages import EvalResultMessage, OutOfBounds
from orchestrator.domain.results import build_result
from orchestrator.ports import (
    BenchmarkDescription,
    Claim,
    ClaimRefusal,
    JobStore,
    Ledger,
    PolicyConnector,
    RenewedLease,
)

log = structlog.get_logger(__name__)
T = TypeVar("T")

# How often cancel flag and deadline are looked at, between renewals.
WATCH_SECONDS = 1.0
CLEAN_UP_SECONDS = 60.0
MAX_PLANNED_EPISODES = 1_000_000


class CannotRun(InfrastructureError):
    """The job can never run here (it asks for more than there is): FAILED at once, saying so."""


class CancelRequested(OrchestratorError):
    """Somebody asked for the job to be cancelled."""


class DeadlinePassed(OrchestratorError):
    """The job's deadline is over."""


class LeaseLapsed(OrchestratorError):
    """The lease could not be renewed in time: another incarnation may claim, so this one stops."""


class Cluster(Protocol):
    """The rollout workers of one job. Indices name workers; a replaced worker keeps its index."""

    @property
    def size(self) -> int: ...

    async def start(self, waiting: Callable[[str], Awaitable[None]]) -> None: ...

    async def describe(self) -> BenchmarkDescription: ...

    async def prepare(self, index: int, connector: PolicyConnector) -> None: ...

    async def run(self, index: int, runs: list[EpisodeRun]) -> list[RunReport]: ...

    async def replace(self, index: int) -> None:
        """A new worker in the place of a lost one, whose process is dead even if this raises WorkerLost."""
        ...

    async def settle(self, finished: FinishedEpisode) -> Any: ...

    async def drain(self) -> None:
        """Have every worker begin no other episode than the one in hand."""
        ...

    async def stop(self) -> None: ...


@dataclass(frozen=True)
class SupervisionParts:
    """Everything that a supervision works with."""

    store: JobStore
    ledger: Ledger
    cluster: Callable[[Claim], Cluster]
    policy: Callable[[Claim], PolicySource]
    seed_secret: bytes = field(repr=False)
    validator_hotkey: str
    lease_seconds: float
    max_containers: int
    out_of_bounds_actions: OutOfBounds = "clip"  # unless the job says


@dataclass
class JobSupervision:
    """Holds one job for one incarnation. `decided` tells the consumer what the claim gave."""

    parts: SupervisionParts
    job_id: int
    holder: UUID
    started_at: float  # on the monotonic clock: when this process began
    decided: asyncio.Future[ClaimRefusal | None] = field(init=False)
    progress: str = field(default="claims", init=False)
    _evaluation: Evaluation | None = field(default=None, init=False)
    _renewed_at: float = field(default=0.0, init=False)  # on the monotonic clock, before the question

    def __post_init__(self) -> None:
        self.decided = asyncio.get_running_loop().create_future()

    async def run(self) -> JobStatus | None:
        """Claim, evaluate, finish and clean up; the final status, or None where the job is not ours.

        Raises:
            InfrastructureError: the claim itself was not possible; nothing is held.
        """
        if time.monotonic() - self.started_at > self.parts.lease_seconds / 3:
            # An old process that comes back late must not claim under the lease of its own restarted self.
            raise InfrastructureError(f"job {self.job_id}: too late to claim, this process is too old")
        self._renewed_at = time.monotonic()
        claim = await self.parts.store.claim(self.job_id, self.holder)
        if isinstance(claim, ClaimRefusal):
            self.decided.set_result(claim)
            log.info("claim_refused", job_id=self.job_id, why=claim.value)
            return None
        self.decided.set_result(None)
        log.info("job_claimed", job_id=self.job_id, epoch=claim.epoch)
        evaluation = self._evaluation = Evaluation(self.parts, claim, self._note)
        try:
            status, error = await self._until_the_end(evaluation, claim)
            return await self._holding(claim, self._finish(evaluation, claim, status, error), flags=False)
        except (Fenced, LeaseLapsed) as error:
            # Ours are the workers; container and result belong to whoever claims next.
            log.warning("job_given_up", job_id=self.job_id, epoch=claim.epoch, why=str(error))
            return None
        except HandedOver as error:
            log.info("job_handed_over", job_id=self.job_id, epoch=claim.epoch, why=str(error))
            await self._release(claim, None)
            return None
        except asyncio.CancelledError:
            await asyncio.shield(self._release(claim, None))
            raise
        except Exception as error:
            log.exception("job_interrupted", job_id=self.job_id, epoch=claim.epoch)
            await self._release(claim, error)
            return None
        finally:
            await asyncio.shield(asyncio.wait_for(evaluation.stop_workers(), CLEAN_UP_SECONDS))

    def _note(self, progress: str) -> None:
        self.progress = progress

    async def drain(self) -> bool:
        """Begin no episode any more; whether some are under way, whose end `run` waits for and then returns.

        With none under way there is nothing to wait for: cancel `run`.
        """
        return self._evaluation is not None and await self._evaluation.drain()

    async def report_missing(self, container_id: UUID) -> None:
        """Look at the container, which somebody did not find; where it is gone, the next run gets another."""
        log.warning("container_reported_missing", job_id=self.job_id, container_id=str(container_id))
        if self._evaluation is not None:
            await self._evaluation.look_at_container()

    async def _until_the_end(self, evaluation: Evaluation, claim: Claim) -> tuple[JobStatus, str | None]:
        """The final status and its reason; Fenced, LeaseLapsed and what is ours to retry are raised."""
        try:
            await self._holding(claim, evaluation.run(), flags=True)
            return JobStatus.COMPLETED, None
        except CancelRequested as error:
            return JobStatus.CANCELLED, str(error)
        except DeadlinePassed as error:
            return JobStatus.TIMEOUT, str(error)
        except (SubmissionError, UsageError, CannotRun) as error:
            evaluation.keep_failure(error)
            return JobStatus.FAILED, str(error)

    async def _holding(self, claim: Claim, work: Coroutine[Any, Any, T], *, flags: bool) -> T:
        """Do the work under the lease; with `flags`, until cancel flag or deadline end it.

        The lease is kept until the work has really ended, also where it ends by being cancelled. Without the
        lease nothing is waited for: the workers have to stop.
        """
        flag: asyncio.Future[OrchestratorError] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(work)
        keeper = asyncio.create_task(self._keep_lease(claim, flag))
        try:
            ends: set[asyncio.Future[Any]] = {task, keeper, flag} if flags else {task, keeper}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            # Of two that end in the same moment a raised flag counts; but the result, once stored, ends the
            # lease itself.
            if flags and flag.done():
                raise flag.result()
            if keeper.done() and (flags or not task.done()):
                keeper.result()  # raises: a lease is kept until something ends it
            return task.result()
        finally:
            for each in (task, keeper):
                each.add_done_callback(_seen)  # what matters was raised above
            task.cancel()
            await asyncio.wait({task}, timeout=WATCH_SECONDS if keeper.done() else CLEAN_UP_SECONDS)
            keeper.cancel()

    async def _keep_lease(self, claim: Claim, flag: asyncio.Future[OrchestratorError]) -> NoReturn:
        """Renew every third of the lease, and set `flag` once cancel flag or deadline end the job.

        Raises:
            Fenced, LeaseLapsed: the lease is somebody else's, or may be by now.
        """
        lease_seconds = self.parts.lease_seconds
        pause_seconds = min(WATCH_SECONDS, lease_seconds / 6)
        while True:
            await asyncio.sleep(pause_seconds)
            asked_at = time.monotonic()
            left = self._renewed_at + lease_seconds - asked_at
            due = left <= lease_seconds * 2 / 3
            call = self.parts.store.renew if due else self.parts.store.watch
            try:
                # After a stall the lease may have lapsed unnoticed, by us and by others: one short try.
                lease = await _in_time(call(claim), max(min(lease_seconds / 3, left), pause_seconds))
            except Fenced:
                raise
            except Exception as error:
                if time.monotonic() >= self._renewed_at + lease_seconds:
                    raise LeaseLapsed(f"job {self.job_id}: no renewal in {lease_seconds:g} s") from error
                log.warning("lease_not_renewed", job_id=self.job_id, why=str(error) or type(error).__name__)
                continue
            if due:
                self._renewed_at = asked_at
            ended = _ended_by(lease)
            if ended is not None and not flag.done():
                flag.set_result(ended)

    async def _finish(
        self, evaluation: Evaluation, claim: Claim, status: JobStatus, error: str | None
    ) -> JobStatus:
        # Not `wait_for`, which in Python 3.11 forgets a cancellation where its work has just ended.
        async with asyncio.timeout(CLEAN_UP_SECONDS):
            await evaluation.stop_workers()
        logs = await evaluation.read_logs()

        def build(outcomes: Sequence[EpisodeOutcome], planned: int) -> EvalResultMessage:
            return evaluation.result(status, outcomes, planned, logs=logs, error=error)

        if status is not JobStatus.COMPLETED:
            logged = log.bind(job_id=self.job_id)
            logged.warning("job_ends_early", status=status.value, why=error)
        await evaluation.remove_container()
        await self._persist(lambda: self.parts.store.finish(claim, status, build))
        log.info("job_finished", job_id=self.job_id, status=status.value, epoch=claim.epoch)
        return status

    async def _persist(self, write: Callable[[], Awaitable[Any]]) -> None:
        """A write that must not be lost to a restart of Postgres: tried for as long as a lease."""
        until = time.monotonic() + self.parts.lease_seconds
        pause_seconds = 0.1
        while True:
            try:
                await write()
                return
            except (Fenced, AssertionError, ValueError):
                raise
            except Exception as error:
                if time.monotonic() > until:
                    raise LeaseLapsed(f"job {self.job_id}: the result could not be stored") from error
                log.warning("result_not_stored_yet", job_id=self.job_id, why=str(error))
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, 2.0)

    async def _release(self, claim: Claim, error: Exception | None) -> None:
        try:
            why = None if error is None else f"{type(error).__name__}: {error}"
            await asyncio.wait_for(self.parts.store.release(claim, why), self.parts.lease_seconds / 3)
        except Exception as failure:  # noqa: BLE001 - the lease lapses by itself
            log.warning("lease_not_released", job_id=self.job_id, why=str(failure))


def _ended_by(lease: RenewedLease) -> OrchestratorError | None:
    if lease.cancel_requested:
        return CancelRequested(lease.cancel_reason or "cancelled on request")
    if lease.deadline_seconds_left is not None and lease.deadline_seconds_left <= 0:
        return DeadlinePassed(TIME_IS_OVER)
    return None


async def _in_time(work: Coroutine[Any, Any, T], seconds: float) -> T:
    """The result of `work`; TimeoutError after that time, and not later.

    `asyncio.wait_for` would wait until the cancelled work has ended: on a dead connection its rollback takes
    as long as the connection's own deadline.
    """
    task = asyncio.create_task(work)
    task.add_done_callback(_seen)
    try:
        await asyncio.wait({task}, timeout=seconds)
        if not task.done():
            raise TimeoutError
        return task.result()
    finally:
        task.cancel()


def _seen(task: asyncio.Task[Any]) -> None:
    """Keeps asyncio from complaining of the error of a task that nobody waits for any more."""
    if not task.cancelled():
        task.exception()


class Evaluation:
    """What a claimed job goes through, and what is left of it to clean up."""

    def __init__(self, parts: SupervisionParts, claim: Claim, note: Callable[[str], None]) -> None:
        self._parts = parts
        self._claim = claim
        self._note = note
        self._message = claim.job.message
        self._made_cluster: Cluster | None = None
        self._made_policy: PolicySource | None = None
        self._description: BenchmarkDescription | None = None
        self._rollouts: Rollouts | None = None
        self._kept_log = ""
        self._failure: str | None = None

    @property
    def _cluster(self) -> Cluster:
        if self._made_cluster is None:
            self._made_cluster = self._parts.cluster(self._claim)
        return self._made_cluster

    @property
    def _policy(self) -> PolicySource:
        if self._made_policy is None:
            self._made_policy = self._parts.policy(self._claim)
        return self._made_policy

    async def run(self) -> None:
        """Returns when every planned episode has an outcome.

        Raises:
            SubmissionError, UsageError, CannotRun: the job FAILED, with the reason.
            InfrastructureError: ours; to be taken up again.
        """
        policy = self._policy  # refuses an address that may not be dialled, before anything is asked for
        await self._say("waits for its workers")
        await self._cluster.start(self._say)
        self._description = await self._cluster.describe()
        # A million seeds take seconds, in which the lease would not be renewed.
        plan = await asyncio.to_thread(self._plan, self._description)
        await self._parts.ledger.store_plan(self._claim, plan)
        missing = await self._parts.ledger.missing(self._claim.job.job_id)
        if not missing:
            return
        await self._say("starts the submission")
        connector = await policy.start(self._claim, self._say)
        # Not a TaskGroup: the first error decides as it is, and the others end with the workers.
        await asyncio.gather(
            *(self._cluster.prepare(index, connector) for index in range(self._cluster.size))
        )
        await self._parts.store.set_status(self._claim, JobStatus.RUNNING, f"{len(missing)} episodes to run")
        self._rollouts = Rollouts(
            RolloutTools(self._claim, self._parts.ledger, self._cluster, policy, self._parts.max_containers),
            EpisodeBoard(episode.key for episode in missing),
            connector,
            lambda left: self._note(f"{left} episodes left"),
        )
        await self._rollouts.run()

    async def drain(self) -> bool:
        """Let what is under way come to its end; whether there is anything."""
        if self._rollouts is None:
            return False
        await self._rollouts.drain()
        return True

    async def look_at_container(self) -> None:
        """Find out whether the container is there still; before the first run whoever waits for it does."""
        if self._rollouts is not None:
            await self._rollouts.look_at_container()

    def _plan(self, description: BenchmarkDescription) -> list[PlannedEpisode]:
        config = self._message.job_config
        episodes = (
            self._message.episodes_per_task
            or config.episodes_per_task
            or description.default_episodes_per_task
        )
        if episodes * len(description.task_ids) > MAX_PLANNED_EPISODES:
            raise UsageError(
                f"{len(description.task_ids)} tasks of {episodes} episodes are more than the "
                f"{MAX_PLANNED_EPISODES} that one job may have: split it"
            )
        secret = self._parts.seed_secret if config.seed is None else open_secret(config.seed)
        group = self._message.effective_seed_group
        return plan_episodes(description.task_ids, episodes, secret=secret, seed_group=group)

    async def _say(self, detail: str) -> None:
        self._note(detail)
        await self._parts.store.set_status(self._claim, JobStatus.STARTING, detail)

    def keep_failure(self, error: SubmissionError | UsageError | CannotRun) -> None:
        """Whose fault a FAILED job is, and the log of a container that may be gone by then."""
        if isinstance(error, SubmissionError):
            self._kept_log = error.log_tail or self._kept_log
            self._failure = "submission"
        else:
            self._failure = "job" if isinstance(error, UsageError) else "infrastructure"

    async def read_logs(self) -> str:
        if self._made_policy is None:
            return self._kept_log
        try:
            return await self._made_policy.logs() or self._kept_log
        except OrchestratorError as error:
            log.warning("log_not_read", job_id=self._message.job_id, why=str(error))
            return self._kept_log

    async def stop_workers(self) -> None:
        if self._made_cluster is not None:
            await self._made_cluster.stop()

    async def remove_container(self) -> None:
        """Remove what is ours still; a container that could not be removed is the reconciler's."""
        try:
            policy = self._policy
        except (SubmissionError, UsageError):
            return  # refused before there could be a container
        try:
            async with asyncio.timeout(CLEAN_UP_SECONDS):  # the result does not wait for an API server
                await policy.remove(self._claim)
        except Fenced:
            raise
        except Exception as error:  # noqa: BLE001 - the verdict that was reached counts more
            log.warning("container_left_to_reconciler", job_id=self._message.job_id, why=str(error))

    def result(
        self,
        status: JobStatus,
        outcomes: Sequence[EpisodeOutcome],
        planned: int,
        *,
        logs: str,
        error: str | None,
    ) -> EvalResultMessage:
        """The result as the ledger gives it."""
        description = self._description
        return build_result(
            self._message,
            status,
            outcomes,
            planned,
            validator_hotkey=self._parts.validator_hotkey,
            versions=description.versions if description else None,
            env_specs=description.env_specs if description else None,
            success_rule=description.success_rule if description else None,
            logs=logs or None,
            error=error,
            extra={
                "epochs": self._claim.epoch,
                "out_of_bounds_actions": self._message.job_config.out_of_bounds_actions
                or self._parts.out_of_bounds_actions,
            }
            | ({"failure": self._failure} if status is JobStatus.FAILED else {}),
        )
