"""Processes below the submission host, each with all that it starts: none of them outlives the host."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

END_SECONDS = 3.0  # below the time between SIGTERM and SIGKILL that a pod is given


class Stopping(Exception):
    """No process is started any more, and those that run are ended."""


class Children:
    """Starts processes, each in a session of its own, and ends them with their process groups."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._stopping = False

    def start(
        self,
        command: Sequence[str],
        *,
        cwd: Path,
        environ: Mapping[str, str],
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
    ) -> subprocess.Popen[bytes]:
        """A running process that reads nothing.

        Raises:
            Stopping: `end_all` was called.
            OSError: it cannot be started.
        """
        with self._lock:
            if self._stopping:
                raise Stopping
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
            self._processes.append(process)
        return process

    @property
    def stopping(self) -> bool:
        """Whether `end_all` was called: an end from then on is no process's own."""
        return self._stopping

    def end(self, process: subprocess.Popen[bytes], timeout_seconds: float = END_SECONDS) -> None:
        """Ask the process to end, then make it; also what it leaves behind in its group."""
        _signal_group(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout_seconds)
        _signal_group(process, signal.SIGKILL)
        process.wait()

    def end_all(self, timeout_seconds: float = END_SECONDS) -> None:
        """End every process, and start none from now on."""
        with self._lock:
            self._stopping = True
            running = [process for process in self._processes if process.poll() is None]
        for process in running:
            _signal_group(process, signal.SIGTERM)
        deadline = time.monotonic() + timeout_seconds
        for process in running:
            self.end(process, max(0.0, deadline - time.monotonic()))


def wait_with_group(process: subprocess.Popen[bytes], timeout_seconds: float | None = None) -> int:
    """The exit code once the process has ended; what it left behind in its group is killed.

    Raises:
        subprocess.TimeoutExpired: it still runs.
    """
    code = process.wait(timeout_seconds)
    _signal_group(process, signal.SIGKILL)
    return code


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
