"""Advisory file locks (flock) that end with their process: how clients keep the embedded server alive."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator
from pathlib import Path

_POLL_SECONDS = 0.05


def open_lock_file(path: Path) -> int:
    """A descriptor of the lock file, made if need be; not inherited by child processes."""
    # Only its owner may open it: with a lock on it, any user could keep the server up or keep clients out.
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def try_lock(descriptor: int, *, exclusive: bool) -> bool:
    """Whether the lock was had at once. A failed change of mode loses the lock that was held before."""
    mode = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    try:
        fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(descriptor: int) -> None:
    """Give the lock back; silently when none was held."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)


async def wait_for_lock(descriptor: int, *, exclusive: bool) -> None:
    """Return when the lock is held. It has no deadline of its own: callers put a timeout around it."""
    while not try_lock(descriptor, exclusive=exclusive):
        await asyncio.sleep(_POLL_SECONDS)


@contextlib.asynccontextmanager
async def exclusive_lock(path: Path) -> AsyncIterator[None]:
    """Hold the lock for the block. It has no deadline of its own: callers put a timeout around it."""
    descriptor = open_lock_file(path)
    try:
        await wait_for_lock(descriptor, exclusive=True)
        yield
    finally:
        os.close(descriptor)
