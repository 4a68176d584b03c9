"""Questions about a database for a person who looks for what is wrong. Nothing is written."""

from __future__ import annotations

import time
from dataclasses import dataclass
from uuid import UUID

from pgqueuer.domain.settings import db_settings

from orchestrator.adapters.postgres.fence import Connection
from orchestrator.adapters.postgres.queue import queue_of

TABLES = ("installation", "jobs", "claims", "containers", "episodes", "episode_parts", "results")
PRIVILEGES = ("SELECT", "INSERT", "UPDATE", "DELETE")


@dataclass(frozen=True, slots=True)
class ConnectionRoom:
    """Connections that the server takes, that are in use, and that it keeps for superusers."""

    allowed: int
    used: int
    reserved: int

    @property
    def left(self) -> int:
        return self.allowed - self.used - self.reserved


@dataclass(frozen=True, slots=True)
class UnfinishedJobs:
    """Jobs that have not ended. `abandoned` are STARTING or RUNNING, and their lease lapsed minutes ago."""

    queued: int
    held: int
    abandoned: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ClockSkew:
    """By how much the database's clock is ahead of ours; it may be wrong by `uncertainty_seconds`."""

    seconds: float
    uncertainty_seconds: float


async def installation_id(connection: Connection) -> UUID:
    """Whose containers are those of this database."""
    found: UUID = await connection.fetchval("SELECT installation_id FROM installation")
    return found


async def server_version(connection: Connection) -> str:
    """The server's version as it calls it, like `18.1`."""
    return str(await connection.fetchval("SHOW server_version"))


async def pgqueuer_state(connection: Connection) -> int | None:
    """How many statements pgqueuer's schema is behind; None where it is not installed."""
    queries = queue_of(connection)
    if not await queries.schema_is_installed():
        return None
    return len((await queries.plan_upgrade()).statements)


async def missing_privileges(connection: Connection) -> list[str]:
    """What the user may not do though we do it, like `UPDATE on jobs`; of the tables that there are."""
    names = db_settings().qualified
    rows = await connection.fetch(
        """SELECT privilege || ' on ' || name AS missing
           FROM unnest($1::text[]) WITH ORDINALITY AS tables (name, position),
                unnest($2::text[]) WITH ORDINALITY AS privileges (privilege, rank)
           WHERE to_regclass(name) IS NOT NULL
             AND NOT has_table_privilege(to_regclass(name)::oid, privilege)
           ORDER BY position, rank""",
        [*TABLES, names.queue_table, names.queue_table_log],
        list(PRIVILEGES),
    )
    return [row["missing"] for row in rows]


async def connection_room(connection: Connection) -> ConnectionRoom:
    """Of the whole server, not of the database alone."""
    row = await connection.fetchrow(
        """SELECT current_setting('max_connections')::int AS allowed,
               current_setting('superuser_reserved_connections')::int
                   + coalesce(current_setting('reserved_connections', true)::int, 0) AS reserved,
               (SELECT sum(numbackends) FROM pg_stat_database)::int AS used"""
    )
    assert row is not None
    return ConnectionRoom(row["allowed"], row["used"], row["reserved"])


async def clock_skew(connection: Connection) -> ClockSkew:
    """From the best of a few questions."""
    measured = [await _measured_skew(connection) for _ in range(3)]
    return min(measured, key=lambda skew: skew.uncertainty_seconds)


async def _measured_skew(connection: Connection) -> ClockSkew:
    began, asked_at = time.monotonic(), time.time()
    at = float(await connection.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8"))
    half = (time.monotonic() - began) / 2
    return ClockSkew(at - (asked_at + half), half)


async def held_rows(connection: Connection) -> dict[str, int]:
    """By entrypoint, the queue rows that were set aside because nobody could make sense of them."""
    rows = await connection.fetch(
        f"""SELECT entrypoint, count(*) AS held FROM {db_settings().qualified.queue_table}
            WHERE status = 'failed' GROUP BY entrypoint ORDER BY entrypoint"""  # noqa: S608 - pgqueuer's name
    )
    return {row["entrypoint"]: row["held"] for row in rows}


async def unfinished_jobs(connection: Connection, *, grace_seconds: float) -> UnfinishedJobs:
    """The jobs that have not ended; one without a lease for longer than the grace is abandoned."""
    row = await connection.fetchrow(
        """SELECT count(*) FILTER (WHERE status = 'QUEUED') AS queued,
               count(*) FILTER (WHERE status <> 'QUEUED') AS held,
               coalesce(array_agg(job_id ORDER BY job_id) FILTER (WHERE status <> 'QUEUED'
                   AND coalesce(lease_expires_at, '-infinity')
                       < clock_timestamp() - make_interval(secs => $1)), '{}') AS abandoned
           FROM jobs WHERE status IN ('QUEUED', 'STARTING', 'RUNNING')""",
        grace_seconds,
    )
    assert row is not None
    return UnfinishedJobs(row["queued"], row["held"], tuple(row["abandoned"]))
