"""Servers that a test scripts byte by byte, each in a thread of its own."""

from __future__ import annotations

import base64
import hashlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from orchestrator.submission.wire import packb

Script = Callable[["Peer"], None]


def frame(payload: bytes, opcode: int = 2, *, fin: bool = True) -> bytes:
    """A server's WebSocket frame."""
    head = bytes([(0x80 if fin else 0) | opcode])
    if len(payload) < 126:
        return head + bytes([len(payload)]) + payload
    if len(payload) < 65536:
        return head + struct.pack("!BH", 126, len(payload)) + payload
    return head + struct.pack("!BQ", 127, len(payload)) + payload


class Peer:
    """The server's end of the one connection."""

    def __init__(self, sock: socket.socket, finished: threading.Event) -> None:
        self.socket = sock
        self.finished = finished  # set when the test is over
        self.challenge = b""  # what a client with a session key began with
        self.request: dict[str, Any] = {}  # what it asked for then

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def reset(self) -> None:
        """Cut the connection with an RST, now."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def drip(self, data: bytes, seconds: float = 0.02) -> None:
        """A byte at a time, until the test is over."""
        for byte in data:
            self.send(bytes([byte]))
            if self.finished.wait(seconds):
                return

    def read_http_head(self) -> bytes:
        data = b""
        while b"\r\n\r\n" not in data:
            data += self._some()
        return data

    def upgrade(self, metadata: object = None, behind: bytes = b"", header: bytes = b"") -> None:
        """The opening handshake and the metadata, in one write with `behind`; bytes are sent as they are."""
        head = self.read_http_head()
        key = next(
            line.split(b":")[1].strip() for line in head.split(b"\r\n") if b"Sec-WebSocket-Key:" in line
        )
        magic = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key + magic).digest())
        greeting = metadata if isinstance(metadata, bytes) and metadata else frame(packb(metadata or {}))
        self.send(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + accept + b"\r\n" + header + b"\r\n" + greeting + behind
        )

    def read_frame(self) -> tuple[int, bytes]:
        """Opcode and payload of the client's next frame."""
        head = self.exactly(2)
        length = head[1] & 0x7F
        if length == 126:
            (length,) = struct.unpack("!H", self.exactly(2))
        elif length == 127:
            (length,) = struct.unpack("!Q", self.exactly(8))
        mask = self.exactly(4)
        payload = self.exactly(length)
        return head[0] & 0x0F, bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))

    def exactly(self, count: int) -> bytes:
        """So many bytes of the client's."""
        data = b""
        while len(data) < count:
            data += self._some(count - len(data))
        return data

    def _some(self, count: int = 65536) -> bytes:
        data = self.socket.recv(count)
        if not data:
            raise ConnectionError
        return data


@contextmanager
def scripted_server(script: Script, *, clients: int = 1) -> Iterator[int]:
    """The port of a server that plays `script` with its first `clients` clients, one after another."""
    finished = threading.Event()
    failures: list[BaseException] = []

    def run() -> None:
        for _ in range(clients):
            try:
                sock, _ = listener.accept()
            except OSError:
                return  # the test is over, or nobody came
            try:
                sock.settimeout(10)
                with sock:
                    script(Peer(sock, finished))
            except OSError:
                continue  # the client hung up, as it should
            except BaseException as error:
                failures.append(error)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            finished.set()
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread up
            thread.join(20)
    assert not thread.is_alive()
    assert not failures, failures
