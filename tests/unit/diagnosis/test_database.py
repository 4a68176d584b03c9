"""Each check of a real Postgres, where it is content and where it is not."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from pgqueuer.adapters.persistence.queries import Queries

from orchestrator.adapters.postgres.clients import CONSUMER_APPLICATION
from orchestrator.adapters.postgres.pool import Database, open_pool
from orchestrator.diagnosis import database as checks
from orchestrator.diagnosis.database import diagnose_database
from orchestrator.diagnosis.findings import Diagnosis, Finding, State
from orchestrator.settings import load_settings
from tests.golden_texts import check_golden
from tests.job_fixtures import a_job, a_store, claimed

if TYPE_CHECKING:
    import asyncpg

    Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"


def check(case: str, finding: Finding, state: State = State.ATTENTION) -> None:
    """What a person reads of a finding, without what differs from server to server."""
    assert finding.state is state, finding
    text = f"{finding.what}\nto do: {finding.remedy}\n"
    text = re.sub(r"127\.0\.0\.1:\d+/\w+", "<database>", text)
    text = re.sub(r"\d+ of \d+ left", "<n> of <n> left", text)
    text = re.sub(r"works with \d+", "works with <n>", text)
    check_golden("doctor", case, re.sub(r"PostgreSQL [\d.]{2,}", "PostgreSQL <version>", text))


@pytest.fixture
async def empty_pool(empty_database: Database) -> AsyncIterator[Pool]:
    async with open_pool(empty_database, application_name="tests", max_size=2) as pool:
        yield pool


async def diagnosed(
    tmp_path: Path, *, embedded_is_clear: bool = True, **overrides: object
) -> dict[str, Diagnosis]:
    async with AsyncExitStack() as stack:
        settings = load_settings(**overrides)
        found, _ = await diagnose_database(settings, tmp_path, stack, embedded_is_clear=embedded_is_clear)
    return {one.name: one for one in found}


async def test_a_migrated_database_is_sound(database: Database, tmp_path: Path) -> None:
    found = await diagnosed(tmp_path, database_url=database.dsn)

    names = ["server program", "database", "clock", "schema", "permissions", "connections", "queue", "jobs"]
    assert list(found) == names
    assert {one.finding.state for one in found.values()} == {State.OK}, found
    assert found["jobs"].finding.what == "0 running, 0 queued"


async def test_a_database_that_refuses_the_password_is_said(
    postgres_server: Database, tmp_path: Path
) -> None:
    port = urlsplit(postgres_server.dsn).port
    url = f"postgresql://orchestrator:hunter2@127.0.0.1:{port}/orchestrator?sslmode=disable"

    found = await diagnosed(tmp_path, database_url=url)

    assert list(found) == ["server program", "database"]
    check("database_refuses", found["database"].finding, State.BROKEN)


async def test_a_database_that_is_away_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "CONNECT_SECONDS", 0.2)

    found = await diagnosed(tmp_path, database_url="postgresql://user:hunter2@127.0.0.1:1/db")

    check("database_away", found["database"].finding, State.BROKEN)


async def test_an_embedded_database_that_is_not_there_yet_is_not_made(tmp_path: Path) -> None:
    found = await diagnosed(tmp_path / "data", data_dir=tmp_path / "data")

    assert found["database"].finding.state is State.OK
    assert found["database"].finding.what.endswith("yet: the first command makes it")
    assert not (tmp_path / "data").exists()


async def test_an_embedded_database_with_leftovers_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "pgdata").mkdir()

    found = await diagnosed(tmp_path, embedded_is_clear=False)

    finding = found["database"].finding
    check(
        "database_with_leftovers",
        Finding.attention(finding.what.replace(str(tmp_path), "<data>"), finding.remedy),
    )
    assert list(tmp_path.iterdir()) == [tmp_path / "pgdata"]


def test_a_server_program_of_another_version_is_said(tmp_path: Path) -> None:
    assert checks.server_program(tmp_path, needed=True).state is State.OK
    finding = checks.server_program(tmp_path, needed=True, major=99)
    check(
        "server_program_wrong",
        Finding.broken(re.sub(r"\) [\d.]+", ") <version>", finding.what), finding.remedy),
        State.BROKEN,
    )


def test_a_server_program_that_is_missing_matters_only_where_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    check("server_program_missing", checks.server_program(tmp_path, needed=True), State.BROKEN)
    assert checks.server_program(tmp_path, needed=False).state is State.OK


async def test_clocks_that_do_not_agree_are_said(pool: Pool) -> None:
    finding = await checks.clock(pool, most_seconds=-10.0)

    text = re.sub(r"[\d.]+ s (ahead of|behind)", "<n> s ahead of", finding.what)
    check("clock", Finding.attention(text, finding.remedy))


async def test_a_schema_that_is_not_there_is_brought_up_by_migrate_or_by_itself(
    empty_pool: Pool, empty_database: Database, tmp_path: Path
) -> None:
    check("schema_missing", await checks.schema(empty_pool, embedded=False), State.BROKEN)
    assert (await checks.schema(empty_pool, embedded=True)).state is State.OK

    found = await diagnosed(tmp_path, database_url=empty_database.dsn)
    assert "queue" not in found  # there is no table to ask


async def test_a_schema_of_a_newer_orchestrator_is_said(pool: Pool) -> None:
    await pool.execute("INSERT INTO schema_migrations (version, name) VALUES (9999, 'later')")

    finding = await checks.schema(pool, embedded=True)

    check("schema_newer", finding, State.BROKEN)


async def test_tables_of_pgqueuer_that_are_missing_are_said(pool: Pool) -> None:
    await Queries.from_asyncpg_pool(pool).uninstall()

    finding = await checks.schema(pool, embedded=False)

    text = re.sub(r"version \d+", "version <n>", finding.what)
    check("schema_without_pgqueuer", Finding.broken(text, finding.remedy), State.BROKEN)


@pytest.fixture
async def limited_user(database: Database, pool: Pool) -> AsyncIterator[tuple[str, str]]:
    """A role without any right of its own, and the URL by which it connects."""
    role = f"limited_{uuid4().hex}"
    await pool.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'x'")
    url = urlsplit(database.dsn)
    try:
        yield role, url._replace(netloc=f"{role}:x@127.0.0.1:{url.port}").geturl()
    finally:
        await pool.execute(f"DROP OWNED BY {role}")
        await pool.execute(f"DROP ROLE {role}")


async def test_what_the_user_may_not_do_is_named(pool: Pool, limited_user: tuple[str, str]) -> None:
    role, url = limited_user
    await pool.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}")
    await pool.execute(f"REVOKE INSERT, UPDATE ON jobs FROM {role}")

    async with open_pool(Database(url), application_name="tests", max_size=1) as theirs:
        finding = await checks.permissions(theirs)

    check("permissions", finding, State.BROKEN)


async def test_a_user_without_any_right_ends_no_other_check(
    limited_user: tuple[str, str], tmp_path: Path
) -> None:
    _, url = limited_user

    found = await diagnosed(tmp_path, database_url=url)

    states = {name: one.finding.state for name, one in found.items()}
    assert (states["database"], states["clock"]) == (State.OK, State.OK)
    assert (states["schema"], states["permissions"]) == (State.BROKEN, State.BROKEN)
    assert "queue" not in found


async def test_too_few_connections_are_said_unless_a_control_plane_has_its_own(
    database: Database, pool: Pool
) -> None:
    check("connections", await checks.connections(pool, max_concurrent_jobs=1000))

    async with open_pool(database, application_name=CONSUMER_APPLICATION, max_size=1):
        assert (await checks.connections(pool, max_concurrent_jobs=1000)).state is State.OK


async def test_rows_that_are_held_are_counted(pool: Pool) -> None:
    queries = Queries.from_asyncpg_pool(pool)
    await queries.enqueue(["add_job", "add_job"], [b"not json", b"{}"], [0, 0])
    await pool.execute("UPDATE pgqueuer SET status = 'failed'")

    check("queue_held", await checks.queue(pool))


async def test_jobs_that_nobody_holds_are_named(database: Database, pool: Pool) -> None:
    store = a_store(pool)
    for job_id in range(1, 8):
        await claimed(a_store(pool, max_concurrent_jobs=100), job_id)
    await store.insert(a_job(9), enqueue=True)
    assert (await checks.jobs(pool)).what == "7 running, 1 queued, and no control plane"
    await pool.execute(
        "UPDATE jobs SET lease_expires_at = now() - interval '1 hour' WHERE status <> 'QUEUED'"
    )

    check("jobs_abandoned", await checks.jobs(pool))
    async with open_pool(database, application_name=CONSUMER_APPLICATION, max_size=1):
        check("jobs_not_taken_up", await checks.jobs(pool))


async def test_jobs_that_wait_for_a_control_plane_are_said(database: Database, pool: Pool) -> None:
    await a_store(pool).insert(a_job(1), enqueue=True)

    check("jobs_wait", await checks.jobs(pool))
    async with open_pool(database, application_name=CONSUMER_APPLICATION, max_size=1):
        assert await checks.jobs(pool) == Finding.ok("0 running, 1 queued")
