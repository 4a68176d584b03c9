"""Processes by identity, by ancestry and by marker: how those of a container are found and ended."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

MARKER = "ORCHESTRATOR_CONTAINER"
ON_LINUX = sys.platform.startswith("linux")
_PAUSE_SECONDS = 0.01
_MAX_FREEZE_ROUNDS = 20


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process that stays the same one when its number is used again.

    `started` is in clock ticks since boot on Linux, elsewhere in milliseconds since 1970.
    """

    pid: int
    started: int

    @property
    def alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        return identity_of(self.pid) == self


def identity_of(pid: int) -> ProcessIdentity | None:
    """The process that has this number now; None where there is none, or only a zombie."""
    started = _start_on_linux(pid) if ON_LINUX else _start_by_psutil(pid)
    return None if started is None else ProcessIdentity(pid, started)


def started_at(pid: int) -> ProcessIdentity:
    """The process with this number, zombie or not.

    Raises:
        ProcessLookupError: there is none.
    """
    started = _start_on_linux(pid, zombies=True) if ON_LINUX else _start_by_psutil(pid, zombies=True)
    if started is None:
        raise ProcessLookupError(pid)
    return ProcessIdentity(pid, started)


def _start_on_linux(pid: int, zombies: bool = False) -> int | None:
    # psutil adds the boot time, which moves when the system's clock is set; the ticks never move.
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") and not zombies else int(fields[19])


def _start_by_psutil(pid: int, zombies: bool = False) -> int | None:
    try:
        process = psutil.Process(pid)
        dead = process.status() == psutil.STATUS_ZOMBIE
        return None if dead and not zombies else int(process.create_time() * 1000)
    except psutil.Error:
        return None


def send_signal(identity: ProcessIdentity, number: signal.Signals) -> None:
    """Signal this very process; nothing where it is gone, also if another one has its number."""
    with contextlib.suppress(psutil.Error):
        # psutil remembers who has the number and checks again right before it sends.
        process = psutil.Process(identity.pid)
        if identity.alive:
            process.send_signal(number)


def descendants(pid: int) -> list[psutil.Process]:
    """Every process below `pid`, zombies left out."""
    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []
    return still_running(children)


def marked_processes() -> Iterator[tuple[psutil.Process, str]]:
    """Every process, this one left out, whose environment carries the marker, with the marker's value."""
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        with contextlib.suppress(psutil.Error, OSError):
            value = process.environ().get(MARKER)
            if value is not None and _runs(process):
                yield process, value


def marked_with(value: str) -> list[psutil.Process]:
    """Every process but this one whose marker has this value."""
    return [process for process, found in marked_processes() if found == value]


def still_running(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those of `processes` that have not ended; a zombie has."""
    return [process for process in processes if _runs(process)]


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.Error:
        return False


def end_all(
    find: Callable[[], list[psutil.Process]],
    timeout_seconds: float,
    after_round: Callable[[], None] = lambda: None,
) -> bool:
    """Kill what `find` finds until it finds nothing more; False if the time is over before that."""
    deadline = time.monotonic() + timeout_seconds
    quiet_rounds = 0
    while quiet_rounds < 2:  # a process amid exec shows no environment: one empty look proves nothing
        found = _freeze(find)
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        after_round()
        quiet_rounds = 0 if found else quiet_rounds + 1
        if found and time.monotonic() > deadline:
            return False
        time.sleep(_PAUSE_SECONDS)
    return True


def _freeze(find: Callable[[], list[psutil.Process]]) -> list[psutil.Process]:
    # Frozen processes do not fork, so a fork bomb cannot outrun the kill that follows.
    frozen: dict[psutil.Process, None] = {}
    for _ in range(_MAX_FREEZE_ROUNDS):
        fresh = [process for process in find() if process not in frozen]
        if not fresh:
            break
        for process in fresh:
            frozen[process] = None
            with contextlib.suppress(psutil.Error):
                process.suspend()
    return list(frozen)
