"""Processes of a Ray cluster: the end of an orphaned one, and how to be rid of a local cluster of ours."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from orchestrator.adapters.process.places import Owner, Presence

PARENT = Path("/tmp")  # noqa: S108 - the shortest there is; each directory in it is closed to others
PREFIX = "orc-ray-"
OWNER_FILE = "owner.json"
END_SECONDS = 10.0
PARENT_POLL_SECONDS = 2.0
# A directory is there a moment before it says whose it is.
NAMELESS_SECONDS = 600.0
MAX_SOCKET_PATH_BYTES = 107
# Below the session's directory, with a process number of seven digits.
LONGEST_SOCKET = "session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1"


def make_session_directory() -> Path:
    """A directory with a short path, as Ray keeps sockets in it; it says which process it belongs to."""
    directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=PARENT))
    (directory / OWNER_FILE).write_text(json.dumps(Owner.this_process().as_json()))
    return directory


def keep_standard_output() -> None:
    """Let Ray tell of dead workers on standard error: a command's standard output is for its results.

    Ray prints such messages whatever `log_to_driver` says, and has no other setting for that.
    """
    from ray._private import worker

    original = worker.print_worker_logs
    if not isinstance(original, partial):
        worker.print_worker_logs = partial(_print_on_standard_error, original)


def _print_on_standard_error(original: Any, data: Any, _: Any, ignore_prefix: bool = False) -> None:
    original(data, sys.stderr, ignore_prefix)


def socket_path_bytes(parent: Path) -> int:
    """How long the path of a socket becomes in a session directory below `parent`."""
    return len(os.fsencode(parent / f"{PREFIX}12345678" / LONGEST_SOCKET))


def abandoned_sessions() -> list[Path]:
    """The session directories of this user whose owner is gone, as far as that can be told from here."""
    return [directory for directory in sorted(PARENT.glob(f"{PREFIX}*")) if is_abandoned(directory)]


def is_abandoned(directory: Path) -> bool:
    """Whether the process that a session belongs to is gone, whatever of the session still runs."""
    try:
        status = directory.lstat()
        if not directory.is_dir() or status.st_uid != os.geteuid():
            return False
        owner = Owner.from_json(json.loads((directory / OWNER_FILE).read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return _is_old_and_quiet(directory)
    return owner.presence is Presence.GONE


def _is_old_and_quiet(directory: Path) -> bool:
    try:
        age_seconds = time.time() - directory.stat().st_mtime
    except OSError:
        return False
    return age_seconds > NAMELESS_SECONDS and not any(processes_of(directory))


def remove_session(directory: Path) -> None:
    """End every process of the session that is still there, and remove its directory. Blocking.

    Ray's own shutdown ends them as a rule, but not after a start that failed halfway.
    """
    deadline = time.monotonic() + END_SECONDS
    while True:
        left = list(processes_of(directory))
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=1.0)
        shutil.rmtree(directory, ignore_errors=True)
        if (not left and not directory.exists()) or time.monotonic() > deadline:
            return


def processes_of(directory: Path) -> Iterator[psutil.Process]:
    """The processes, but for this one, that were started for the session or have its files open.

    Ray's processes overwrite their titles and environments, but they all log into the session's directory.
    """
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and _belongs(process, str(directory) + "/"):
                yield process
        except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            continue


def _belongs(process: psutil.Process, prefix: str) -> bool:
    if any(prefix in argument for argument in process.cmdline()):
        return True
    descriptors = Path(f"/proc/{process.pid}/fd")
    if not descriptors.is_dir():
        return any(file.path.startswith(prefix) for file in process.open_files())
    for descriptor in descriptors.iterdir():
        try:
            if os.readlink(descriptor).startswith(prefix):
                return True
        except OSError:
            continue
    return False


def end_with_parent() -> None:
    """End this process of an actor soon after its parent, the raylet of its node.

    Ray leaves it running as long as the dead raylet is a zombie. Nobody could find such an actor any more,
    while it held connections to the database and took jobs for which it can start nothing.
    """
    threading.Thread(target=_end_after, args=(os.getppid(),), name="end-with-parent", daemon=True).start()


def _end_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_SECONDS)
    os._exit(1)
