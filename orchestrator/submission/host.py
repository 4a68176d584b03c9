"""The first program in a submission's container: takes the archive, then becomes its policy server.

`python -m orchestrator.submission.host --port-file FILE --directory WORKDIR --key-fd N`. The listening
socket is handed on through exec, so that no connection is ever refused in between.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import queue
import secrets
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.submission.archive import ArchiveLimits, ArchiveRefused, unpack
from orchestrator.submission.door import DEFAULT_CONNECTIONS, Door
from orchestrator.submission.handshake import HostState, reply, send_message
from orchestrator.submission.policy_server import EXIT_NOT_LOADED, LINGER_AFTER_FAILURE_SECONDS
from orchestrator.submission.startup import UnusableKey, end_on_signals, take_session_key
from orchestrator.submission.transport import ByteStream

GREETING = "waiting for an archive on "  # begins the log of every container
CHUNK_BYTES = 256 * 1024
REPLY_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Unpacked:
    """An archive that is ready to be served."""

    directory: Path
    sha256: str


class SubmissionHost:
    """Waits for one archive below `workdir`; `outcome` gets what came of it, once."""

    def __init__(
        self, workdir: Path, max_archive_bytes: int, limits: ArchiveLimits, push_seconds: float
    ) -> None:
        self._workdir = workdir
        self._max_archive_bytes = max_archive_bytes
        self._limits = limits
        self._push_seconds = push_seconds
        self._lock = threading.Lock()
        self._state = HostState.WAITING
        self._error: str | None = None
        self._pusher: ByteStream | None = None
        self._sha256: str | None = None
        self.outcome: queue.SimpleQueue[Unpacked | None] = queue.SimpleQueue()

    def welcome(self, stream: ByteStream, request: dict[str, Any] | None, deadline: float) -> None:
        """Answer the one request of a connection that holds the key."""
        operation = None if request is None else request.get("op")
        if request is not None and operation == "push":
            self._take_push(stream, request, deadline)
            return
        state, error = self._state, self._error
        ok = state is not HostState.FAILED
        if operation == "policy":
            ok, error = False, error or f"the submission host is {state.value}"
        elif operation != "status":
            ok, error = False, f"unknown operation {str(operation)[:32]!r}"
        send_message(stream, reply(ok, state, error), deadline)

    def _take_push(self, stream: ByteStream, request: dict[str, Any], deadline: float) -> None:
        size, sha256 = request.get("size"), request.get("sha256")
        if type(size) is not int or size < 0 or not isinstance(sha256, str):
            send_message(stream, reply(False, self._state, "a push needs size and sha256"), deadline)
            return
        if size > self._max_archive_bytes:
            self._fail(f"an archive of {size} bytes, above the limit of {self._max_archive_bytes}")
        if not self._become_pusher(stream):
            with self._lock:
                state, error, held = self._state, self._error, self._sha256
            if state is HostState.LOADING and sha256 != held:
                error = "another archive is here already"
            send_message(stream, reply(error is None, state, error), deadline)
            return
        send_message(stream, reply(True, HostState.WAITING), deadline)
        path = self._workdir / f"archive-{secrets.token_hex(8)}"
        try:
            self._receive_and_unpack(stream, path, size, sha256)
        finally:
            path.unlink(missing_ok=True)

    def _become_pusher(self, stream: ByteStream) -> bool:
        with self._lock:
            if self._state is not HostState.WAITING:
                return False
            # Who pushes again has given the last connection up, also where its end did not reach us yet.
            if self._pusher is not None:
                self._pusher.abort()
            self._pusher = stream
            return True

    def _receive_and_unpack(self, stream: ByteStream, path: Path, size: int, sha256: str) -> None:
        digest = self._receive(stream, path, size)
        with self._lock:
            if self._state is not HostState.WAITING or self._pusher is not stream:
                return
            if digest == sha256:
                self._state, self._sha256 = HostState.LOADING, sha256
            answer = reply(digest == sha256, self._state, None if digest == sha256 else "the sha256 differs")
        try:
            send_message(stream, answer, time.monotonic() + REPLY_SECONDS)
        finally:
            # The pusher may be gone; the archive is held all the same, and whoever asks next is told.
            if digest == sha256:
                self._unpack(path, sha256)

    def _receive(self, stream: ByteStream, path: Path, size: int) -> str:
        deadline = time.monotonic() + self._push_seconds
        digest, left = hashlib.sha256(), size
        buffer = memoryview(bytearray(CHUNK_BYTES))
        with path.open("xb") as target:
            while left:
                count = stream.receive_into(buffer[: min(left, CHUNK_BYTES)], deadline)
                digest.update(buffer[:count])
                target.write(buffer[:count])
                left -= count
        return digest.hexdigest()

    def _unpack(self, path: Path, sha256: str) -> None:
        try:
            directory = unpack(path, self._workdir / "submission", self._limits)
        except ArchiveRefused as refused:
            self._fail(f"the archive was refused: {refused}")
        else:
            path.unlink()  # before exec: there is no later
            self.outcome.put(Unpacked(directory, sha256))

    def _fail(self, reason: str) -> None:
        with self._lock:
            if self._state is HostState.FAILED:
                return
            self._state, self._error = HostState.FAILED, reason
        print(reason, file=sys.stderr, flush=True)
        self.outcome.put(None)


# ------------------------------------------------------------------------------------------- process


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator.submission.host",
        description="Wait for a submission's archive, then serve it. The session key comes from --key-fd or "
        "from the environment variable ORCHESTRATOR_SESSION_KEY.",
    )
    parser.add_argument("--directory", type=Path, required=True, help="where to unpack; made if missing")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 (the default) takes a free one")
    parser.add_argument("--port-file", type=Path, help="gets the port once connections are accepted")
    parser.add_argument("--key-fd", type=int, help="a descriptor to read the session key from")
    parser.add_argument("--load-timeout", type=float, default=600.0, help="seconds for the agent to load")
    parser.add_argument("--push-timeout", type=float, default=600.0, help="seconds for one push")
    parser.add_argument("--max-archive-bytes", type=int, default=4 * 2**30)
    parser.add_argument("--max-unpacked-bytes", type=int, default=ArchiveLimits().unpacked_bytes)
    parser.add_argument("--max-files", type=int, default=ArchiveLimits().files)
    parser.add_argument("--connections", type=int, default=DEFAULT_CONNECTIONS, help="at most, at once")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until it becomes the policy server; 1 when the archive was refused, 2 for wrong usage."""
    options = _parse(arguments)
    end_on_signals()
    try:
        session_key = take_session_key(options.key_fd, os.environ)
        if session_key is None:
            raise UnusableKey("there is no session key")
        options.directory.mkdir(parents=True, exist_ok=True)
        listener = socket.create_server((options.host, options.port), backlog=128)
    except (OSError, UnusableKey) as error:
        print(f"submission host: {error}", file=sys.stderr)
        return 2
    limits = ArchiveLimits(unpacked_bytes=options.max_unpacked_bytes, files=options.max_files)
    workdir = options.directory.resolve()
    host = SubmissionHost(workdir, options.max_archive_bytes, limits, options.push_timeout)
    Door(listener, session_key, host.welcome, connections=options.connections).open()
    if options.port_file is not None:
        _write_port(options.port_file, listener.getsockname()[1])
    print(f"{GREETING}{options.host}:{listener.getsockname()[1]}", flush=True)
    unpacked = host.outcome.get()
    if unpacked is None:
        time.sleep(LINGER_AFTER_FAILURE_SECONDS)  # so that whoever asks is told why
        return EXIT_NOT_LOADED
    _become_policy_server(listener, session_key, unpacked, options)
    return EXIT_NOT_LOADED


def _write_port(path: Path, port: int) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(f"{port}\n")
    partial.replace(path)


def _become_policy_server(
    listener: socket.socket, session_key: bytes, unpacked: Unpacked, options: argparse.Namespace
) -> None:
    """Replace this program in the same process; who connects meanwhile waits in the socket's backlog."""
    key_reader, key_writer = os.pipe()
    os.write(key_writer, session_key)
    os.close(key_writer)
    os.set_inheritable(key_reader, True)
    listener.set_inheritable(True)
    program = [
        sys.executable,
        "-u",  # what the agent prints is in the log even when it is killed
        "-P",  # nothing in the submission's directory may stand in for a module of this server
        *("-m", "orchestrator.submission.policy_server"),
        *("--directory", str(unpacked.directory)),
        *("--listen-fd", str(listener.fileno())),
        *("--key-fd", str(key_reader)),
        *("--archive-sha256", unpacked.sha256),
        *("--load-timeout", str(options.load_timeout)),
        *("--connections", str(options.connections)),
    ]
    os.execv(sys.executable, program)  # noqa: S606 - there is no shell to avoid


if __name__ == "__main__":
    sys.exit(main())
