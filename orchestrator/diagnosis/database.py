"""Postgres: the embedded server's program, whether the database answers, and how it stands with it."""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import asyncpg

from orchestrator.adapters.postgres.clients import CONSUMER_APPLICATION, connections_needed
from orchestrator.adapters.postgres.embedded import embedded_postgres
from orchestrator.adapters.postgres.inspection import (
    clock_skew,
    connection_room,
    held_rows,
    missing_privileges,
    pgqueuer_state,
    server_version,
    unfinished_jobs,
)
from orchestrator.adapters.postgres.installation import has_client
from orchestrator.adapters.postgres.migrate import SCHEMA_VERSION, read_schema
from orchestrator.adapters.postgres.pool import Database, open_pool
from orchestrator.adapters.postgres.server_files import (
    POSTGRES_MAJOR,
    ServerFiles,
    installed_server,
    server_account,
)
from orchestrator.diagnosis.findings import DEADLINE_SECONDS, Check, Diagnosis, Finding, diagnose
from orchestrator.domain.errors import OrchestratorError
from orchestrator.domain.messages import QUEUE_ADD_JOB
from orchestrator.settings import Settings

if TYPE_CHECKING:
    Pool: TypeAlias = asyncpg.Pool[asyncpg.Record]

AREA = "Postgres"
LEAST_MAJOR = 13  # `gen_random_uuid` without an extension
OPEN_SECONDS = 90.0
CONNECT_SECONDS = 10.0
MOST_SKEW_SECONDS = 2.0
ABANDONED_SECONDS = 120.0
SHOWN_JOBS = 5


@dataclass(frozen=True, slots=True)
class OpenDatabase:
    """A database that answers, and whether it has our tables."""

    pool: Pool
    has_tables: bool


async def diagnose_database(
    settings: Settings, data_dir: Path, stack: AsyncExitStack, *, embedded_is_clear: bool
) -> tuple[list[Diagnosis], OpenDatabase | None]:
    """All findings, and the database until the stack unwinds; None where there is none to be had.

    An embedded server that is there is started or joined, but no data directory is made and nothing migrated.
    It is left alone unless `embedded_is_clear` of what a killed run left: its start would clear that away.
    """
    embedded = settings.database_url is None
    found = await diagnose(
        [Check(AREA, "server program", partial(server_program, data_dir, needed=embedded))]
    )
    opened = await _opened(settings, data_dir, stack, embedded_is_clear=embedded_is_clear)
    if isinstance(opened, Finding):
        return [*found, Diagnosis(AREA, "database", opened)], None
    pool, place = opened
    found += await diagnose(
        [
            Check(AREA, "database", partial(database, pool, place)),
            Check(AREA, "clock", partial(clock, pool)),
            Check(AREA, "schema", partial(schema, pool, embedded=embedded)),
            Check(AREA, "permissions", partial(permissions, pool)),
            Check(AREA, "connections", partial(connections, pool, settings.max_concurrent_jobs)),
        ]
    )
    has_tables = await _has_tables(pool)
    if has_tables:
        found += await diagnose(
            [Check(AREA, "queue", partial(queue, pool)), Check(AREA, "jobs", partial(jobs, pool))]
        )
    return found, OpenDatabase(pool, has_tables)


def server_program(data_dir: Path, *, needed: bool, major: int = POSTGRES_MAJOR) -> Finding:
    """Whether the embedded server's program is there, runs, and is of the version of the data."""
    remedy = "install it again (make setup), or use a PostgreSQL of yours with --database-url"
    unneeded = "" if needed else "; not needed here: --database-url names a database"
    try:
        program = installed_server()
        server_account(ServerFiles(data_dir))
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=True)
    except (OrchestratorError, OSError, subprocess.SubprocessError) as error:
        return Finding.broken(str(error), remedy) if needed else Finding.ok(f"{error}{unneeded}")
    version = re.search(r"\(PostgreSQL\) (\d+)(\S*)", done.stdout)
    if needed and (version is None or int(version[1]) != major):
        return Finding.broken(f"{done.stdout.strip()}, but PostgreSQL {major} is needed", remedy)
    return Finding.ok(f"PostgreSQL {version[1]}{version[2]}{unneeded}" if version else done.stdout.strip())


async def _opened(
    settings: Settings, data_dir: Path, stack: AsyncExitStack, *, embedded_is_clear: bool
) -> tuple[Pool, str] | Finding:
    """A pool and the words for its place; a finding where there is no database to look at."""
    try:
        async with asyncio.timeout(OPEN_SECONDS):
            if settings.database_url is not None:
                where = Database(settings.database_url.get_secret_value())
                place = str(where)
            elif not ServerFiles(data_dir).pgdata.exists():
                return Finding.ok(f"there is none in {data_dir} yet: the first command makes it")
            elif not embedded_is_clear:
                return Finding.attention(
                    f"that of {data_dir} was not looked at: a killed run left something of its server",
                    "clear the leftovers (below) first",
                )
            else:
                where = await stack.enter_async_context(embedded_postgres(data_dir))
                place = f"the embedded one of {data_dir}"
            pool = await stack.enter_async_context(
                open_pool(
                    where,
                    application_name="orchestrator doctor",
                    max_size=4,
                    connect_timeout_seconds=CONNECT_SECONDS,
                )
            )
    except TimeoutError:
        return Finding.broken(f"no answer within {OPEN_SECONDS:g} s", "look at the server's log")
    except OrchestratorError as error:
        return Finding.broken(
            str(error), "check --database-url (or ORCHESTRATOR_DATABASE_URL) and the server"
        )
    except PermissionError as error:
        return Finding.broken(
            f"{error.filename or data_dir} may not be read", "run as its owner, or choose another --data-dir"
        )
    return pool, place


