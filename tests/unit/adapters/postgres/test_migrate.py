"""Migrations on real databases: once, in order, together with pgqueuer's tables."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import asyncpg
import pytest
from pgqueuer.adapters.drivers.asyncpg import AsyncpgPoolDriver
from pgqueuer.adapters.persistence.queries import Queries

from orchestrator.adapters import postgres
from orchestrator.adapters.postgres.migrate import MIGRATIONS, SCHEMA_VERSION, check_schema, migrate
from orchestrator.adapters.postgres.pool import Database, open_connection
from orchestrator.domain.errors import SchemaMismatch


async def test_a_migrated_database_passes_the_check_and_has_one_installation(pool):
    await check_schema(pool)

    assert await pool.fetchval("SELECT count(*) FROM installation") == 1
    assert await Queries(AsyncpgPoolDriver(pool)).queue_size() == []


async def test_each_test_database_is_an_installation_of_its_own(pool, migrated_template: Database):
    ours = await pool.fetchrow("SELECT installation_id, secret FROM installation")

    async with open_connection(migrated_template.dsn) as connection:
        template = await connection.fetchrow("SELECT installation_id, secret FROM installation")

    assert ours["installation_id"] != template["installation_id"]
    assert ours["secret"] != template["secret"]


async def test_migrating_twice_changes_nothing_the_second_time(database: Database, pool):
    before = await pool.fetch("SELECT * FROM schema_migrations")

    assert await migrate(database.dsn) == []

    assert await pool.fetch("SELECT * FROM schema_migrations") == before


async def test_an_unmigrated_database_is_version_zero(empty_database: Database):
    async with open_connection(empty_database.dsn) as connection:
        with pytest.raises(SchemaMismatch) as caught:
            await check_schema(connection)

    assert (caught.value.found, caught.value.expected) == (0, SCHEMA_VERSION)


async def test_migrations_that_start_at_once_apply_everything_once(empty_database: Database):
    reports = await asyncio.gather(*(migrate(empty_database.dsn) for _ in range(3)))

    assert sorted(reports, key=len) == [
        [],
        [],
        ["pgqueuer: installed", *(migration.name for migration in MIGRATIONS)],
    ]


async def apply_a_later_one(pool, works_with: int | None) -> None:
    """A migration of the future, as its own code notes it; one of before that column notes None."""
    await pool.execute(
        "INSERT INTO schema_migrations (version, name, works_with) VALUES ($1, 'future', $2)",
        SCHEMA_VERSION + 1,
        works_with,
    )


async def test_a_newer_schema_that_only_adds_is_good_for_this_code_and_left_alone(database: Database, pool):
    await apply_a_later_one(pool, works_with=SCHEMA_VERSION)

    await check_schema(pool)

    assert await migrate(database.dsn) == []


async def test_a_newer_schema_that_needs_its_own_code_is_refused(database: Database, pool):
    await apply_a_later_one(pool, works_with=SCHEMA_VERSION + 1)

    with pytest.raises(SchemaMismatch, match="install the newer orchestrator"):
        await check_schema(pool)


async def test_a_schema_from_before_the_rule_needs_exactly_its_code(database: Database, pool):
    await pool.execute("ALTER TABLE schema_migrations DROP COLUMN works_with")

    await check_schema(pool)

    assert await migrate(database.dsn) == []


async def test_a_newer_schema_is_refused_and_left_alone(database: Database, pool):
    await apply_a_later_one(pool, works_with=None)
    await pool.execute("DELETE FROM schema_migrations WHERE version = $1", SCHEMA_VERSION)

    with pytest.raises(SchemaMismatch, match="install the newer orchestrator"):
        await migrate(database.dsn)
    with pytest.raises(SchemaMismatch):
        await check_schema(pool)

    assert await pool.fetchval("SELECT max(version) FROM schema_migrations") == SCHEMA_VERSION + 1


async def test_a_migration_that_fails_leaves_nothing_of_itself(empty_database: Database):
    async with open_connection(empty_database.dsn) as connection:
        # The first migration will fail on this name, after it has made other tables.
        await connection.execute("CREATE TABLE results ()")
        with pytest.raises(asyncpg.DuplicateTableError):
            await migrate(connection)
        left = await connection.fetchval("SELECT to_regclass('jobs')")
        await connection.execute("DROP TABLE results")

        # The same connection goes on: the lock was given back.
        assert MIGRATIONS[0].name in await migrate(connection)

    assert left is None


async def test_an_older_pgqueuer_schema_is_upgraded(database: Database, pool):
    await pool.execute("ALTER TABLE pgqueuer DROP COLUMN attempts CASCADE")

    [upgrade] = await migrate(database.dsn)

    assert upgrade.startswith("pgqueuer: upgraded")
    assert await pool.fetchval("SELECT count(*) FROM pgqueuer WHERE attempts > 0") == 0


def test_migrations_are_numbered_without_gaps():
    assert [migration.version for migration in MIGRATIONS] == list(range(1, SCHEMA_VERSION + 1))


def test_code_that_a_migration_shuts_out_is_not_let_in_by_a_later_one():
    allowed = [migration.works_with for migration in MIGRATIONS]

    assert allowed == sorted(allowed)
    assert all(migration.works_with <= migration.version for migration in MIGRATIONS)


def test_statements_name_their_columns():
    """A prepared statement with a star fails once where a migration adds a column to what it reads."""
    folder = Path(postgres.__file__).parent
    stars = re.compile(r"\b(?:SELECT|RETURNING)\s+(?:\w+\.)?\*|,\s*\w+\.\*", re.IGNORECASE)

    found = {file.name: stars.findall(file.read_text()) for file in folder.glob("*.py")}

    assert all(stars.findall(text) for text in ("SELECT * FROM jobs", "RETURNING j.*", "SELECT a, c.* FROM"))
    assert {name: stars_there for name, stars_there in found.items() if stars_there} == {}
