"""Brings a database to this version's schema: pgqueuer's tables and ours, in one go, under one lock."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING, TypeAlias

import asyncpg
from pgqueuer.adapters.drivers.asyncpg import AsyncpgDriver
from pgqueuer.adapters.persistence.queries import Queries

from orchestrator.adapters.postgres.pool import open_connection
from orchestrator.domain.errors import InfrastructureError, SchemaMismatch

if TYPE_CHECKING:
    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record]
    Pool: TypeAlias = asyncpg.Pool[asyncpg.Record]

# Any number will do, as long as it is not a job_id: those are keys of the same kind of lock.
_ADVISORY_KEY = -7_071_551_240_036_193_013
_LOCK_WAIT_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Migration:
    """One numbered SQL file, applied once and in one transaction."""

    version: int
    name: str
    sql: str = field(repr=False)


def _load_migrations() -> tuple[Migration, ...]:
    folder = resources.files("orchestrator.adapters.postgres") / "migrations"
    found = []
    for file in folder.iterdir():
        if match := re.fullmatch(r"(\d{4})_\w+\.sql", file.name):
            name = file.name.removesuffix(".sql")
            found.append(Migration(int(match[1]), name, file.read_text(encoding="utf-8")))
    return tuple(sorted(found, key=lambda migration: migration.version))


MIGRATIONS = _load_migrations()
SCHEMA_VERSION = MIGRATIONS[-1].version


async def migrate(target: str | Connection) -> list[str]:
    """Apply what is missing, in order; what was applied, for people. Safe to call at once from many places.

    Raises:
        SchemaMismatch: the database has a newer schema; nothing was changed.
        InfrastructureError: the database cannot be reached, or somebody else migrates for too long.
    """
    if isinstance(target, str):
        async with open_connection(target) as connection:
            return await migrate(connection)
    async with _migration_lock(target):
        found = await _applied_versions(target)
        if max(found, default=0) > SCHEMA_VERSION:
            raise SchemaMismatch(max(found), SCHEMA_VERSION)
        # pgqueuer first: our own migrations may refer to its tables.
        done = await _migrate_pgqueuer(target)
        await _create_version_table(target)
        for migration in MIGRATIONS:
            if migration.version not in found:
                await _apply(target, migration)
                done.append(migration.name)
        return done


async def check_schema(database: Connection | Pool) -> None:
    """Return silently if the database has exactly this version's schema.

    Raises:
        SchemaMismatch: it is older (0: never migrated) or newer.
    """
    found = await schema_version(database)
    if found != SCHEMA_VERSION:
        raise SchemaMismatch(found, SCHEMA_VERSION)


async def schema_version(database: Connection | Pool) -> int:
    """The version of our schema that the database has; 0 where it was never migrated."""
    return max(await _applied_versions(database), default=0)


@contextlib.asynccontextmanager
async def _migration_lock(connection: Connection) -> AsyncIterator[None]:
    try:
        await connection.execute(f"SELECT pg_advisory_lock({_ADVISORY_KEY})", timeout=_LOCK_WAIT_SECONDS)
    except (TimeoutError, asyncpg.LockNotAvailableError) as error:
        raise InfrastructureError(
            "another process has been migrating this database for too long; try again when it is done"
        ) from error
    try:
        yield
    finally:
        # A connection that broke has lost the lock already.
        if not connection.is_closed():
            await connection.execute(f"SELECT pg_advisory_unlock({_ADVISORY_KEY})")


async def _applied_versions(database: Connection | Pool) -> set[int]:
    if not await database.fetchval("SELECT to_regclass('schema_migrations') IS NOT NULL"):
        return set()
    return {row["version"] for row in await database.fetch("SELECT version FROM schema_migrations")}


async def _migrate_pgqueuer(connection: Connection) -> list[str]:
    queries = Queries(AsyncpgDriver(connection))
    if not await queries.schema_is_installed():
        async with connection.transaction():
            await queries.install()
        return ["pgqueuer: installed"]
    # Statements of an upgrade cannot share a transaction (new enum labels); each one is safe to find done.
    plan = await queries.apply_upgrade()
    return [f"pgqueuer: upgraded ({len(plan.statements)} statements)"] if plan.statements else []


async def _create_version_table(connection: Connection) -> None:
    await connection.execute(
        """
        CREATE TABLE IF NOT EXISTS schema_migrations (
            version    integer PRIMARY KEY,
            name       text NOT NULL,
            applied_at timestamptz NOT NULL DEFAULT clock_timestamp()
        )
        """
    )


async def _apply(connection: Connection, migration: Migration) -> None:
    async with connection.transaction():
        await connection.execute(migration.sql)
        await connection.execute(
            "INSERT INTO schema_migrations (version, name) VALUES ($1, $2)", migration.version, migration.name
        )
