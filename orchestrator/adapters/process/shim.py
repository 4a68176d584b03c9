"""The shim: the small process between us and one submission, which outlives whoever started it.

`python -m orchestrator.adapters.process.shim DIRECTORY KEY_FD` leaves its parent, starts the submission host
that `DIRECTORY/spec.json` describes, keeps its output and its limits, writes down how it ended, and ends
every process of the container. It imports little, for one stays with every container.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import selectors
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from orchestrator.adapters.process.logs import BoundedLog
from orchestrator.adapters.process.processes import ON_LINUX, end_all, end_children, marked_with, started_at
from orchestrator.adapters.process.scratch import ContainerDirectory, End, EndKind, Processes, ShimSpec
from orchestrator.adapters.process.watches import check_disk, watches_for

STARTED = b"started\n"
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_READ_BYTES = 2**16
_MAX_DRAIN_BYTES = 2**22
_KILL_TIMEOUT_SECONDS = 10.0
_OOM_SCORE = "500"
_MAX_WAIT_SECONDS = 1.0


def main(arguments: list[str]) -> None:
    """Become the shim of a container; returns in the parent at once, in the shim when all is over."""
    directory, key_fd = ContainerDirectory(Path(arguments[0])), int(arguments[1])
    if os.fork() > 0:
        os._exit(0)  # the creator reaps this one; the shim now belongs to init
    os.setsid()
    spec = directory.read_spec()
    if spec is None:
        raise FileNotFoundError(directory.spec_file)
    become_subreaper()
    shim = Shim(directory, spec)
    try:
        host_pid = shim.start(key_fd)
        _report(directory, host_pid)
        end = shim.watch_until_the_end()
    except Exception as error:  # noqa: BLE001 the top of this process: whatever it was has to be on record
        traceback.print_exc()
        end = End(EndKind.SHIM_FAILED, f"the shim failed: {error!r}")
    shim.finish(end)


def become_subreaper() -> None:
    """Make this process the parent of every orphan below it, so that no daemon leaves the container's tree.

    Only on Linux; elsewhere such daemons are found by their marker.
    """
    if ON_LINUX and ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def _report(directory: ContainerDirectory, host_pid: int) -> None:
    # First the record, then the word: whoever heard "started" can find this process again.
    host = started_at(host_pid)
    directory.write_processes(Processes(shim=started_at(os.getpid()), host=host))
    with contextlib.suppress(BrokenPipeError):  # the creator died meanwhile; another one will adopt
        os.write(sys.stdout.fileno(), STARTED)
    with open(os.devnull, "r+b") as nothing:
        os.dup2(nothing.fileno(), sys.stdout.fileno())


class Shim:
    """One container, seen from its shim. Single-threaded: the host is forked from it."""

    def __init__(self, directory: ContainerDirectory, spec: ShimSpec) -> None:
        self._directory = directory
        self._spec = spec
        self._log = BoundedLog(directory.log_file, spec.log_bytes)
        self._output, self._output_writer = os.pipe()
        self._wakeup, self._wakeup_writer = os.pipe()
        for reader in (self._output, self._wakeup, self._wakeup_writer):
            os.set_blocking(reader, False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._output, selectors.EVENT_READ)
        self._selector.register(self._wakeup, selectors.EVENT_READ)
        self._host: subprocess.Popen[bytes] | None = None
        self._host_status: int | None = None
        self._stop_requested = False

    def start(self, key_fd: int) -> int:
        """The process id of the submission host, started in a session of its own.

        The key's pipe goes to it unread.
        """
        self._listen_for_signals()
        self._host = subprocess.Popen(
            self._spec.command,
            env=self._spec.environment,
            cwd=self._directory.home,
            stdin=subprocess.DEVNULL,
            stdout=self._output_writer,
            stderr=self._output_writer,
            pass_fds=[key_fd],
            start_new_session=True,
            preexec_fn=_in_the_host(os.getpid(), self._spec.disk_bytes),
        )
        os.close(key_fd)
        os.close(self._output_writer)
        with contextlib.suppress(OSError):  # where the machine runs out of memory, let it not be our fault
            Path(f"/proc/{self._host.pid}/oom_score_adj").write_text(_OOM_SCORE)
        return self._host.pid

    def watch_until_the_end(self) -> End:
        """Serve the container until the first reason to end it."""
        watches = watches_for(self._spec, self._directory, os.getpid())
        while True:
            for watch in watches:
                if watch.due_at <= time.monotonic() and (end := watch.look()) is not None:
                    return end
            if self._host_status is not None:
                return self._own_end(self._host_status)
            if self._stop_requested:
                return End(EndKind.STOPPED, "stopped on request")
            self._serve(min(watch.due_at for watch in watches) - time.monotonic())

    def finish(self, end: End) -> None:
        """Record the end, with all that was printed before it, then end every process."""
        self._drain()
        with contextlib.suppress(
            OSError
        ):  # disk full, directory removed: the processes have to end all the same
            self._directory.write_end(replace(end, at=time.time()))
        if not self._end_processes():
            print("some processes of the container did not end", file=sys.stderr)
        self._drain()
        self._log.close()

    def _listen_for_signals(self) -> None:
        # Handlers, not SIG_IGN: what is ignored here would be ignored in the submission too.
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, _do_nothing)
        signal.signal(signal.SIGTERM, self._request_stop)
        signal.set_wakeup_fd(self._wakeup_writer, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])

    def _request_stop(self, *_: object) -> None:
        self._stop_requested = True

    def _serve(self, wait_seconds: float) -> None:
        for key, _ in self._selector.select(min(max(wait_seconds, 0.0), _MAX_WAIT_SECONDS)):
            if key.fd == self._output:
                self._copy_output()
            else:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wakeup, _READ_BYTES)
                self._reap()

    def _copy_output(self) -> int:
        try:
            data = os.read(self._output, _READ_BYTES)
        except BlockingIOError:
            return 0
        if data:
            self._log.write(data)
        elif self._output in self._selector.get_map():
            self._selector.unregister(self._output)  # every writer closed it; the host may still run
        return len(data)

    def _drain(self) -> None:
        rest = _MAX_DRAIN_BYTES
        while rest > 0 and (copied := self._copy_output()) > 0:
            rest -= copied

    def _reap(self) -> bool:
        # All children, not the host alone: as a subreaper this process inherits every orphan.
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return True
            if pid == 0:
                return False
            if self._host is not None and pid == self._host.pid:
                self._host_status = status
                self._host.returncode = os.waitstatus_to_exitcode(status)

    def _own_end(self, status: int) -> End:
        code = os.waitstatus_to_exitcode(status)
        limit = self._spec.disk_bytes
        if code != 0 and limit is not None and (full := check_disk(self._directory.home, limit)):
            return replace(full, exit_code=code)  # it died of the limit before the watch saw it
        if code < 0:
            return End(EndKind.SIGNALED, f"killed by {signal_name(-code)}", signal=-code)
        reason = "exited 0 by itself" if code == 0 else f"exit code {code}"
        return End(EndKind.EXITED, reason, exit_code=code)

    def _end_processes(self) -> bool:
        ended = end_children(_KILL_TIMEOUT_SECONDS, self._reap)
        if ON_LINUX:  # nothing leaves a subreaper's tree
            return ended
        return ended and end_all(lambda: marked_with(self._directory.marker), _KILL_TIMEOUT_SECONDS)


def signal_name(number: int) -> str:
    """SIGSEGV for 11; a number without a name stays one."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _do_nothing(*_: object) -> None:
    """A handler that only makes the wake-up pipe readable."""


def _in_the_host(shim_pid: int, disk_bytes: int | None) -> Callable[[], None]:
    # Everything is loaded before the fork; between fork and exec only system calls are safe.
    prctl = ctypes.CDLL(None, use_errno=True).prctl if ON_LINUX else None
    _, most_bytes = resource.getrlimit(resource.RLIMIT_FSIZE)
    if disk_bytes is not None and (most_bytes == resource.RLIM_INFINITY or disk_bytes < most_bytes):
        most_bytes = disk_bytes

    def prepare() -> None:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != shim_pid:  # the shim died before the request was in force
                os._exit(1)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))

    return prepare


if __name__ == "__main__":
    main(sys.argv[1:])
