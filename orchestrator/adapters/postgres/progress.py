"""How jobs stand, read for people who wait."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg

from orchestrator.domain.lifecycle import JobStatus


@dataclass(frozen=True, slots=True)
class ProgressRow:
    """Status and counts of one job; `planned` is 0 before the plan is stored."""

    job_id: int
    status: JobStatus
    detail: str | None
    done: int
    planned: int
    successes: int


async def read_progress(pool: asyncpg.Pool[asyncpg.Record], job_ids: Sequence[int]) -> list[ProgressRow]:
    """A row for each job that exists, in the order asked for."""
    rows = await pool.fetch(
        """SELECT j.job_id, j.status, j.detail, count(e.job_id) AS planned,
               count(*) FILTER (WHERE e.finished) AS done, count(*) FILTER (WHERE e.success) AS successes
           FROM jobs j LEFT JOIN episodes e USING (job_id)
           WHERE j.job_id = ANY($1) GROUP BY j.job_id""",
        list(job_ids),
    )
    found = {
        row["job_id"]: ProgressRow(
            row["job_id"],
            JobStatus(row["status"]),
            row["detail"],
            row["done"],
            row["planned"],
            row["successes"],
        )
        for row in rows
    }
    return [found[job_id] for job_id in job_ids if job_id in found]


async def unfinished_artifacts(pool: asyncpg.Pool[asyncpg.Record]) -> set[str]:
    """The archive URLs of the local jobs that have not ended: others may not name files of this machine."""
    rows = await pool.fetch(
        "SELECT message FROM jobs WHERE local AND status IN ('QUEUED', 'STARTING', 'RUNNING')"
    )
    # Not read in SQL: `->>` refuses a text that holds \u0000, and so one job would spoil it for all.
    urls = (json.loads(row["message"]).get("artifact_url") for row in rows)
    return {url for url in urls if url is not None}
