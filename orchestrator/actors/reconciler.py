"""The reconciler: makes true what the tables say, every few seconds and at start, whatever died meanwhile."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

import structlog

from orchestrator.adapters.postgres.job_store import PostgresJobStore
from orchestrator.adapters.postgres.reconciliation import ReconciliationQueries
from orchestrator.domain.errors import OrchestratorError
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.ports import ClaimRefusal, Containers, UnheldResultBuilder

log = structlog.get_logger(__name__)


class Supervisors(Protocol):
    """The supervisors of this installation, one for each job."""

    async def ensure(self, job_id: int) -> ClaimRefusal | None:
        """Make sure that one exists and has claimed: None when it holds the job, else why it does not."""
        ...

    async def revive(self, job_id: int) -> None:
        """For a job whose lease lapsed: restart a frozen supervisor, or make sure that there is one."""
        ...


@dataclass(frozen=True)
class Reconciler:
    """One round is `reconcile`. One job a transaction; a failing step never keeps the others from running."""

    store: PostgresJobStore
    queries: ReconciliationQueries
    supervisors: Supervisors
    containers: Containers
    installation_id: UUID
    max_concurrent_jobs: int
    retention_seconds: float
    retention_rows: int
    unheld_result: UnheldResultBuilder

    async def reconcile(self) -> None:
        """Everything once, in the order of urgency."""
        for step in (
            self.end_overdue_jobs,
            self.cancel_for_silent_clients,
            self.revive_unsupervised_jobs,
            self.start_forgotten_jobs,
            self.remove_orphaned_containers,
            self.prune,
        ):
            try:
                await step()
            except (OrchestratorError, OSError, TimeoutError) as error:
                log.warning("reconciler_step_failed", step=step.__name__, why=str(error))

    async def end_overdue_jobs(self) -> None:
        for overdue in await self.queries.overdue():
            status = JobStatus.CANCELLED if overdue.cancelled else JobStatus.TIMEOUT
            if await self.store.finish_unheld(overdue.job_id, status, overdue.reason, self.unheld_result):
                log.info("job_ended_by_reconciler", job_id=overdue.job_id, status=status.value)

    async def cancel_for_silent_clients(self) -> None:
        for job_id in await self.queries.expired_clients():
            await self.store.request_cancel(job_id, "its client has gone away")
            log.info("job_cancelled_by_reconciler", job_id=job_id)

    async def revive_unsupervised_jobs(self) -> None:
        jobs = await self.queries.unsupervised()
        for job_id in jobs:
            log.info("job_revived_by_reconciler", job_id=job_id)
        await asyncio.gather(*(self.supervisors.revive(job_id) for job_id in jobs))

    async def start_forgotten_jobs(self) -> None:
        free = self.max_concurrent_jobs - await self.store.held_count()
        if free <= 0:
            return
        for job_id in await self.queries.queued_without_row(free):
            log.info("job_started_by_reconciler", job_id=job_id)
            await self.supervisors.ensure(job_id)

    async def remove_orphaned_containers(self) -> None:
        """Whatever carries our label and is not the current container of a held job."""
        for owned in await self.containers.list_owned(self.installation_id):
            if owned.expired or await self.store.mark_unclaimed_removing(owned.container_id):
                log.info("container_removed_by_reconciler", container_id=str(owned.container_id))
                await self.containers.remove(owned.handle)
                await self.store.forget_container(owned.container_id)
        here = {owned.container_id for owned in await self.containers.list_owned(self.installation_id)}
        for container_id in await self.queries.containers_being_removed():
            if container_id not in here:
                await self.store.forget_container(container_id)

    async def prune(self) -> None:
        pruned = await self.queries.prune(
            age_seconds=self.retention_seconds, rows_per_queue=self.retention_rows
        )
        if pruned:
            log.info("queue_rows_pruned", rows=pruned)
