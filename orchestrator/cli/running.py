"""Runs a command to its exit code: errors become one line on stderr, signals end it after clean-up."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import sys
import traceback
from collections.abc import Coroutine
from typing import Any

import typer

from orchestrator.domain.errors import OrchestratorError, SubmissionError, UsageError
from orchestrator.logging import configure_logging

COMPLETED, SUBMISSION_FAILED, WRONG_USAGE, INFRASTRUCTURE_FAILED, INTERRUPTED = 0, 1, 2, 3, 130


def run_command(work: Coroutine[Any, Any, int], *, debug: bool) -> None:
    """Run to the end and exit: errors become one line on stderr and an exit code, Ctrl-C cleans up first."""
    configure_logging("console" if debug else "auto", "DEBUG" if debug else "ERROR")
    try:
        code = _run(work)
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError as error:
        code = COMPLETED if _nobody_reads() else _report(error, debug)
    except BaseExceptionGroup as group:
        code = _report(_leaf(group), debug)
    except Exception as error:  # noqa: BLE001
        # Whatever it is, a person gets one line and an exit code that means what it says.
        code = _report(error, debug)
    _nobody_reads()
    raise typer.Exit(code)


def _nobody_reads() -> bool:
    """Flush stdout; whether its reader has seen enough and gone (`| head`), which is no error of ours."""
    try:
        sys.stdout.flush()
        # Without a buffer there is nothing to flush, so ask: a pipe that nobody reads is in error.
        pipe = select.poll()
        pipe.register(sys.stdout.fileno(), 0)
        gone = any(event & select.POLLERR for _, event in pipe.poll(0))
    except BrokenPipeError:
        gone = True
    except (OSError, ValueError):  # closed, or no real file
        return False
    if gone:
        # At exit Python flushes once more, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def _run(work: Coroutine[Any, Any, int]) -> int:
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        # SIGTERM and SIGHUP end a command as Ctrl-C does: everything that it started is taken down.
        task = loop.create_task(work)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, _interrupt, task)
        return runner.run(_result_of(task))


def _interrupt(task: asyncio.Task[int]) -> None:
    """Cancel once: a second signal would cancel the clean-up, and leave things behind."""
    if task.cancelling():
        print("cleaning up already", file=sys.stderr)
    else:
        task.cancel()


async def _result_of(task: asyncio.Task[int]) -> int:
    return await task


def _report(error: BaseException, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    known = isinstance(error, OrchestratorError)
    text = str(error) if known else f"{type(error).__name__}: {error} (--debug shows where)"
    print(f"error: {text}", file=sys.stderr)
    if isinstance(error, UsageError):
        return WRONG_USAGE
    if isinstance(error, SubmissionError):
        return SUBMISSION_FAILED
    return INFRASTRUCTURE_FAILED


def _leaf(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
