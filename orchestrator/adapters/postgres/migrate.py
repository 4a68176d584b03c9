"""Brings a database to this version's schema: pgqueuer's tables and ours, in one go, under one lock.

A migration that only adds says in its first line with which earlier code its schema works:
`-- Works with the code of schema 3.`; one that says nothing needs its own.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator, Mapping
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
    """One numbered SQL file, applied once and in one transaction.

    Code of schema `works_with`, or of a later one, can work with what it makes.
    """

    version: int
    name: str
    works_with: int
    sql: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Schema:
    """The version of our schema that a database has, 0 where it was never migrated."""

    version: int
    works_with: int  # the code of this schema, and of later ones

    @property
    def works_here(self) -> bool:
        """Whether this code can work with it."""
        return self.works_with <= SCHEMA_VERSION <= self.version


def _load_migrations() -> tuple[Migration, ...]:
    folder = resources.files("orchestrator.adapters.postgres") / "migrations"
    found = []
    for file in folder.iterdir():
        if match := re.fullmatch(r"(\d{4})_\w+\.sql", file.name):
            version, sql = int(match[1]), file.read_text(encoding="utf-8")
            works_with = re.match(r"-- Works with the code of schema (\d+)\.\n", sql)
            found.append(
                Migration(
                    version,
                    file.name.removesuffix(".sql"),
                    version if works_with is None else int(works_with[1]),
                    sql,
                )
            )
    return tuple(sorted(found, key=lambda migration: migration.version))


MIGRATIONS = _load_migrations()
SCHEMA_VERSION = MIGRATIONS[-1].version


async def migrate(target: str | Connection) -> list[str]:
    """Apply what is missing, in order; what was applied, for people. Safe to call at once from many places.

    A newer schema that this code can work with is left as it is.

    Raises:
        SchemaMismatch: the database has a newer schema that needs newer code; nothing was changed.
        InfrastructureError: the database cannot be reached, or somebody else migrates for too long.
    """
    if isinstance(target, str):
        async with open_connection(target) as connection:
            return await migrate(connection)
    async with _migration_lock(target):
        found = await _applied_versions(target)
        schema = _schema_of(found)
        if schema.works_with > SCHEMA_VERSION:
            raise SchemaMismatch(schema.version, SCHEMA_VERSION)
        if schema.version > SCHEMA_VERSION:
            return []
        # pgqueuer first: our own migrations may refer to its tables.
        done = await _migrate_pgqueuer(target)
        await _create_version_table(target)
        for migration in MIGRATIONS:
            if migration.version not in found:
                await _apply(target, migration)
                done.append(migration.name)
        return done


async def check_schema(database: Connection | Pool) -> None:
    """Return silently if this code can work with the database's schema.

    Raises:
        SchemaMismatch: it is older (0: never migrated), or newer and needs newer code.
    """
    found = await read_schema(database)
    if not found.works_here:
        raise SchemaMismatch(found.version, SCHEMA_VERSION)


async def read_schema(database: Connection | Pool) -> Schema:
    """What the database has of our schema."""
    return _schema_of(await _applied_versions(database))


def _schema_of(applied: Mapping[int, int]) -> Schema:
    return Schema(max(applied, default=0), max(applied.values(), default=0))


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


async def _applied_versions(database: Connection | Pool) -> dict[int, int]:
    """Each applied migration, and the code with which it works."""
    if not await database.fetchval("SELECT to_regclass('schema_migrations') IS NOT NULL"):
        return {}
    # As JSON, for the column is younger than the table.
    rows = await database.fetch(
        """SELECT version, coalesce((to_jsonb(m) ->> 'works_with')::integer, version) AS works_with
           FROM schema_migrations m"""
    )
    return {row["version"]: row["works_with"] for row in rows}


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
    await connection.execute("ALTER TABLE schema_migrations ADD COLUMN IF NOT EXISTS works_with integer")


async def _apply(connection: Connection, migration: Migration) -> None:
    async with connection.transaction():
        await connection.execute(migration.sql)
        await connection.execute(
            "INSERT INTO schema_migrations (version, name, works_with) VALUES ($1, $2, $3)",
            migration.version,
            migration.name,
            migration.works_with,
        )
