"""The process that owns the embedded Postgres: starts it, restarts it, and stops it after its last client.

Run by `embedded.py` in a session of its own and as nobody's child, so that neither Ctrl-C nor the end of a
client reaches it.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from orchestrator.adapters.postgres.cluster import (
    STOP_STEPS,
    create_cluster,
    ends_with_parent,
    postmaster_file,
    server_environment,
    stop_leftovers,
)
from orchestrator.adapters.postgres.file_lock import open_lock_file, try_lock
from orchestrator.adapters.postgres.server_files import (
    Account,
    ServerFiles,
    ServerState,
    find_binaries,
    remove_scratch,
    server_account,
)
from orchestrator.domain.errors import InfrastructureError, OrchestratorError

TICK_SECONDS = 0.3
STARTING_TICK_SECONDS = 0.05
MAX_FIRST_STARTS = 3
MAX_BACKOFF_SECONDS = 5.0
MAX_LOG_BYTES = 16 * 2**20
# Below the range from which kernels take ports for outgoing connections: a restart finds its port still free.
PORTS = range(20_000, 30_000)

SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "200",
    "shared_buffers": "64MB",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "max_wal_size": "512MB",
    "jit": "off",
    # Statements and values stay out of the log: they hold messages of others, and secrets.
    "log_min_error_statement": "panic",
    "log_error_verbosity": "terse",
    "log_checkpoints": "off",
    "log_timezone": "UTC",
    "timezone": "UTC",
}


class Server:
    """The postgres process under one data directory."""

    def __init__(self, files: ServerFiles, binaries: Path, account: Account, port: int | None) -> None:
        self._files = files
        self._binaries = binaries
        self._account = account
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None
        self._accepts = False
        self._accepted_once = False
        self._failures = 0
        self._start_at = 0.0

    def tick(self) -> float:
        """Bring the server one step towards accepting connections; the seconds until the next step.

        Raises:
            InfrastructureError: it never came up and will not by itself.
        """
        if self._process is not None and self._process.poll() is not None:
            self._ended(self._process.returncode)
        if self._process is None:
            if time.monotonic() >= self._start_at:
                self._start()
        elif not self._accepts and self._is_ready(self._process.pid):
            self._publish(self._process.pid)
        return TICK_SECONDS if self._accepts else STARTING_TICK_SECONDS

    def stop(self) -> None:
        """Stop the server: sessions are ended at once, then without a checkpoint, then by force."""
        if self._process is None:
            return
        for how, seconds in STOP_STEPS:
            self._process.send_signal(how)
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                continue
            return

    def _start(self) -> None:
        stop_leftovers(self._files.pgdata)
        if self._port is None or not (self._accepted_once or _is_free(self._port)):
            self._port = _free_port()
        options = [f"-c{name}={value}" for name, value in {**SETTINGS, "port": str(self._port)}.items()]
        self._process = subprocess.Popen(
            [str(self._binaries / "postgres"), "-D", str(self._files.pgdata), *options],
            stdin=subprocess.DEVNULL,
            cwd="/",
            env=server_environment(),
            start_new_session=True,
            user=self._account.uid,
            group=self._account.gid,
            extra_groups=self._account.groups,
            preexec_fn=ends_with_parent(signal.SIGINT),
        )

    def _ended(self, code: int) -> None:
        _say(f"postgres ended with code {code}")
        self._process = None
        self._accepts = False
        self._failures += 1
        if not self._accepted_once and self._failures >= MAX_FIRST_STARTS:
            raise InfrastructureError(f"postgres ended {self._failures} times before it was ready")
        self._start_at = time.monotonic() + min(0.1 * 2**self._failures, MAX_BACKOFF_SECONDS)

    def _is_ready(self, pid: int) -> bool:
        lines = postmaster_file(self._files.pgdata)
        return len(lines) >= 8 and lines[0] == str(pid) and lines[7] == "ready"

    def _publish(self, pid: int) -> None:
        assert self._port is not None
        self._files.write_state(ServerState(port=self._port, pid=pid, guardian_pid=os.getpid()))
        self._accepts = self._accepted_once = True
        self._failures = 0


def main() -> int:
    """Guard the server of `--data-dir` until its last client is gone."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--lock-descriptor", type=int, required=True)
    parser.add_argument("--port", type=int)
    arguments = parser.parse_args()
    _leave_the_starter()
    os.set_inheritable(arguments.lock_descriptor, False)
    stop_requests = _stop_requests()
    try:
        _guard(ServerFiles(arguments.data_dir), arguments.port, stop_requests)
    except (OrchestratorError, OSError, subprocess.SubprocessError) as error:
        _say(str(error))
        return 1
    return 0


def _leave_the_starter() -> None:
    """Go on as nobody's child; the locks come along.

    `ray job stop` ends a command with all of its descendants, and would take the database from the control
    plane that has to clean up after it.
    """
    if os.fork() > 0:
        os._exit(0)


def _guard(files: ServerFiles, port: int | None, stop_requests: list[int]) -> None:
    remove_scratch(files)
    account = server_account(files)
    binaries = find_binaries(files, account)
    create_cluster(files, binaries, account)
    pool_lock = open_lock_file(files.pool_lock)
    server = Server(files, binaries, account, port)
    try:
        while not stop_requests and not try_lock(pool_lock, exclusive=True):
            time.sleep(server.tick())
            _bound_log()
    finally:
        # The locks end with this process: who finds them free finds nothing of the server either.
        server.stop()
        files.clear_state()


def _free_port() -> int:
    for port in random.sample(PORTS, 100):
        if _is_free(port):
            return port
    raise InfrastructureError(f"no free port on 127.0.0.1 between {PORTS.start} and {PORTS.stop}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _stop_requests() -> list[int]:
    """The termination signals that came so far; the others of a terminal are ignored."""
    requests: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        requests.append(number)

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    return requests


def _bound_log() -> None:
    # Opened for appending, so that cutting it under the server's feet leaves no hole.
    if os.fstat(sys.stderr.fileno()).st_size > MAX_LOG_BYTES:
        os.ftruncate(sys.stderr.fileno(), 0)


def _say(text: str) -> None:
    print(f"guardian: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
