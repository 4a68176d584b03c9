"""What earlier runs left: found, cleared, and never where somebody uses it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias
from uuid import UUID, uuid4

import psutil
import pytest

from orchestrator import ray_session
from orchestrator.adapters.postgres import leftovers as server_leftovers
from orchestrator.adapters.postgres.server_files import ServerFiles
from orchestrator.adapters.process.containers import ProcessContainers
from orchestrator.adapters.process.places import Owner, Place, Presence
from orchestrator.adapters.process.processes import ProcessIdentity, identity_of, marked_with
from orchestrator.adapters.process.scratch import ContainerDirectory
from orchestrator.diagnosis import leftovers
from orchestrator.diagnosis.database import OpenDatabase
from orchestrator.diagnosis.findings import Finding, State
from orchestrator.job_scratch import scratch_path
from orchestrator.ports import ContainerSpec
from tests.golden_texts import check_golden
from tests.job_fixtures import a_job, a_store

if TYPE_CHECKING:
    import asyncpg

    Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"

LONG_AGO = 1_000_000_000.0
NOBODY = ProcessIdentity(2**22 + 1, 1)  # above any process number


def check(case: str, finding: Finding, *paths: Path) -> None:
    lines = [finding.what, *(f"- {leftover.what}" for leftover in finding.leftovers)]
    text = "\n".join([*lines, f"to do: {finding.remedy}"])
    for index, path in enumerate(paths):
        text = text.replace(str(path), f"<path {index + 1}>")
    check_golden("doctor", case, text)


def clear(finding: Finding) -> list[bool]:
    return [leftover.clear() for leftover in finding.leftovers]


@contextmanager
def running(*arguments: str | Path, **options: object) -> Iterator[subprocess.Popen[bytes]]:
    """A process for the block."""
    process = subprocess.Popen([*map(str, arguments)], **options)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.kill()
        process.wait(30)


# ---------------------------------------------------------------------------------------- Ray sessions


@pytest.fixture
def sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In the place of /tmp."""
    monkeypatch.setattr(ray_session, "PARENT", tmp_path)
    return tmp_path


def owned_by(directory: Path, owner: Owner) -> Path:
    (directory / ray_session.OWNER_FILE).write_text(json.dumps(owner.as_json()))
    return directory


def test_a_session_of_a_command_that_is_gone_is_cleared_with_its_processes(sessions: Path) -> None:
    session = owned_by(ray_session.make_session_directory(), Owner(Place.here(), NOBODY))
    (session / "log").touch()
    with running("tail", "-f", session / "log", stdout=subprocess.DEVNULL) as process:
        finding = leftovers.ray_sessions()
        check("ray_session", finding, session)

        assert clear(finding) == [True]

        process.wait(30)
    assert not session.exists()
    assert leftovers.ray_sessions() == Finding.ok("none")


def test_a_session_that_came_into_use_is_not_cleared(sessions: Path) -> None:
    session = owned_by(ray_session.make_session_directory(), Owner(Place.here(), NOBODY))
    finding = leftovers.ray_sessions()
    owned_by(session, Owner.this_process())

    assert clear(finding) == [False]
    assert session.exists()


