"""Blocking calls that may never return, and a program that ends all the same."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from orchestrator.waiting import DaemonThread, on_a_thread


async def test_calls_are_made_one_after_the_other_on_one_thread() -> None:
    thread = DaemonThread()

    names = [await thread.call(threading.get_ident) for _ in range(2)]
    thread.end()

    assert names[0] == names[1] != threading.get_ident()


async def test_what_a_call_raises_is_raised_to_its_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        await on_a_thread(lambda: 1 // 0)


ENDS_WITH_A_CALL_THAT_HANGS = """
import asyncio, threading
from orchestrator.waiting import on_a_thread

async def main():
    hangs = threading.Event()
    try:
        async with asyncio.timeout(0.05):
            await on_a_thread(hangs.wait)
    except TimeoutError:
        print("given up")

asyncio.run(main())
"""


def test_a_program_does_not_wait_for_a_call_that_hangs() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDS_WITH_A_CALL_THAT_HANGS],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )

    assert (done.stdout, done.stderr) == ("given up\n", "")
