"""What a shim watches: memory and disk of the whole container, its lifetime, and whom it depends on."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from orchestrator.adapters.process.processes import descendants
from orchestrator.adapters.process.scratch import ContainerDirectory, End, EndKind, ShimSpec

_BLOCK_BYTES = 512  # the unit of st_blocks, whatever the file system's blocks are
_COST_FACTOR = 20.0


@dataclass(slots=True)
class Watch:
    """A probe that is repeated, but never takes more than one part in 20 of the shim's time."""

    probe: Callable[[], End | None]
    interval_seconds: float
    due_at: float = 0.0

    def look(self) -> End | None:
        """What the probe says, and when to look again."""
        began = time.monotonic()
        end = self.probe()
        now = time.monotonic()
        self.due_at = now + max(self.interval_seconds, _COST_FACTOR * (now - began))
        return end


def watches_for(spec: ShimSpec, directory: ContainerDirectory, shim_pid: int) -> list[Watch]:
    """The watches that this container needs."""
    # The monotonic clock: a clock that is set in the meantime ends no container.
    expires_at = time.monotonic() + spec.expires_at - time.time()

    def lifetime() -> End | None:
        if time.monotonic() < expires_at:
            return None
        return End(EndKind.EXPIRED, "lifetime exceeded")

    def surroundings() -> End | None:
        if spec.watched is not None and not spec.watched.alive:
            return End(EndKind.NODE_GONE, "the process that it depends on is gone")
        if not directory.spec_file.exists():
            return End(EndKind.STOPPED, "its directory was removed")
        return None

    watches = [Watch(lifetime, 0.1), Watch(surroundings, 0.5)]
    if spec.memory_bytes is not None:
        watches.append(Watch(partial(check_memory, shim_pid, spec.memory_bytes), 0.1))
    if spec.disk_bytes is not None:
        watches.append(Watch(partial(check_disk, directory.home, spec.disk_bytes), 0.5))
    return watches


def check_memory(shim_pid: int, limit_bytes: int) -> End | None:
    """The end of a container whose processes hold more resident memory than they may."""
    processes = descendants(shim_pid)
    # Resident sizes count a shared page once for each process: a hint. Proportional ones are exact, but dear.
    if sum(map(_resident_bytes, processes)) <= limit_bytes:
        return None
    used = sum(map(_proportional_bytes, processes))
    if used <= limit_bytes:
        return None
    return End(EndKind.OUT_OF_MEMORY, f"out of memory: {used} bytes of {limit_bytes} allowed")


def check_disk(directory: Path, limit_bytes: int) -> End | None:
    """The end of a container that fills its directory; at the limit already, for no file may grow past it."""
    used = disk_bytes(directory)
    if used < limit_bytes:
        return None
    return End(EndKind.OUT_OF_DISK, f"out of disk: {used} bytes of {limit_bytes} allowed")


def disk_bytes(directory: Path) -> int:
    """Bytes that the files below a directory take on disk; links are not followed."""
    total = 0
    pending = [os.fspath(directory)]
    while pending:
        with contextlib.suppress(OSError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    total += entry.stat(follow_symlinks=False).st_blocks * _BLOCK_BYTES
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
    return total


def _resident_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def _proportional_bytes(process: psutil.Process) -> int:
    try:
        full = process.memory_full_info()
    except (psutil.Error, OSError):
        return _resident_bytes(process)
    return int(getattr(full, "pss", 0) or full.rss)
