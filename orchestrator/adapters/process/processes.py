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
_QUIET_ROUNDS = 3
_PAUSE_SECONDS = 0.01
_CHASE_SECONDS = 1.0


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
    return _identity(pid, zombies=False)


def started_at(pid: int) -> ProcessIdentity:
    """The process with this number, zombie or not.

    Raises:
        ProcessLookupError: there is none.
    """
    identity = _identity(pid, zombies=True)
    if identity is None:
        raise ProcessLookupError(pid)
    return identity


def _identity(pid: int, zombies: bool) -> ProcessIdentity | None:
    started = _start_on_linux(pid, zombies) if ON_LINUX else _start_by_psutil(pid, zombies)
    return None if started is None else ProcessIdentity(pid, started)


def _start_on_linux(pid: int, zombies: bool) -> int | None:
    # psutil adds the boot time, which moves when the system's clock is set; the ticks never move.
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") and not zombies else int(fields[19])


def _start_by_psutil(pid: int, zombies: bool) -> int | None:
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
    return [child for child in children if identity_of(child.pid) is not None]


def marked_processes() -> Iterator[tuple[ProcessIdentity, str]]:
    """Every process, this one left out, whose environment carries the marker, with the marker's value.

    The youngest come first where numbers grow: a process that lives for a moment is seen within it.
    """
    for pid in sorted(psutil.pids(), reverse=True):
        value = None if pid == os.getpid() else _marker_of(pid)
        identity = None if value is None else _identity(pid, zombies=True)
        if value is not None and identity is not None:
            yield identity, value


def marked_with(value: str) -> Iterator[ProcessIdentity]:
    """Every process but this one whose marker has this value."""
    return (identity for identity, found in marked_processes() if found == value)


def _marker_of(pid: int) -> str | None:
    try:
        if not ON_LINUX:
            return psutil.Process(pid).environ().get(MARKER)
        environment = Path(f"/proc/{pid}/environ").read_bytes()  # empty for a zombie
    except (psutil.Error, OSError):
        return None
    start = environment.find(f"{MARKER}=".encode())
    if start < 0 or (start > 0 and environment[start - 1] != 0):
        return None
    return environment[start:].split(b"\0", 1)[0].decode(errors="replace").partition("=")[2]


def end_all(find: Callable[[], Iterable[ProcessIdentity]], timeout_seconds: float) -> bool:
    """Kill what `find` finds, with its groups, until it finds nothing; False if the time is over before.

    A process that is replaced faster than one can look may hide from this; from `end_children` it cannot.
    """
    deadline = time.monotonic() + timeout_seconds
    quiet_rounds = 0
    while quiet_rounds < _QUIET_ROUNDS:  # a process amid exec shows no environment: one look proves nothing
        quiet_rounds += 1
        for identity in find():
            quiet_rounds = 0
            _kill_with_group(identity)
        if quiet_rounds == 0 and time.monotonic() > deadline:
            return False
        time.sleep(_PAUSE_SECONDS)
    return True


def end_children(timeout_seconds: float, reap: Callable[[], bool]) -> bool:
    """Kill everything below this process, a subreaper; False if the time is over before.

    `reap` collects the children that ended and says whether none is left, dead or alive. Who loses its parent
    becomes our child, so no child left is the proof that nothing is left at all.
    """
    began = time.monotonic()
    while not reap():
        for pid in _children():
            with contextlib.suppress(ProcessLookupError):
                _kill_with_group(started_at(pid))
        elapsed = time.monotonic() - began
        if elapsed > timeout_seconds:
            return False
        # At first without rest: a chain of processes, each of which lives for a moment, has to be outrun.
        time.sleep(0 if elapsed < _CHASE_SECONDS else _PAUSE_SECONDS)
    return True


def _children() -> list[int]:
    try:
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_bytes().split()]
    except OSError:  # a kernel without CONFIG_PROC_CHILDREN
        return [child.pid for child in psutil.Process().children()]


def _kill_with_group(identity: ProcessIdentity) -> None:
    # The kernel kills a group at one stroke: no member can fork itself out of it. A zombie still tells its
    # group. Every group of a container is of a session of its own, so nobody else is in it.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        group, session = os.getpgid(identity.pid), os.getsid(identity.pid)
        if session != os.getsid(0) and started_at(identity.pid) == identity:
            os.killpg(group, signal.SIGKILL)
    send_signal(identity, signal.SIGKILL)
