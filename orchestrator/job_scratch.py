"""Scratch directories of supervisors: `<data>/scratch/<installation>/<host>/<job>-<pid>-<time>`.

Each is of one process alone: an older one that thaws must not remove what a newer one uses. Those of other
hosts are left alone, as the data directory may be on a shared file system.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import psutil


def scratch_path(data_dir: Path, installation_id: UUID, job_id: int) -> Path:
    """The directory for this process and job; whoever needs it makes it."""
    name = f"{job_id}-{os.getpid()}-{time.time_ns()}"
    return data_dir / "scratch" / str(installation_id) / socket.gethostname() / name


def abandoned_scratch(data_dir: Path) -> Iterator[Path]:
    """The directories of this host whose process is not there any more."""
    for scratch in sorted((data_dir / "scratch").glob(f"*/{socket.gethostname()}/*-*-*")):
        process = scratch.name.split("-")[1]
        if not (process.isdigit() and psutil.pid_exists(int(process))):
            yield scratch


def sweep_scratch(data_dir: Path) -> None:
    """Remove the directories whose process was killed before it could."""
    for scratch in abandoned_scratch(data_dir):
        remove_scratch(scratch)


def remove_scratch(scratch: Path) -> None:
    """Remove a job's directory, and its parents where nothing else is in them."""
    shutil.rmtree(scratch, ignore_errors=True)
    for parent in list(scratch.parents)[:3]:
        with contextlib.suppress(OSError):
            parent.rmdir()
