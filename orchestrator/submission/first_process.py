"""What the first process of a container owes to the others, and to who wants it to end.

The kernel gives PID 1 no default actions: a signal that it has no handler for is lost, also between two
programs of one process. It inherits every orphan, and has to reap it, while a program that reaps what is not
its own takes the exit codes of its own children away. So where the submission host is PID 1 it does these
things alone, in a few megabytes, and the host itself runs in a process below it.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress

_HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_AWAITED = {*_HANDED_ON, signal.SIGCHLD}
_PR_SET_DUMPABLE = 4


def leave_first_process() -> None:
    """Returns at once, in a child of PID 1 where this process is PID 1; that one ends as the child ends."""
    if os.getpid() == 1:
        _hide_from_other_processes()
        run_below_this_process()


def run_below_this_process() -> None:
    """Returns in a child of this process, which hands its signals on, reaps, and ends as the child ends."""
    # Blocked, so that none is lost before it is waited for; a blocked signal waits, also for PID 1.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    os._exit(_stand_before(child))


def _stand_before(child: int) -> int:
    """The exit code of the child, 128 and more for a signal as a shell has it."""
    while True:
        number = signal.sigwait(_AWAITED)
        if number != signal.SIGCHLD:
            with suppress(ProcessLookupError):
                os.kill(child, number)
            continue
        for pid, status in iter(_reap, None):
            if pid == child:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code


def _reap() -> tuple[int, int] | None:
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, status) if pid else None


def _hide_from_other_processes() -> None:
    """Close `/proc/PID/environ` and memory to processes of the same user: the session key is in there.

    It holds for the child, too, until that starts another program.
    """
    try:
        import ctypes  # where it is needed: not every Python has it

        hidden = ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) == 0
    except (ImportError, OSError, AttributeError):
        hidden = False
    if not hidden:
        print("submission host: a main.py can read the session key of its container", file=sys.stderr)
