"""Passes the bytes of a connection through to another one, both ways, each end told apart."""

from __future__ import annotations

import threading
import time

from orchestrator.submission.transport import ByteStream, ConnectionLost

BUFFER_BYTES = 64 * 1024
STALL_SECONDS = 60.0  # for a peer that takes nothing, and for the second end after the first


class Relay:
    """Connections that are being passed through."""

    def __init__(self, stall_seconds: float = STALL_SECONDS) -> None:
        self._stall_seconds = stall_seconds
        self._changed = threading.Condition()
        self._answering = 0

    def run(self, client: ByteStream, server: ByteStream) -> None:
        """Returns when both directions have ended, or one of the peers is gone or stalls; closes neither.

        Whoever ends its own direction is still answered, within the time for a stall.
        """
        answered = threading.Event()

        def ask() -> None:
            self._pass_on(client, server)
            if not answered.wait(self._stall_seconds):
                _abort(client, server)

        with self._changed:
            self._answering += 1
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        try:
            self._pass_on(server, client)
        finally:
            answered.set()
            with self._changed:
                self._answering -= 1
                self._changed.notify_all()
        asking.join(self._stall_seconds)
        _abort(client, server)
        asking.join()

    def wait_answered(self, timeout_seconds: float) -> None:
        """Return when all that the servers have sent is on its way, or the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._answering == 0, timeout_seconds)

    def _pass_on(self, source: ByteStream, target: ByteStream) -> None:
        buffer = memoryview(bytearray(BUFFER_BYTES))
        try:
            while count := source.receive_some(buffer, None):
                target.send_all(buffer[:count], time.monotonic() + self._stall_seconds)
            target.finish_sending()
        except (ConnectionLost, TimeoutError):
            _abort(source, target)


def _abort(*streams: ByteStream) -> None:
    for stream in streams:
        stream.abort()