def test_sessions_in_use_or_of_another_machine_or_user_are_left_alone(
    sessions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray_session.make_session_directory()  # ours
    elsewhere = Place("another-host", "boot:pid:[1]")
    owned_by(ray_session.make_session_directory(), Owner(elsewhere, NOBODY))
    (sessions / f"{ray_session.PREFIX}young").mkdir()

    assert leftovers.ray_sessions() == Finding.ok("none")

    gone = owned_by(ray_session.make_session_directory(), Owner(Place.here(), NOBODY))
    assert ray_session.abandoned_sessions() == [gone]
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert ray_session.abandoned_sessions() == []


def test_an_old_session_without_an_owner_is_a_leftover_unless_something_runs_in_it(sessions: Path) -> None:
    session = sessions / f"{ray_session.PREFIX}old"
    session.mkdir()
    (session / "log").touch()
    os.utime(session, (LONG_AGO, LONG_AGO))

    with running("tail", "-f", session / "log", stdout=subprocess.DEVNULL):
        assert ray_session.abandoned_sessions() == []
    assert ray_session.abandoned_sessions() == [session]


def test_a_process_of_before_a_reboot_is_gone() -> None:
    here = Place.here()
    own = Owner.this_process()

    assert own.presence is Presence.ALIVE
    assert Owner.from_json(json.loads(json.dumps(own.as_json()))) == own
    rebooted = replace(here, machine=f"another-boot:{here.machine.partition(':')[2]}")
    assert rebooted.presence_of(own.process) is Presence.GONE
    assert replace(here, machine="another-boot:pid:[1]").presence_of(own.process) is Presence.ELSEWHERE
    assert replace(rebooted, hostname="another").presence_of(own.process) is Presence.ELSEWHERE


# ------------------------------------------------------------------------------------------ containers

# It leaves a daemon behind, which its shim's death does not end.
HOST = """
import subprocess, sys, time
subprocess.Popen(["sleep", "600"], start_new_session=True)
open(sys.argv[1], "w").write("1")
time.sleep(600)
"""


def host_command(port_file: Path, directory: Path, key_fd: int) -> list[str]:
    return [sys.executable, "-c", HOST, str(port_file)]


@pytest.fixture
def spec() -> ContainerSpec:
    return ContainerSpec(
        container_id=uuid4(),
        installation_id=uuid4(),
        job_id=7,
        attempt=1,
        expires_at=datetime.now(UTC) + timedelta(hours=1),
        session_key=bytes(32),
    )


@pytest.fixture
async def container(
    tmp_path: Path, spec: ContainerSpec
) -> AsyncIterator[tuple[ContainerDirectory, psutil.Process]]:
    """A running container, and the process that drives it."""
    base = tmp_path / "containers"
    with running("sleep", "600") as driver:
        containers = ProcessContainers(base, watch_pid=driver.pid, command=host_command)
        handle = await containers.create(spec)
        await containers.wait_ready(handle, 60)
        directory = ContainerDirectory.of(base, spec.installation_id, spec.container_id)
        try:
            yield directory, psutil.Process(driver.pid)
        finally:
            await containers.remove(handle)


def kill_without_a_word(directory: ContainerDirectory, driver: psutil.Process) -> None:
    """Shim and driver at once, so that nobody ends what is below them."""
    processes = directory.read_processes()
    assert processes is not None
    os.kill(processes.shim.pid, signal.SIGSTOP)
    driver.kill()
    driver.wait(30)
    os.kill(processes.shim.pid, signal.SIGKILL)
    while processes.shim.alive:
        time.sleep(0.01)


async def test_a_container_is_left_alone_while_its_driver_lives_and_cleared_afterwards(
    tmp_path: Path, container: tuple[ContainerDirectory, psutil.Process]
) -> None:
    directory, driver = container
    in_use = await leftovers.containers(tmp_path, None)
    kill_without_a_word(directory, driver)
    assert list(marked_with(directory.marker))  # the daemon lives on

    finding = await leftovers.containers(tmp_path, None)
    assert await asyncio.to_thread(clear, finding) == [True]

    assert in_use == Finding.ok("none; 1 in use, or of another machine")
    assert re.search(r" with \d process", finding.leftovers[0].what)
    check("container", finding, directory.root)
    assert not list(marked_with(directory.marker))
    assert not directory.root.parent.exists()
    assert await leftovers.containers(tmp_path, None) == Finding.ok("none")


async def test_a_container_of_another_machine_is_left_alone(
    tmp_path: Path, container: tuple[ContainerDirectory, psutil.Process]
) -> None:
    directory, driver = container
    spec = directory.read_spec()
    assert spec is not None
    directory.write_spec(replace(spec, place=Place("another-host", "boot:pid:[1]")))
    kill_without_a_word(directory, driver)

    assert (await leftovers.containers(tmp_path, None)).state is State.OK


def test_a_container_that_is_being_made_is_left_alone_and_one_that_was_cut_off_is_cleared(
    tmp_path: Path,
) -> None:
    directory = ContainerDirectory.of(tmp_path / "containers", uuid4(), uuid4())
    look = lambda: asyncio.run(leftovers.containers(tmp_path, None))  # noqa: E731
    with directory.locked(1):
        directory.make()
        os.utime(directory.root, (LONG_AGO, LONG_AGO))
        assert look().state is State.OK

    finding = look()
    with directory.locked(1):
        os.utime(directory.root)
        assert look().state is State.OK
    assert look().state is State.OK  # young: another machine may be about to write it
    assert clear(finding) == [False]
    os.utime(directory.root, (LONG_AGO, LONG_AGO))

    assert clear(finding) == [True]
    assert not directory.root.parent.exists()


async def test_processes_of_this_installation_without_a_directory_are_cleared(
    tmp_path: Path, pool: Pool
) -> None:
    installation: UUID = await pool.fetchval("SELECT installation_id FROM installation")
    marker = f"{installation}/{uuid4()}"
    options = {"env": {"ORCHESTRATOR_CONTAINER": marker, "PATH": os.defpath}, "start_new_session": True}
    with running("sleep", "600", **options) as process:
        while not list(marked_with(marker)):
            await asyncio.sleep(0.01)
        assert (
            await leftovers.containers(tmp_path, None)
        ).state is State.OK  # anybody's, without the database

        finding = await leftovers.containers(tmp_path, OpenDatabase(pool, has_tables=True))
        assert await asyncio.to_thread(clear, finding) == [True]

        assert process.wait(30) == -signal.SIGKILL


# ------------------------------------------------------------------------------ scratch and archives


def test_scratch_directories_of_dead_processes_are_cleared(tmp_path: Path) -> None:
    alive = scratch_path(tmp_path, uuid4(), 1)
    dead = alive.with_name(f"2-{NOBODY.pid}-3")
    elsewhere = tmp_path / "scratch" / "installation" / "another-host" / dead.name
    for directory in (alive, dead, elsewhere):
        directory.mkdir(parents=True)

    finding = leftovers.scratch(tmp_path)
    assert clear(finding) == [True]

    check("scratch", finding, dead)
    assert (alive.exists(), dead.exists(), elsewhere.exists()) == (True, False, True)
    assert leftovers.scratch(tmp_path) == Finding.ok("none")


async def test_old_archives_are_cleared_unless_an_unfinished_job_needs_them(
    tmp_path: Path, pool: Pool
) -> None:
    def archive(name: str, *, old: bool = True) -> Path:
        path = tmp_path / "artifacts" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(2048))
        if old:
            os.utime(path, (LONG_AGO, LONG_AGO))
        return path

    unneeded, late = archive("a.tar.gz"), archive("b b.tar.gz")
    kept = [archive("c c.tar.gz"), archive("d.tar.gz", old=False)]
    store = a_store(pool)
    await store.insert(
        a_job(1, artifact_url=f"file://{str(kept[0]).replace(' ', '%20')}"), enqueue=True, local=True
    )
    database = OpenDatabase(pool, has_tables=True)

    finding = await leftovers.archives(tmp_path, database, embedded=True)
    # A job that comes in between look and clearing.
    await store.insert(
        a_job(2, artifact_url=f"file://{str(late).replace(' ', '%20')}"), enqueue=True, local=True
    )
    cleared = await asyncio.to_thread(clear, finding)

    check("archives", finding, tmp_path / "artifacts")
    assert cleared == [True, False]
    assert not unneeded.exists()
    assert all(path.exists() for path in (late, *kept))
    assert (await leftovers.archives(tmp_path, database, embedded=True)).state is State.OK


