"""The directory of a local Ray cluster that is ours: what runs in it, and how to be rid of all of it."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

PREFIX = "orc-ray-"
END_SECONDS = 10.0


def make_session_directory() -> Path:
    """A directory with a short path: Ray keeps sockets in it, and their paths have 107 bytes at most."""
    return Path(tempfile.mkdtemp(prefix=PREFIX, dir="/tmp"))


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
