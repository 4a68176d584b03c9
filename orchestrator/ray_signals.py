"""SIGTERM stays ours while this process belongs to a Ray cluster: it has to clean up before it ends."""

from __future__ import annotations

import asyncio
import signal
import threading
from typing import Any

LOOK_EVERY_SECONDS = 0.05


async def settled(call: asyncio.Future[Any], timeout_seconds: float) -> bool:
    """Whether a call to Ray has ended in time, in whatever way; SIGTERM is ours meanwhile and after it."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_seconds
    try:
        while not call.done() and (left := deadline - loop.time()) > 0:
            # Not `wait_for`, which in Python 3.11 forgets a cancellation where the call has just ended.
            await asyncio.wait({call}, timeout=min(left, LOOK_EVERY_SECONDS))
            take_sigterm_back()
    finally:
        take_sigterm_back()
    return call.done()


def take_sigterm_back() -> None:
    """Put the handler that Python knows of SIGTERM in place again.

    `ray.init` puts one before it that prints a C++ stack and aborts the process 3 s later, whatever is still
    to be cleaned up: https://github.com/ray-project/ray/pull/64830. `ray.shutdown` leaves none at all.
    """
    if threading.current_thread() is not threading.main_thread():
        return  # no other may set handlers
    handler = signal.getsignal(signal.SIGTERM)
    if handler is not None:
        signal.signal(signal.SIGTERM, handler)
        signal.siginterrupt(signal.SIGTERM, False)  # as asyncio has it
    signal.alarm(0)  # by which Ray's handler, if it was there for a moment, would abort
