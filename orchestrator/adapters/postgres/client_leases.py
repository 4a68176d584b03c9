"""Leases of clients on the jobs that they follow: renewed by them, enforced by the reconciler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import asyncpg

CLIENT_GONE = "its client has gone away"


@dataclass(frozen=True, slots=True)
class FollowedJob:
    """An unfinished job that ends with its client. `lapsed` by the database's clock."""

    job_id: int
    client: str
    lapsed: bool


async def followed_jobs(pool: asyncpg.Pool[asyncpg.Record]) -> list[FollowedJob]:
    """The unfinished jobs that have a client, but for those that are to be cancelled already."""
    rows = await pool.fetch(
        """SELECT job_id, coalesce(client, '') AS client,
               client_lease_expires_at <= clock_timestamp() AS lapsed
           FROM jobs WHERE status IN ('QUEUED', 'STARTING', 'RUNNING')
             AND client_lease_expires_at IS NOT NULL AND cancel_requested_at IS NULL
           ORDER BY job_id"""
    )
    return [FollowedJob(*row) for row in rows]


async def renew(pool: asyncpg.Pool[asyncpg.Record], job_ids: Sequence[int], lease_seconds: float) -> None:
    """Prolong the leases of the jobs that have one and have not ended."""
    await pool.execute(
        """UPDATE jobs SET client_lease_expires_at = clock_timestamp() + $2
           WHERE job_id = ANY($1) AND client_lease_expires_at IS NOT NULL
             AND status IN ('QUEUED', 'STARTING', 'RUNNING')""",
        list(job_ids),
        timedelta(seconds=lease_seconds),
    )
