"""What the reconciler asks of the tables: jobs without a supervisor, jobs without a queue row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from uuid import UUID

import asyncpg
from pgqueuer.domain.settings import db_settings

from orchestrator.adapters.postgres.client_leases import FollowedJob, followed_jobs
from orchestrator.adapters.postgres.installation import note_consumer
from orchestrator.domain.lifecycle import TIME_IS_OVER
from orchestrator.domain.messages import QUEUE_ADD_JOB

# A job row and its queue row may be committed a moment apart by a validator that does both.
SETTLING = timedelta(seconds=5)


@dataclass(frozen=True, slots=True)
class Overdue:
    """An unfinished job without a live lease that has to end."""

    job_id: int
    cancelled: bool
    reason: str


@dataclass(frozen=True)
class ReconciliationQueries:
    """Read-only, but for the note that the reconciler was here."""

    pool: asyncpg.Pool[asyncpg.Record] = field(repr=False)

    async def note_pass(self) -> None:
        """Note that all jobs have been gone over just now: `/readyz` looks at it."""
        await note_consumer(self.pool)

    async def unsupervised(self) -> list[int]:
        """STARTING and RUNNING jobs whose lease has lapsed, by priority."""
        rows = await self.pool.fetch(
            """SELECT job_id FROM jobs WHERE status IN ('STARTING', 'RUNNING')
                 AND coalesce(lease_expires_at, '-infinity') <= clock_timestamp()
               ORDER BY priority DESC, job_id"""
        )
        return [row["job_id"] for row in rows]

    async def queued_without_row(self, limit: int) -> list[int]:
        """QUEUED jobs that no add_job row will bring to a consumer, by priority."""
        rows = await self.pool.fetch(
            f"""SELECT j.job_id FROM jobs j
                WHERE j.status = 'QUEUED' AND j.created_at < clock_timestamp() - $2::interval
                  AND NOT EXISTS (SELECT FROM {db_settings().qualified.queue_table} q
                      WHERE q.entrypoint = $3 AND q.status IN ('queued', 'picked')
                        AND orchestrator_payload_job_id(q.payload) = j.job_id)
                ORDER BY j.priority DESC, j.job_id LIMIT $1""",  # noqa: S608 - a name of pgqueuer's settings
            limit,
            SETTLING,
            QUEUE_ADD_JOB,
        )
        return [row["job_id"] for row in rows]

    async def overdue(self) -> list[Overdue]:
        """Jobs without a live lease that were cancelled, or whose deadline has passed."""
        rows = await self.pool.fetch(
            """SELECT job_id, cancel_requested_at IS NOT NULL AS cancelled,
                   coalesce(cancel_reason, $1) AS reason
               FROM jobs
               WHERE status IN ('QUEUED', 'STARTING', 'RUNNING')
                 AND coalesce(lease_expires_at, '-infinity') <= clock_timestamp()
                 AND (cancel_requested_at IS NOT NULL OR
                      (deadline_at <= clock_timestamp() AND status <> 'QUEUED'))
               ORDER BY job_id""",
            TIME_IS_OVER,
        )
        return [Overdue(row["job_id"], row["cancelled"], row["reason"]) for row in rows]

    async def followed_jobs(self) -> list[FollowedJob]:
        """The unfinished jobs that end with their client."""
        return await followed_jobs(self.pool)

    async def containers_being_removed(self) -> list[UUID]:
        """Containers whose removal began but was not seen to end."""
        rows = await self.pool.fetch("SELECT container_id FROM containers WHERE removing")
        return [row["container_id"] for row in rows]

    async def current_containers(self) -> dict[UUID, int]:
        """The containers that held jobs work with, and the job of each: they should be there."""
        rows = await self.pool.fetch(
            """SELECT c.container_id, j.job_id
               FROM jobs j JOIN containers c ON c.container_id = j.container_id
               WHERE j.status IN ('STARTING', 'RUNNING') AND c.handle IS NOT NULL AND NOT c.removing"""
        )
        return {row["container_id"]: row["job_id"] for row in rows}

    async def over(self, job_ids: Sequence[int], *, grace_seconds: float) -> list[int]:
        """Those of the jobs that ended longer than the grace ago, or that there is no row of."""
        rows = await self.pool.fetch(
            """SELECT asked.job_id FROM unnest($1::bigint[]) AS asked (job_id) LEFT JOIN jobs j USING (job_id)
               WHERE j.job_id IS NULL OR j.finished_at < clock_timestamp() - $2::interval
               ORDER BY asked.job_id""",
            job_ids,
            timedelta(seconds=grace_seconds),
        )
        return [row["job_id"] for row in rows]
