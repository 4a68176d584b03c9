"""Figures of an installation, read off its tables: what waits, and what has ended since the last look."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Self, TypeAlias

import asyncpg
from pgqueuer.domain.settings import db_settings

from orchestrator.domain.lifecycle import JobStatus

if TYPE_CHECKING:
    Pool: TypeAlias = asyncpg.Pool[asyncpg.Record]

MOST_ROWS = 100_000
MOST_ENDED = 10_000


@dataclass(frozen=True, slots=True)
class EndedJob:
    """A job that has ended. `first_step_seconds` from its first claim; None where no episode has finished."""

    status: JobStatus
    first_step_seconds: float | None


@dataclass(frozen=True, slots=True)
class QueueFigures:
    """What waits in a queue; counted up to `MOST_ROWS`."""

    rows: int
    oldest_seconds: float


@dataclass
class Figures:
    """Each look costs some indexed reads, whatever the number of jobs and rows.

    `looked_at`: jobs that ended before are no news.
    """

    pool: Pool = field(repr=False)
    looked_at: datetime

    @classmethod
    async def from_now(cls, pool: Pool) -> Self:
        """Figures of what happens from now on."""
        return cls(pool, await pool.fetchval("SELECT clock_timestamp()"))

    async def unfinished_jobs(self) -> Mapping[JobStatus, int]:
        """How many jobs are in each status that is not final."""
        rows = await self.pool.fetch(
            """SELECT status, count(*) AS jobs FROM jobs
               WHERE status IN ('QUEUED', 'STARTING', 'RUNNING') GROUP BY status"""
        )
        found = {JobStatus(row["status"]): row["jobs"] for row in rows}
        return {status: found.get(status, 0) for status in JobStatus if not status.is_final}

    async def ended_jobs(self) -> list[EndedJob]:
        """The jobs that ended since the last call, at most `MOST_ENDED`."""
        rows = await self.pool.fetch(
            """SELECT j.finished_at, j.status,
                   extract(epoch FROM first.started_at - claim.claimed_at) AS seconds
               FROM jobs j
               LEFT JOIN claims claim ON claim.job_id = j.job_id AND claim.epoch = 1
               LEFT JOIN LATERAL (SELECT min(e.started_at) AS started_at FROM episodes e
                   WHERE e.job_id = j.job_id) first ON true
               WHERE j.finished_at > $1 ORDER BY j.finished_at LIMIT $2""",
            self.looked_at,
            MOST_ENDED,
        )
        if rows:
            self.looked_at = rows[-1]["finished_at"]
        return [
            EndedJob(JobStatus(row["status"]), None if row["seconds"] is None else float(row["seconds"]))
            for row in rows
        ]

    async def queue(self, name: str) -> QueueFigures:
        """What waits in a queue."""
        row = await self.pool.fetchrow(
            f"""SELECT count(*) AS rows, extract(epoch FROM clock_timestamp() - min(created)) AS seconds
                FROM (SELECT created FROM {db_settings().qualified.queue_table}
                      WHERE entrypoint = $1 AND status = 'queued' LIMIT $2) AS waiting""",  # noqa: S608
            name,
            MOST_ROWS,
        )
        assert row is not None
        return QueueFigures(row["rows"], float(row["seconds"] or 0.0))
