"""What earlier runs left on this machine: found, and cleared only where nobody can be using it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

from orchestrator.adapters.postgres.inspection import installation_id
from orchestrator.adapters.postgres.job_reports import JobReports
from orchestrator.adapters.postgres.leftovers import clear_server_leftovers, find_server_leftovers
from orchestrator.adapters.postgres.server_files import ServerFiles
from orchestrator.adapters.process.orphans import FoundContainer, Use, find_containers, remove_orphan
from orchestrator.diagnosis.database import OpenDatabase
from orchestrator.diagnosis.findings import Check, Finding, Leftover
from orchestrator.diagnosis.machine import in_units
from orchestrator.job_scratch import abandoned_scratch, remove_scratch
from orchestrator.ray_session import abandoned_sessions, is_abandoned, processes_of, remove_session

AREA = "leftovers"
REMEDY = "`orchestrator doctor --fix` clears them"
LOOK_SECONDS = 60.0
QUERY_SECONDS = 10.0
# Whoever packs an archive makes it look new, so an old one is of a command that ended long ago or was killed.
OLD_ARCHIVE_SECONDS = 86_400.0


def early_checks(data_dir: Path) -> list[Check]:
    """Those to be made before the embedded server is started: its start clears some of it away."""
    return [
        Check(AREA, "ray sessions", ray_sessions, LOOK_SECONDS),
        Check(AREA, "embedded server", partial(embedded_server, data_dir), LOOK_SECONDS),
    ]


def late_checks(data_dir: Path, database: OpenDatabase | None, *, embedded: bool) -> list[Check]:
    """The others, which the database tells more about."""
    return [
        Check(AREA, "containers", partial(containers, data_dir, database), LOOK_SECONDS),
        Check(AREA, "scratch", partial(scratch, data_dir), LOOK_SECONDS),
        Check(AREA, "archives", partial(archives, data_dir, database, embedded=embedded), LOOK_SECONDS),
    ]


def ray_sessions() -> Finding:
    """Directories and processes of a local Ray whose command is gone."""
    leftovers = []
    for directory in abandoned_sessions():
        count = sum(1 for _ in processes_of(directory))
        leftovers.append(
            Leftover(f"the Ray session {directory}{_with(count)}", partial(_clear_session, directory))
        )
    if not leftovers:
        return Finding.ok("none")
    return Finding.attention(_counted(len(leftovers), "session") + " without its command", REMEDY, leftovers)


def _clear_session(directory: Path) -> bool:
    if not is_abandoned(directory):
        return False
    remove_session(directory)
    return not directory.exists()


def embedded_server(data_dir: Path) -> Finding:
    """A server or guardian of this data directory that nobody uses, and what a killed one left."""
    files = ServerFiles(data_dir)
    try:
        found = find_server_leftovers(files)
    except PermissionError:
        return Finding.broken(
            f"{data_dir} belongs to another user", "run as that one, or choose another --data-dir"
        )
    if not found:
        return Finding.ok("none")
    if found.guardian is not None:
        what = f"the guardian of the server in {data_dir} (process {found.guardian}), which does not end"
    elif found.processes:
        what = f"the server in {data_dir} without its guardian{_with(len(found.processes))}"
    else:
        what = f"files of a killed server: {', '.join(str(path) for path in found.files)}"
    return Finding.attention(
        "something of a server that nobody uses",
        REMEDY,
        [Leftover(what, partial(clear_server_leftovers, files))],
    )


async def containers(data_dir: Path, database: OpenDatabase | None) -> Finding:
    """Submissions' processes and directories that nobody drives any more."""
    installations = []
    if database is not None and database.has_tables:
        async with database.pool.acquire() as connection:
            installations = [await installation_id(connection)]
    found = await asyncio.to_thread(find_containers, data_dir / "containers", installations)
    orphans = [container for container in found if container.use is Use.ORPHAN]
    others = [container for container in found if container.use is not Use.ORPHAN]
    in_use = f"; {len(others)} in use, or of another machine" if others else ""
    if not orphans:
        return Finding.ok(f"none{in_use}")
    return Finding.attention(
        f"{_counted(len(orphans), 'container')} that nobody drives{in_use}",
        REMEDY,
        [Leftover(_container_words(one), partial(remove_orphan, one.directory)) for one in orphans],
    )


def _container_words(container: FoundContainer) -> str:
    job = "" if container.job_id is None else f" of job {container.job_id}"
    return f"the container{job} in {container.directory.root}{_with(container.processes)}"


def scratch(data_dir: Path) -> Finding:
    """Directories of supervisors that were killed."""
    found = list(abandoned_scratch(data_dir))
    if not found:
        return Finding.ok("none")
    return Finding.attention(
        _counted(len(found), "directory", "directories") + " of killed supervisors",
        REMEDY,
        [Leftover(f"the scratch directory {path}", partial(_clear_scratch, path)) for path in found],
    )


def _clear_scratch(path: Path) -> bool:
    remove_scratch(path)
    return not path.exists()


async def archives(data_dir: Path, database: OpenDatabase | None, *, embedded: bool) -> Finding:
    """Packed submissions that no unfinished job needs."""
    directory = data_dir / "artifacts"
    # With two databases at one data directory, the other one's jobs may need what this one knows nothing of.
    shared = not embedded and ServerFiles(data_dir).pgdata.exists()
    old = _old_archives(directory)
    if not old:
        return Finding.ok("none")
    what = f"{_sized(old)} of more than a day ago"
    if database is None or not database.has_tables or shared:
        return Finding.ok(f"{what}; not judged, as jobs of another database may need them")
    needed = await _needed(database)
    unneeded = [path for path in old if path not in needed]
    if not unneeded:
        return Finding.ok(f"{what}; unfinished jobs need them")
    loop = asyncio.get_running_loop()

    def clear(path: Path) -> bool:
        # Asked once more: a job may have come in meanwhile.
        needed = asyncio.run_coroutine_threadsafe(_needed(database), loop).result(QUERY_SECONDS)
        if path in needed or path not in _old_archives(directory):
            return False
        path.unlink(missing_ok=True)
        return True

    return Finding.attention(
        f"{_sized(unneeded)} that no unfinished job needs",
        REMEDY,
        [Leftover(f"the packed submission {path}", partial(clear, path)) for path in unneeded],
    )


def _sized(archives: list[Path]) -> str:
    size = in_units(sum(path.stat().st_size for path in archives))
    return f"{_counted(len(archives), 'packed submission')} ({size})"


def _old_archives(directory: Path) -> list[Path]:
    limit = time.time() - OLD_ARCHIVE_SECONDS
    found = directory.iterdir() if directory.is_dir() else ()
    return sorted(path for path in found if path.is_file() and path.stat().st_mtime < limit)


async def _needed(database: OpenDatabase) -> set[Path]:
    urls: Iterable[str] = await JobReports(database.pool).unfinished_artifacts()
    return {Path(unquote(urlsplit(url).path)) for url in urls}


def _counted(count: int, noun: str, plural: str = "") -> str:
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def _with(processes: int) -> str:
    return f" with {_counted(processes, 'process', 'processes')}" if processes else ""
