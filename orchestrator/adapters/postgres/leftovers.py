"""What a killed run of the embedded Postgres left behind, and how to be rid of it; never of one in use."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from orchestrator.adapters.postgres.cluster import server_processes, stop_leftovers
from orchestrator.adapters.postgres.file_lock import try_lock
from orchestrator.adapters.postgres.server_files import SCRATCH_PREFIX, ServerFiles, remove_scratch

# A guardian looks for clients three times a second.
GUARDIAN_SECONDS = 5.0
END_SECONDS = 10.0
_POLL_SECONDS = 0.1
_GUARDIAN_MODULE = "orchestrator.adapters.postgres.guardian"


@dataclass(frozen=True, slots=True)
class ServerLeftovers:
    """What is there though nobody uses the server.

    `guardian` is one that does not end though it has no client left; `processes` are of a server without any
    guardian; `files` are what only a running server has.
    """

    guardian: int | None = None
    processes: tuple[int, ...] = ()
    files: tuple[Path, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.guardian or self.processes or self.files)


def find_server_leftovers(files: ServerFiles) -> ServerLeftovers:
    """The leftovers in a data directory; none where the server is in use, is starting or stops. Blocking.

    Raises:
        PermissionError: the data directory is another user's.
    """
    deadline = time.monotonic() + GUARDIAN_SECONDS
    while True:
        with _alone(files) as guarded:
            if guarded is None:
                return ServerLeftovers()
            if not guarded:
                return _without_guardian(files)
            if time.monotonic() > deadline:
                guardian = _guardian(files)
                return ServerLeftovers(guardian=None if guardian is None else guardian.pid)
        time.sleep(_POLL_SECONDS)  # with our locks let go: a guardian needs one of them to end


def clear_server_leftovers(files: ServerFiles) -> bool:
    """Remove them unless somebody uses the server by now; whether nothing of them is left. Blocking."""
    deadline = time.monotonic() + END_SECONDS
    while time.monotonic() < deadline:
        with _alone(files) as guarded:
            if guarded is None:
                return False
            if not guarded:
                stop_leftovers(files.pgdata)
                files.clear_state()
                remove_scratch(files)
                return not _without_guardian(files)
            if (guardian := _guardian(files)) is None:
                return False
            with contextlib.suppress(psutil.NoSuchProcess):
                guardian.kill()
                guardian.wait(END_SECONDS)
        time.sleep(_POLL_SECONDS)
    return False


@contextlib.contextmanager
def _alone(files: ServerFiles) -> Iterator[bool | None]:
    """Whether a guardian is there, with clients kept out for the block; None where the server is in use."""
    with contextlib.ExitStack() as locks:
        # The first: nobody looks for the server or starts it. The second: no client, no guardian that stops.
        for path in (files.start_lock, files.pool_lock):
            if not _lock(locks, path):
                yield None
                return
        yield not _lock(locks, files.guardian_lock)


def _lock(locks: contextlib.ExitStack, path: Path) -> bool:
    """Whether the lock was had, until the stack unwinds; a lock that nobody ever took needs none."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    locks.callback(os.close, descriptor)
    return try_lock(descriptor, exclusive=True)


def _without_guardian(files: ServerFiles) -> ServerLeftovers:
    stale = (files.pgdata / "postmaster.pid", files.data_dir / "server.json")
    return ServerLeftovers(
        processes=tuple(process.pid for process in server_processes(files.pgdata)),
        files=(
            *(path for path in stale if path.exists()),
            *sorted(files.data_dir.glob(f"{SCRATCH_PREFIX}*")),
        ),
    )


def _guardian(files: ServerFiles) -> psutil.Process | None:
    """The process that guards this data directory."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            if _GUARDIAN_MODULE in command and str(files.data_dir) in command:
                return process
    return None