async def database(pool: Pool, place: str) -> Finding:
    """Whether the server is one that we work with."""
    async with pool.acquire() as connection:
        version = await server_version(connection)
    major = re.match(r"\d+", version)
    if major is None or int(major[0]) < LEAST_MAJOR:
        return Finding.broken(
            f"{place}: PostgreSQL {version}", f"use a server of PostgreSQL {LEAST_MAJOR} or newer"
        )
    return Finding.ok(f"{place}: PostgreSQL {version}")


async def clock(pool: Pool, most_seconds: float = MOST_SKEW_SECONDS) -> Finding:
    """Whether the database's clock, by which leases and deadlines go, and ours agree."""
    async with pool.acquire() as connection:
        skew = await clock_skew(connection)
    if abs(skew.seconds) <= most_seconds + skew.uncertainty_seconds:
        return Finding.ok(f"agrees with this machine's to {max(skew.uncertainty_seconds, 0.001):.3f} s")
    direction = "ahead of" if skew.seconds > 0 else "behind"
    return Finding.attention(
        f"the database's is {abs(skew.seconds):.1f} s {direction} this machine's",
        "set both by NTP: times in messages and in the database do not agree",
    )


async def schema(pool: Pool, *, embedded: bool) -> Finding:
    """Whether the tables are those of this version."""
    async with pool.acquire() as connection:
        behind = await pgqueuer_state(connection)
    found = await read_schema(pool)
    versions = f"version {found.version} of our tables; this orchestrator works with {SCHEMA_VERSION}"
    if found.works_with > SCHEMA_VERSION:
        return Finding.broken(versions, "install the newer orchestrator, or use another database")
    if found.works_here and behind == 0:
        newer = "" if found.version == SCHEMA_VERSION else ", newer than this orchestrator, and good for it"
        return Finding.ok(f"version {found.version} of our tables{newer}, and those of pgqueuer")
    what = versions
    if found.works_here:
        state = "not there" if behind is None else f"{behind} changes behind"
        what = f"version {found.version} of our tables, but those of pgqueuer are {state}"
    if embedded:
        return Finding.ok(f"{what}; the next command brings it up to date")
    return Finding.broken(what, "orchestrator db migrate")


async def permissions(pool: Pool) -> Finding:
    """Whether the database's user may do what we do."""
    async with pool.acquire() as connection:
        missing = await missing_privileges(connection)
    if not missing:
        return Finding.ok("this user may read and write all that is there of our tables")
    return Finding.broken(
        f"this user may not {', '.join(missing)}", "grant it, or connect as the user who ran db migrate"
    )


async def connections(pool: Pool, max_concurrent_jobs: int) -> Finding:
    """Whether the server has room for a control plane, or has one already."""
    async with pool.acquire() as connection:
        room = await connection_room(connection)
    what = f"{room.left} of {room.allowed} left"
    if await has_client(pool, CONSUMER_APPLICATION):
        return Finding.ok(f"{what}; a control plane is connected")
    needed = connections_needed(max_concurrent_jobs)
    if room.left >= needed:
        return Finding.ok(f"{what}; a control plane takes up to {needed}")
    return Finding.attention(
        f"{what}, but a control plane takes up to {needed}",
        "raise max_connections of the server, end other clients, or set a lower max_concurrent_jobs",
    )


async def queue(pool: Pool) -> Finding:
    """Whether rows of the queue were set aside."""
    async with pool.acquire() as connection:
        held = await held_rows(connection)
    if not held:
        return Finding.ok("no row is held")
    rows = ", ".join(f"{count} of {entrypoint}" for entrypoint, count in held.items())
    why = "they name no job, or their handler failed" if QUEUE_ADD_JOB in held else "their handler failed"
    return Finding.attention(
        f"rows are held: {rows}", f"{why}: `orchestrator jobs` shows them; send what was meant once more"
    )


async def jobs(pool: Pool) -> Finding:
    """Whether somebody works at the jobs that have not ended."""
    async with pool.acquire() as connection:
        unfinished = await unfinished_jobs(connection, grace_seconds=ABANDONED_SECONDS)
    what = f"{unfinished.held} running, {unfinished.queued} queued"
    is_live = await has_client(pool, CONSUMER_APPLICATION)
    if unfinished.abandoned:
        ids = [str(job_id) for job_id in unfinished.abandoned]
        shown = ", ".join(ids[:SHOWN_JOBS]) + (", ..." if len(ids) > SHOWN_JOBS else "")
        remedy = (
            "the control plane does not take them up: look at its log, with --debug"
            if is_live
            else "`orchestrator up` takes them up again, `orchestrator cancel` ends them"
        )
        return Finding.attention(f"{what}; nobody holds {shown}", remedy)
    if unfinished.queued and not is_live:
        return Finding.attention(f"{what}, and no control plane", "`orchestrator up` starts one")
    return Finding.ok(what)


async def _has_tables(pool: Pool) -> bool:
    """Whether there is anything to ask for jobs and queue; what is wrong with it the schema check says."""
    with contextlib.suppress(asyncpg.PostgresError, OSError):
        async with asyncio.timeout(DEADLINE_SECONDS), pool.acquire() as connection:
            return (await read_schema(pool)).version > 0 and await pgqueuer_state(connection) is not None
    return False
