"""Full disks, and a server whose memory is taken: what waits goes on afterwards, and nothing is lost."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import asyncpg
import pytest
from structlog.testing import capture_logs

from orchestrator.adapters.postgres.embedded import embedded_postgres
from orchestrator.adapters.postgres.migrate import migrate
from orchestrator.adapters.postgres.pool import Database, open_connection, retrying
from orchestrator.domain.lifecycle import JobStatus
from tests.in_process_plane import InProcessPlane, in_process_plane

CARTPOLE = Path(__file__).resolve().parents[2] / "examples" / "cartpole"


@contextmanager
def small_disk(mebibytes: int) -> Iterator[Path]:
    """A file system of its own, of this size."""
    with tempfile.TemporaryDirectory(prefix="orc-disk-") as directory:
        Path(directory).chmod(0o755)
        options = f"size={mebibytes}m,mode=755"
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", directory],
            capture_output=True,
            text=True,
            check=False,
        )
        if mounted.returncode != 0:
            pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
        try:
            yield Path(directory)
        finally:
            subprocess.run(["umount", "--lazy", directory], check=True)


@pytest.fixture
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="orc-full-") as directory:
        yield Path(directory)


@pytest.fixture
def disk() -> Iterator[Path]:
    with small_disk(200) as mounted:
        yield mounted


@pytest.fixture
async def database_on_disk(disk: Path) -> AsyncIterator[Database]:
    async with embedded_postgres(disk / "data") as server:
        await migrate(server.dsn)
        yield server


def fill(disk: Path) -> Path:
    """A file that takes the last block."""
    ballast = disk / "ballast"
    full = subprocess.run(
        ["dd", "if=/dev/zero", f"of={ballast}", "bs=4096"], capture_output=True, text=True, check=False
    )
    assert "No space left on device" in full.stderr
    return ballast


# A server without room for a table says so and lives on; one without room for its write-ahead log ends, and
# cannot start before there is some. Which comes first depends on how full its last segment was.
HELD_UP = {"database_has_no_room", "episodes_not_committed", "sink_unavailable"}


async def outcomes_are_held_up(plane: InProcessPlane) -> None:
    while not any(entry["event"] in HELD_UP for entry in plane.logged):
        await asyncio.sleep(0.05)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("wanted", ["room for a table", "room for the write-ahead log"])
async def test_what_the_database_has_no_room_for_waits_and_nothing_is_lost(
    database_on_disk: Database, disk: Path, scratch: Path, wanted: str
) -> None:
    async with in_process_plane(database_on_disk, scratch) as plane:
        jobs = plane.jobs(CARTPOLE, 1, config={"episodes_per_task": 100})
        await plane.submit(jobs)
        async with asyncio.timeout(200):
            while not await plane.pool.fetchval("SELECT count(*) > 5 FROM episodes WHERE finished"):
                await asyncio.sleep(0.02)
            ballast = fill(disk)
            if wanted == "room for the write-ahead log":
                with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                    await plane.pool.execute("SELECT pg_switch_wal(); CREATE TABLE one_more ()")
            await outcomes_are_held_up(plane)
            ballast.unlink()
            [result] = await retrying(lambda: plane.results(jobs, seconds=120), deadline_seconds=120)
            kept = await plane.pool.fetchval("SELECT count(*) FROM episodes WHERE finished")

    assert (result.status, result.total_episodes, kept) == (JobStatus.COMPLETED, 100, 100)


async def test_a_full_disk_of_the_database_is_told_at_once_and_waited_out() -> None:
    answers = [asyncpg.DiskFullError("could not extend file"), asyncpg.DiskFullError("still"), "stored"]

    async def store() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with capture_logs() as entries:
        assert await retrying(store, deadline_seconds=30, what="storing") == "stored"

    [entry] = entries
    assert (entry["event"], entry["what"]) == ("database_has_no_room", "storing")
    assert entry["why"].startswith("the database's disk is full; free space there")


@pytest.mark.timeout(300)
async def test_an_archive_that_no_disk_has_room_for_is_no_fault_of_the_submission(
    database: Database, disk: Path, scratch: Path
) -> None:
    ballast = fill(disk)
    async with in_process_plane(database, disk / "data", lease_seconds=3.0) as plane:
        object.__setattr__(plane, "scratch", scratch)
        jobs = plane.jobs(CARTPOLE, 1, config={"episodes_per_task": 3})
        await plane.submit(jobs)
        async with asyncio.timeout(200):
            while (why := await plane.pool.fetchval("SELECT ended_because FROM claims LIMIT 1")) is None:
                await asyncio.sleep(0.05)
            ballast.unlink()
            [result] = await plane.results(jobs, seconds=120)

    assert "No space left on device" in why
    assert (result.status, result.total_episodes) == (JobStatus.COMPLETED, 3)


@pytest.mark.timeout(300)
async def test_a_server_that_lost_a_session_to_the_killer_of_memory_comes_back_and_the_job_goes_on(
    database_on_disk: Database, scratch: Path
) -> None:
    """PostgreSQL ends every session then, and recovers: its shared memory may be damaged."""
    async with in_process_plane(database_on_disk, scratch) as plane:
        jobs = plane.jobs(CARTPOLE, 1, config={"episodes_per_task": 100})
        await plane.submit(jobs)
        async with asyncio.timeout(200):
            while not await plane.pool.fetchval("SELECT count(*) > 5 FROM episodes WHERE finished"):
                await asyncio.sleep(0.02)
            async with open_connection(database_on_disk.dsn) as connection:
                os.kill(await connection.fetchval("SELECT pg_backend_pid()"), signal.SIGKILL)
            results = await retrying(lambda: plane.results(jobs, seconds=120), deadline_seconds=120)
            kept = await plane.pool.fetchval("SELECT count(*) FROM episodes WHERE finished")

    assert [(result.status, result.total_episodes) for result in results] == [(JobStatus.COMPLETED, 100)]
    assert kept == 100
