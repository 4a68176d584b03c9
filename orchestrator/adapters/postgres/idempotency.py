"""Which job a client's Idempotency-Key stands for, so that a request sent twice is one job."""

from __future__ import annotations

import hashlib
from uuid import UUID

import asyncpg

from orchestrator.domain.errors import KeyReused


async def reserve_job_id(
    pool: asyncpg.Pool[asyncpg.Record], token_id: UUID, key: str, request: bytes, job_id: int
) -> int:
    """The id of the job that the key stands for: `job_id` from now on, unless the key was used before.

    Raises:
        KeyReused: the key came with another request before.
    """
    key_sha256, request_sha256 = (hashlib.sha256(text).digest() for text in (key.encode(), request))
    async with pool.acquire() as connection, connection.transaction():
        inserted = await connection.fetchval(
            """INSERT INTO idempotency_keys (token_id, key_sha256, request_sha256, job_id)
               VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING RETURNING job_id""",
            token_id,
            key_sha256,
            request_sha256,
            job_id,
        )
        if inserted is not None:
            return job_id
        known = await connection.fetchrow(
            "SELECT request_sha256, job_id FROM idempotency_keys WHERE token_id = $1 AND key_sha256 = $2",
            token_id,
            key_sha256,
        )
    if known is None or known["request_sha256"] != request_sha256:
        raise KeyReused(key)
    return int(known["job_id"])
