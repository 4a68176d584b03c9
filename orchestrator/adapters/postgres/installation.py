"""The one row that says whose containers, actors and secrets these are."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field
from uuid import UUID

import asyncpg

from orchestrator.adapters.postgres.fence import only_row


@dataclass(frozen=True, slots=True)
class Installation:
    """Identity and secret of one database; the generation names the actors of the newest code."""

    installation_id: UUID
    secret: bytes = field(repr=False)
    generation: int

    @property
    def namespace(self) -> str:
        """The Ray namespace of all its actors: two databases on one cluster never share an actor."""
        return f"orchestrator-{self.installation_id}"

    def session_key(self, container_id: UUID) -> bytes:
        """32 bytes that a container and our processes alone can know: HMAC-SHA256 (RFC 2104) of its uuid."""
        return hmac.new(self.secret, b"session\x1f" + container_id.bytes, hashlib.sha256).digest()

    def seed_secret(self) -> bytes:
        """The key of derived seeds, apart from that of sessions."""
        return hmac.new(self.secret, b"seeds", hashlib.sha256).digest()


async def take_generation(pool: asyncpg.Pool[asyncpg.Record], fingerprint: str) -> Installation:
    """The installation, with its generation raised if code or settings (the fingerprint) have changed."""
    async with pool.acquire() as connection, connection.transaction():
        row = only_row(
            await connection.fetchrow(
                "SELECT installation_id, secret, generation, fingerprint FROM installation FOR UPDATE"
            )
        )
        generation = row["generation"]
        if row["fingerprint"] != fingerprint:
            generation += 1
            await connection.execute(
                "UPDATE installation SET generation = $1, fingerprint = $2", generation, fingerprint
            )
    return Installation(row["installation_id"], row["secret"], generation)


async def current_installation(pool: asyncpg.Pool[asyncpg.Record]) -> Installation:
    """The installation as it stands; no generation is taken."""
    row = only_row(await pool.fetchrow("SELECT installation_id, secret, generation FROM installation"))
    return Installation(row["installation_id"], row["secret"], row["generation"])


async def note_consumer(pool: asyncpg.Pool[asyncpg.Record]) -> None:
    """Note that a consumer has gone over all jobs just now."""
    await pool.execute("UPDATE installation SET consumer_seen_at = clock_timestamp()")


async def consumer_silence_seconds(pool: asyncpg.Pool[asyncpg.Record]) -> float | None:
    """How long ago a consumer last went over all jobs, by the database's clock; None: never."""
    seconds = await pool.fetchval(
        "SELECT extract(epoch FROM clock_timestamp() - consumer_seen_at) FROM installation"
    )
    return None if seconds is None else float(seconds)


async def has_client(pool: asyncpg.Pool[asyncpg.Record], application_name: str) -> bool:
    """Whether a process of this name is connected to the pool's database now."""
    return bool(
        await pool.fetchval(
            """SELECT EXISTS (SELECT FROM pg_stat_activity
                   WHERE datname = current_database() AND application_name = $1)""",
            application_name,
        )
    )