async def test_archives_are_not_judged_without_the_database_of_their_jobs(tmp_path: Path, pool: Pool) -> None:
    archive = tmp_path / "artifacts" / "a.tar.gz"
    archive.parent.mkdir()
    archive.touch()
    os.utime(archive, (LONG_AGO, LONG_AGO))
    (tmp_path / "pgdata").mkdir()  # an embedded database besides

    for database, embedded in ((None, True), (OpenDatabase(pool, has_tables=True), False)):
        finding = await leftovers.archives(tmp_path, database, embedded=embedded)
        assert finding == Finding.ok(
            "1 packed submission (0 KiB) of more than a day ago; "
            "not judged, as jobs of another database may need them"
        )


# --------------------------------------------------------------------------------- the embedded server

CLIENT = """
import asyncio, sys
from pathlib import Path
from orchestrator.adapters.postgres.embedded import embedded_postgres

async def main():
    async with embedded_postgres(Path(sys.argv[1])) as database:
        print(database.dsn, flush=True)
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""


@contextmanager
def client(data_dir: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that uses the embedded server."""
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with running(sys.executable, "-c", CLIENT, data_dir, **options) as process:
        assert process.stdout is not None
        assert process.stdout.readline(), "the server did not start"
        yield process


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_server_is_left_alone_while_it_is_used_and_cleared_once_it_is_abandoned(
    server_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_leftovers, "GUARDIAN_SECONDS", 0.5)
    data_dir = server_directory.with_name(f"data-{uuid4().hex}")
    files = ServerFiles(data_dir)
    with client(data_dir) as user:
        assert leftovers.embedded_server(data_dir) == Finding.ok("none")
        assert not server_leftovers.clear_server_leftovers(files)
        state = files.read_state()
        assert state is not None
        guardian = identity_of(state.guardian_pid)
        server = identity_of(state.pid)
        assert guardian is not None
        assert server is not None
        assert server.alive
        os.kill(state.guardian_pid, signal.SIGSTOP)
        user.kill()
        user.wait(30)

    stuck = leftovers.embedded_server(data_dir)
    assert clear(stuck) == [True]

    assert not guardian.alive
    assert not server.alive
    assert leftovers.embedded_server(data_dir) == Finding.ok("none")
    text = Finding.attention(
        stuck.what,
        stuck.remedy,
        [replace(one, what=one.what.replace(str(guardian.pid), "<pid>")) for one in stuck.leftovers],
    )
    check("server_stuck", text, data_dir)

    with client(data_dir) as user:
        state = files.read_state()
        assert state is not None
        for pid in (user.pid, state.guardian_pid, state.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not list(server_leftovers.server_processes(files.pgdata)))
        wait_until(
            lambda: not psutil.pid_exists(state.guardian_pid) or identity_of(state.guardian_pid) is None
        )

    stale = leftovers.embedded_server(data_dir)
    assert clear(stale) == [True]

    check("server_files", stale, data_dir)
    assert not (files.pgdata / "postmaster.pid").exists()
    assert leftovers.embedded_server(data_dir) == Finding.ok("none")


def test_a_directory_without_any_server_has_no_leftovers_and_is_not_touched(tmp_path: Path) -> None:
    assert leftovers.embedded_server(tmp_path / "nowhere") == Finding.ok("none")
    assert list(tmp_path.iterdir()) == []
