"""A submission that serves the policy protocol itself: its `main.py`, a process below the submission host.

It listens on loopback and knows no session key: in a pod nobody else is there, while every process of a
development machine could talk to it.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from orchestrator.submission.archive import SERVER_FILE
from orchestrator.submission.children import Children, Stopping, wait_with_group
from orchestrator.submission.transport import ByteStream, ConnectionLost, open_websocket
from orchestrator.submission.wire import WireError, WireLimits, unpackb

HOST = "127.0.0.1"
MAX_METADATA_BYTES = 2**20
_CONNECT_SECONDS = 10.0
_FIRST_PAUSE_SECONDS = 0.02
_LONGEST_PAUSE_SECONDS = 0.5
_SHOWN_CHARACTERS = 2000


class DoesNotServe(Exception):
    """main.py cannot be used, for the reason in the text."""


class OwnServer:
    """`main.py` of one directory, started as `python main.py --host HOST --port PORT` there.

    `on_end` is called with its exit code, as `subprocess` gives it, from another thread.
    """

    def __init__(self, directory: Path, children: Children, on_end: Callable[[int], None]) -> None:
        self._directory = directory
        self._children = children
        self._on_end = on_end
        self._ended = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0
        self._where = ""

    @property
    def where(self) -> str:
        """How far it has come until it serves."""
        return self._where

    def start(self, python: str, environ: Mapping[str, str]) -> None:
        """Start it.

        Raises:
            Stopping: this process is about to end.
            OSError: it cannot be started.
        """
        self._port = _free_port()
        command = [python, "-u", SERVER_FILE, "--host", HOST, "--port", str(self._port)]
        self._where = f"{SERVER_FILE} runs, and does not listen on its --port ({self._port}) yet"
        process = self._children.start(command, cwd=self._directory, environ=environ)
        self._process = process
        threading.Thread(target=self._wait, args=(process,), name="main.py", daemon=True).start()

    def stop(self) -> None:
        """End it, and return when it has ended."""
        if self._process is not None:
            self._children.end(self._process)

    def wait_serving(self, deadline: float) -> None:
        """Return when it accepts a connection and sends its metadata.

        Raises:
            DoesNotServe: it ended before, does not speak the protocol, or the deadline passed.
            Stopping: it was ended because this process is about to end.
        """
        pause = _FIRST_PAUSE_SECONDS
        while not self._ended.is_set():
            try:
                self._try_connection(deadline)
                return
            except WireError as error:
                raise DoesNotServe(f"{SERVER_FILE} does not speak the policy protocol: {error}") from None
            except ConnectionLost:
                pass  # it does not listen yet, or ends
            except TimeoutError:
                break
            if time.monotonic() >= deadline:
                break
            self._ended.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        if self._ended.is_set():
            assert self._process is not None
            if self._children.stopping:
                raise Stopping
            raise DoesNotServe(_early_end(self._process.wait()))
        raise DoesNotServe(f"{SERVER_FILE} did not serve in time: {self._where}")

    def connect(self, deadline: float) -> ByteStream:
        """A connection to it.

        Raises:
            ConnectionLost, TimeoutError.
        """
        return ByteStream.connect(HOST, self._port, deadline)

    def _try_connection(self, deadline: float) -> None:
        """One connection as a worker makes it, until the metadata is there."""
        soon = min(deadline, time.monotonic() + _CONNECT_SECONDS)
        stream = self.connect(max(soon, time.monotonic() + 0.1))
        try:
            self._where = f"{SERVER_FILE} listens on its --port, and does not answer as a WebSocket server"
            websocket = open_websocket(stream, HOST, self._port, "/", MAX_METADATA_BYTES, deadline)
            self._where = f"{SERVER_FILE} accepts a connection, and does not send its metadata"
            _check_metadata(websocket.receive(deadline))
            websocket.close()
        finally:
            stream.close()

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        code = wait_with_group(process)
        self._on_end(code)  # before anybody is told that it does not serve
        self._ended.set()


def _check_metadata(message: bytes | bytearray | str) -> None:
    if isinstance(message, str):
        raise WireError(f"in place of its metadata it sent a text: {message[-_SHOWN_CHARACTERS:]}")
    metadata = unpackb(message, limits=WireLimits(frame_bytes=MAX_METADATA_BYTES))
    if not isinstance(metadata, dict):
        raise WireError(f"its metadata is a {type(metadata).__name__}, not a map")


def _early_end(code: int) -> str:
    if code == 0:
        return f"{SERVER_FILE} ended with exit code 0 before it served: it has to run until it is stopped"
    if code < 0:
        return f"{SERVER_FILE} was killed by {_signal_name(-code)} before it served: see its log"
    return f"{SERVER_FILE} ended with exit code {code} before it served: see its log"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
