"""Code that runs goes on while a later version's migration adds to its tables, and starts on what it made."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.adapters.postgres.migrate import SCHEMA_VERSION, check_schema
from orchestrator.adapters.postgres.pool import Database
from orchestrator.domain.lifecycle import JobStatus
from tests.in_process_plane import InProcessPlane, in_process_plane

CARTPOLE = Path(__file__).resolve().parents[2] / "examples" / "cartpole"

# Whatever a migration may do that says it works with the code before it, to every table of ours.
ADDITIONS = """
DO $$
DECLARE name text;
BEGIN
    FOR name IN SELECT tablename FROM pg_tables
        WHERE schemaname = current_schema() AND tablename NOT LIKE 'pgqueuer%'
    LOOP
        EXECUTE format('ALTER TABLE %I ADD COLUMN later text', name);
        EXECUTE format('ALTER TABLE %I ADD COLUMN later_number integer NOT NULL DEFAULT 7', name);
        EXECUTE format('CREATE INDEX ON %I (later)', name);
    END LOOP;
END $$;
CREATE TABLE of_later (job_id bigint REFERENCES jobs ON DELETE CASCADE, note text);
"""
NOTE = "INSERT INTO schema_migrations (version, name, works_with) VALUES ($1, 'later', $2)"


@pytest.fixture
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="orc-schema-") as directory:
        yield Path(directory)


async def add_to_the_schema(plane: InProcessPlane) -> None:
    """As the migration of a later version does, in one transaction."""
    async with plane.pool.acquire() as connection, connection.transaction():
        await connection.execute(ADDITIONS)
        await connection.execute(NOTE, SCHEMA_VERSION + 1, SCHEMA_VERSION)


@pytest.mark.timeout(300)
async def test_a_migration_that_adds_disturbs_no_job_and_the_code_before_it_starts_on_its_schema(
    database: Database, scratch: Path
) -> None:
    async with in_process_plane(database, scratch) as plane:
        jobs = plane.jobs(CARTPOLE, 1, config={"episodes_per_task": 200})
        await plane.submit(jobs)
        async with asyncio.timeout(120):
            while not await plane.pool.fetchval("SELECT count(*) > 5 FROM episodes WHERE finished"):
                await asyncio.sleep(0.02)
        await add_to_the_schema(plane)
        before = await plane.pool.fetchval("SELECT count(*) FROM episodes WHERE NOT finished")
        [under_way] = await plane.results(jobs, seconds=120)
        epoch = await plane.pool.fetchval("SELECT epoch FROM jobs")

    async with in_process_plane(database, scratch) as plane:
        await check_schema(plane.pool)
        jobs = plane.jobs(CARTPOLE, 1, first_id=2, config={"episodes_per_task": 2})
        await plane.submit(jobs)
        [afterwards] = await plane.results(jobs, seconds=120)

    assert before > 0
    assert (under_way.status, under_way.total_episodes, epoch) == (JobStatus.COMPLETED, 200, 1)
    assert (afterwards.status, afterwards.total_episodes) == (JobStatus.COMPLETED, 2)
