"""The reconciler: makes true what the tables say, every few seconds and at start, whatever died meanwhile."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar
from uuid import UUID

import structlog

from orchestrator.actors.measurements import InstallationFigures
from orchestrator.adapters.postgres.client_leases import CLIENT_GONE
from orchestrator.adapters.postgres.job_store import PostgresJobStore
from orchestrator.adapters.postgres.reconciliation import Overdue, ReconciliationQueries
from orchestrator.adapters.postgres.retention import Retention, RetentionRules
from orchestrator.domain.errors import OrchestratorError
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.metrics import RECONCILER_ACTIONS, Meter, NoMeter, ReconcilerAction
from orchestrator.ports import ClaimRefusal, Containers, OwnedContainer, UnheldResultBuilder

log = structlog.get_logger(__name__)

# The queries of a step and what it waits for; none of them may keep the next step from its turn.
STEP_SECONDS = 60.0
# A round waits this long for what may be slow (Ray, containers); the rest goes on beside the next rounds.
PATIENCE_SECONDS = 10.0
SLOW_ITEM_SECONDS = 600.0
CLOSE_SECONDS = 5.0
# A supervisor stops its workers after the result is stored, for as long as a minute.
SUPERVISOR_GRACE_SECONDS = 90.0
# A lease that lapsed while Postgres was away is no silence yet: its client gets this long to come back, too.
CLIENT_GRACE_SECONDS = 10.0

PRUNE_EVERY_SECONDS = 60.0
PRUNE_SECONDS = 20.0

# Removals block threads, which calls to Ray need too.
REMOVALS_AT_ONCE = 3
REMOVAL_SECONDS = 60.0

# What says all by its message; the rest is logged with its traceback.
FORESEEN = (OrchestratorError, OSError)

Key = TypeVar("Key", int, UUID)  # of a job, of a container


class Supervisors(Protocol):
    """The supervisors of this installation, one for each job."""

    async def ensure(self, job_id: int) -> ClaimRefusal | None:
        """Make sure that one exists and has claimed: None when it holds the job, else why it does not."""
        ...

    async def revive(self, job_id: int) -> None:
        """For a job whose lease lapsed: restart a frozen supervisor, or make sure that there is one."""
        ...

    async def report_missing(self, job_id: int, container_id: UUID) -> None:
        """Tell the supervisor of a job that this container of it is not there any more; none is fine."""
        ...

    async def jobs(self) -> list[int]:
        """The jobs that have a supervisor now, in whatever state it is."""
        ...

    async def end(self, job_id: int) -> None:
        """End the supervisor of a job that is over, also a frozen one; none is fine."""
        ...


@dataclass
class _Pace:
    """Lets something happen at most once in so many seconds, and at once for the first time."""

    seconds: float
    last_at: float | None = None

    def is_due(self) -> bool:
        now = time.monotonic()
        if self.last_at is not None and now - self.last_at < self.seconds:
            return False
        self.last_at = now
        return True


@dataclass(frozen=True)
class Reconciler:
    """One round is `reconcile`. A failing step keeps no other from running, a failing item no other item.

    What may be slow runs in tasks of the reconciler: one at a time for each job or container, each with a
    deadline. `close` ends them.
    """

    store: PostgresJobStore
    queries: ReconciliationQueries
    supervisors: Supervisors
    containers: Containers
    installation_id: UUID
    max_concurrent_jobs: int
    retention: Retention
    retention_rules: RetentionRules
    unheld_result: UnheldResultBuilder
    lists_every_container: bool = False  # not only those of the machine that this runs on
    client_is_dead: Callable[[str], bool] = lambda _: False
    client_grace_seconds: float = CLIENT_GRACE_SECONDS
    patience_seconds: float = PATIENCE_SECONDS
    figures: InstallationFigures | None = None
    meter: Meter = field(default_factory=NoMeter, repr=False)
    _prune_pace: _Pace = field(default_factory=lambda: _Pace(PRUNE_EVERY_SECONDS), init=False, repr=False)
    _slow: dict[tuple[str, int | UUID], asyncio.Task[None]] = field(
        default_factory=dict, init=False, repr=False
    )
    _missing: set[UUID] = field(default_factory=set, init=False, repr=False)
    _silent_since: dict[int, float] = field(default_factory=dict, init=False, repr=False)
    _removals: asyncio.Semaphore = field(
        default_factory=lambda: asyncio.Semaphore(REMOVALS_AT_ONCE), init=False, repr=False
    )

    async def reconcile(self) -> None:
        """Everything once, in the order of urgency."""
        for step in (
            self.queries.note_pass,
            self.cancel_for_silent_clients,
            self.end_overdue_jobs,
            self.revive_unsupervised_jobs,
            self.start_forgotten_jobs,
            self.end_finished_supervisors,
            self.remove_orphaned_containers,
            self.prune,
            self.measure,
        ):
            try:
                async with asyncio.timeout(STEP_SECONDS):
                    await step()
            except Exception as error:  # noqa: BLE001 - the top of a loop
                self._count(ReconcilerAction.FAILED)
                _warn("reconciler_step_failed", error, step=step.__name__)

    async def close(self) -> None:
        """Cancel what still runs beside the rounds."""
        tasks = list(self._slow.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_SECONDS)

    # ---------------------------------------------------------------------------------------- steps

    async def end_overdue_jobs(self) -> None:
        """Deadlines and cancel flags of jobs that no supervisor holds."""
        for overdue in await self.queries.overdue():
            await _alone("end_overdue_job", overdue.job_id, self._end_overdue_job(overdue))

    async def cancel_for_silent_clients(self) -> None:
        """Cancel the jobs whose client is dead, or let its lease lapse and does not come back."""
        followed = await self.queries.followed_jobs()
        now = time.monotonic()
        silent = {job.job_id: self._silent_since.get(job.job_id, now) for job in followed if job.lapsed}
        self._silent_since.clear()
        self._silent_since.update(silent)
        for job in followed:
            gave_up = job.lapsed and now - silent[job.job_id] >= self.client_grace_seconds
            if gave_up or self.client_is_dead(job.client):
                await _alone(
                    "cancel_for_silent_client", job.job_id, self._cancel_for_silent_client(job.job_id)
                )

    async def revive_unsupervised_jobs(self) -> None:
        """Give every held job without a live lease a supervisor."""
        await self._beside("revive_job", await self.queries.unsupervised(), self._revive_job)

    async def start_forgotten_jobs(self) -> None:
        """Start QUEUED jobs that have no `add_job` row, by priority, within capacity."""
        free = self.max_concurrent_jobs - await self.store.held_count()
        if free > 0:
            await self._beside(
                "start_job", await self.queries.queued_without_row(free), self._start_forgotten_job
            )

    async def end_finished_supervisors(self) -> None:
        """A supervisor ends itself when its job is over: one that is still there later is frozen."""
        supervised = await self.supervisors.jobs()
        over = await self.queries.over(supervised, grace_seconds=SUPERVISOR_GRACE_SECONDS)
        await self._beside("end_supervisor", over, self._end_supervisor)

    async def remove_orphaned_containers(self) -> None:
        """Whatever carries our label and is not the current container of a held job; and the other way round:
        what should be there and is not is reported to its supervisor."""
        # Read first: a removal that begins after this is not taken for one that has ended.
        being_removed = await self.queries.containers_being_removed()
        expected = await self.queries.current_containers() if self.lists_every_container else {}
        owned = {each.container_id: each for each in await self.containers.list_owned(self.installation_id)}
        for container_id in being_removed:
            if container_id not in owned:
                await _alone("forget_container", container_id, self.store.forget_container(container_id))
        await self._beside("remove_container", owned, lambda key: self._remove_unless_claimed(owned[key]))
        # Twice in a row: one list may be of the past.
        missing = expected.keys() - owned.keys()
        again = missing & self._missing
        self._missing.clear()
        self._missing.update(missing)
        await self._beside("report_missing", again, lambda key: self._report_missing(expected[key], key))

    async def prune(self) -> None:
        """Bound what nobody consumes, every now and then: it looks through whole queues."""
        if not self._prune_pace.is_due():
            return
        pruned = await self.retention.prune(self.retention_rules, patience_seconds=PRUNE_SECONDS)
        if any(pruned.values()):
            log.info("rows_pruned", **{what.value: rows for what, rows in pruned.items() if rows})

    async def measure(self) -> None:
        """Export how the installation stands."""
        if self.figures is not None:
            await self.figures.measure()

    def _count(self, action: ReconcilerAction) -> None:
        self.meter.add(RECONCILER_ACTIONS, action=action.value)

    # ---------------------------------------------------------------------------------------- items

    async def _end_overdue_job(self, overdue: Overdue) -> None:
        status = JobStatus.CANCELLED if overdue.cancelled else JobStatus.TIMEOUT
        if await self.store.finish_unheld(overdue.job_id, status, overdue.reason, self.unheld_result):
            self._count(ReconcilerAction.JOB_ENDED)
            log.info("job_ended_by_reconciler", job_id=overdue.job_id, status=status.value)

    async def _cancel_for_silent_client(self, job_id: int) -> None:
        await self.store.request_cancel(job_id, CLIENT_GONE)
        self._count(ReconcilerAction.JOB_CANCELLED)
        log.info("job_cancelled_by_reconciler", job_id=job_id)

    async def _revive_job(self, job_id: int) -> None:
        self._count(ReconcilerAction.JOB_REVIVED)
        log.info("job_revived_by_reconciler", job_id=job_id)
        await self.supervisors.revive(job_id)

    async def _start_forgotten_job(self, job_id: int) -> None:
        self._count(ReconcilerAction.JOB_STARTED)
        log.info("job_started_by_reconciler", job_id=job_id)
        await self.supervisors.ensure(job_id)

    async def _end_supervisor(self, job_id: int) -> None:
        self._count(ReconcilerAction.SUPERVISOR_ENDED)
        log.warning("finished_supervisor_is_still_there", job_id=job_id)
        await self.supervisors.end(job_id)

    async def _remove_unless_claimed(self, owned: OwnedContainer) -> None:
        unclaimed = await self.store.mark_unclaimed_removing(owned.container_id)
        if not unclaimed and not owned.expired:
            return
        async with self._removals, asyncio.timeout(REMOVAL_SECONDS):
            self._count(ReconcilerAction.CONTAINER_REMOVED)
            log.info("container_removed_by_reconciler", container_id=str(owned.container_id))
            await self.containers.remove(owned.handle)
        await self.store.forget_container(owned.container_id)

    async def _report_missing(self, job_id: int, container_id: UUID) -> None:
        self._count(ReconcilerAction.CONTAINER_MISSING)
        log.warning("container_is_missing", job_id=job_id, container_id=str(container_id))
        await self.supervisors.report_missing(job_id, container_id)

    # ----------------------------------------------------------------------------------- slow items

    async def _beside(
        self, what: str, keys: Iterable[Key], operation: Callable[[Key], Coroutine[Any, Any, None]]
    ) -> None:
        """Begin `operation` for every key that it does not run for yet, and wait for all for a while."""
        waiting = []
        for key in keys:
            if (what, key) in self._slow:
                continue
            task = asyncio.create_task(_bounded(what, key, operation(key)))
            self._slow[what, key] = task
            task.add_done_callback(functools.partial(self._forget, what, key))
            waiting.append(task)
        if waiting:
            _, unfinished = await asyncio.wait(waiting, timeout=self.patience_seconds)
            if unfinished:
                log.warning("reconciler_goes_on", what=what, unfinished=len(unfinished))

    def _forget(self, what: str, key: int | UUID, _: asyncio.Task[None]) -> None:
        del self._slow[what, key]


async def _bounded(what: str, key: int | UUID, operation: Awaitable[None]) -> None:
    async def within_time() -> None:
        async with asyncio.timeout(SLOW_ITEM_SECONDS):
            await operation

    await _alone(what, key, within_time())


async def _alone(what: str, key: int | UUID, operation: Awaitable[None]) -> None:
    """Let a failure stay with its item: the next round comes back to it, and the others go on."""
    try:
        await operation
    except Exception as error:  # noqa: BLE001 - the top of a loop
        name = "container_id" if isinstance(key, UUID) else "job_id"
        _warn("reconciler_item_failed", error, what=what, **{name: str(key)})


def _warn(event: str, error: Exception, **fields: str) -> None:
    why = str(error) or type(error).__name__
    log.warning(event, why=why, exc_info=not isinstance(error, FORESEEN), **fields)
