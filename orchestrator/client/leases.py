"""Keeps the jobs of a client alive for as long as the client itself is, and no longer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import asyncpg

from orchestrator.adapters.postgres.client_leases import renew
from orchestrator.adapters.postgres.pool import retrying
from orchestrator.logging import get_logger

log = get_logger()

AGAIN_SECONDS = 1.0


@asynccontextmanager
async def kept_alive(
    pool: asyncpg.Pool[asyncpg.Record], job_ids: Sequence[int], lease_seconds: float
) -> AsyncIterator[None]:
    """Renew the client leases of the jobs every third, for the block, however long Postgres is away."""
    renewing = asyncio.create_task(_renew_for_ever(pool, list(job_ids), lease_seconds))
    try:
        yield
    finally:
        renewing.cancel()
        await asyncio.wait({renewing})


async def _renew_for_ever(
    pool: asyncpg.Pool[asyncpg.Record], job_ids: Sequence[int], lease_seconds: float
) -> None:
    while True:
        try:
            await retrying(
                lambda: renew(pool, job_ids, lease_seconds),
                deadline_seconds=lease_seconds,
                what="renewing the client's lease",
            )
        except Exception as error:  # noqa: BLE001 - the top of a loop: without it the jobs are cancelled
            log.warning("client_lease_not_renewed", why=str(error) or type(error).__name__)
            await asyncio.sleep(AGAIN_SECONDS)
        else:
            await asyncio.sleep(lease_seconds / 3)
