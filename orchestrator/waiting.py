"""Waits that a cancelled command must still see to their end, and others that it must not."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which runs to its end though we are cancelled meanwhile; then that is raised.

    `asyncio.shield` alone returns at once when cancelled, and leaves the work running beside what follows.
    """
    task = asyncio.create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})  # being cancelled here does not cancel the task
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # seen
        raise cancelled
    return task.result()


class DaemonThread:
    """A thread for blocking calls that may never return.

    At its end a program waits for the threads of `asyncio.to_thread`, and for ever for one that hangs; it
    does not wait for this one. The thread lives until `end`, for what a call starts may die with its thread
    (PR_SET_PDEATHSIG), as the processes of `ray.init` do.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="blocking-calls", daemon=True).start()

    def call(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """What `function` returns or raises, after the calls before it."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            settle: Callable[[], None]
            try:
                settle = partial(_set_result, future, function())
            except BaseException as error:  # noqa: BLE001 - it is raised again where the future is awaited
                settle = partial(_set_exception, future, error)
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(settle)

        self._calls.put(run)
        return future

    def end(self) -> None:
        """Let the thread end after the calls before this one."""
        self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()


def on_a_thread(function: Callable[[], T]) -> asyncio.Future[T]:
    """What `function` returns or raises, called on a `DaemonThread` of its own."""
    thread = DaemonThread()
    try:
        return thread.call(function)
    finally:
        thread.end()


def _set_result(future: asyncio.Future[T], result: T) -> None:
    if not future.done():  # else nobody waits any more
        future.set_result(result)


def _set_exception(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
