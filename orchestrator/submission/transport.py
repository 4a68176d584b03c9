"""A TCP stream and a WebSocket on it, blocking, with one deadline for each whole message.

Deadlines are `time.monotonic()` values; None waits for ever. A peer that drips bytes gains nothing: what
counts is when the message is whole. Three errors: `TimeoutError` (late), `ConnectionLost`, `WireError`.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import time
from collections import deque

from websockets.client import ClientProtocol
from websockets.exceptions import InvalidState, PayloadTooBig
from websockets.frames import Close, Frame, Opcode
from websockets.http11 import Request
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.uri import WebSocketURI

from orchestrator.submission.wire import WireError

RECEIVE_BYTES = 256 * 1024
MAX_HTTP_HEAD_BYTES = 16 * 1024
MAX_FRAGMENTS = 4096
TEXT_CAP_BYTES = 64 * 1024

# websockets logs every frame: thousands of lines an episode, and their time is that of a step.
_QUIET = logging.getLogger("orchestrator.websocket")
_QUIET.setLevel(logging.INFO)

Deadline = float | None


class ConnectionLost(ConnectionError):
    """The peer is gone: refused, reset, closed or half-closed."""


class ByteStream:
    """A connected TCP socket with deadlines. Owns the socket."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)
        self._writable = select.poll()
        self._writable.register(sock, select.POLLOUT)

    @classmethod
    def connect(cls, host: str, port: int, deadline: float) -> ByteStream:
        """Raises TimeoutError or ConnectionLost."""
        try:
            left = max(deadline - time.monotonic(), 0.001)
            return cls(socket.create_connection((host, port), timeout=left))
        except TimeoutError:
            raise TimeoutError(f"no connection to {host}:{port} within the deadline") from None
        except OSError as error:
            raise ConnectionLost(f"no connection to {host}:{port}: {error}") from None

    def receive_into(self, buffer: memoryview, deadline: Deadline) -> int:
        """How many bytes came; at least one."""
        count = self.receive_some(buffer, deadline)
        if count == 0:
            raise ConnectionLost("the peer closed the connection")
        return count

    def receive_some(self, buffer: memoryview, deadline: Deadline) -> int:
        """How many bytes came; none when the peer sends no more."""
        while True:
            _wait(self._readable, deadline)
            try:
                return self._socket.recv_into(buffer)
            except BlockingIOError:
                continue
            except OSError as error:
                raise ConnectionLost(f"the connection broke: {error}") from None

    def receive_exactly(self, count: int, deadline: Deadline) -> bytes:
        """`count` bytes; the caller has capped it. Never reads beyond them."""
        data = bytearray(count)
        view, position = memoryview(data), 0
        while position < count:
            position += self.receive_into(view[position:], deadline)
        return bytes(data)

    def has_pending(self) -> bool:
        """Whether bytes, an end or an error of the connection wait to be read."""
        return bool(self._readable.poll(0))

    def send_all(self, data: bytes | memoryview, deadline: Deadline) -> None:
        view = memoryview(data)
        while True:
            try:
                view = view[self._socket.send(view) :]
            except BlockingIOError:
                pass
            except OSError as error:
                raise ConnectionLost(f"the connection broke: {error}") from None
            if not view:
                return
            _wait(self._writable, deadline)

    def keep_alive(self, idle_seconds: int) -> None:
        """Let the kernel find out when the peer's machine is gone."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_KEEPIDLE"):
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle_seconds)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(idle_seconds // 4, 1))

    def finish_sending(self) -> None:
        """Tell the peer that nothing more comes; it may still send."""
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise ConnectionLost(f"the connection broke: {error}") from None

    def abort(self) -> None:
        """Make every call on this stream end now; safe from another thread."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def close(self) -> None:
        self._socket.close()


def _wait(poller: select.poll, deadline: Deadline) -> None:
    if deadline is None:
        poller.poll()
        return
    left = deadline - time.monotonic()
    if left <= 0 or not poller.poll(left * 1000):
        # poll() may come back a hair early; only the clock decides.
        while (left := deadline - time.monotonic()) > 0:
            if poller.poll(left * 1000):
                return
        raise TimeoutError("the deadline passed")


class WebSocket:
    """Whole messages over one WebSocket connection: no compression, no pings of our own, pings answered."""

    def __init__(self, stream: ByteStream, protocol: ClientProtocol | ServerProtocol, rest: bytes) -> None:
        self._stream = stream
        self._protocol = protocol
        self._buffer = memoryview(bytearray(RECEIVE_BYTES))
        self._messages: deque[bytes | bytearray | str] = deque()
        self._fragments: list[bytes | bytearray] = []
        self._is_text = False
        self._unparsed_bytes = 0
        self._mask_bytes = 4 if isinstance(protocol, ServerProtocol) else 0
        self._end: str | None = None
        try:
            self._feed(rest, time.monotonic())
        except BaseException:
            self._forget()
            raise

    def send(self, message: bytes | str, deadline: Deadline) -> None:
        try:
            if isinstance(message, str):
                self._protocol.send_text(message.encode("utf-8", "replace"))
            else:
                self._protocol.send_binary(message)
        except InvalidState:
            raise ConnectionLost("the connection is closed") from None
        self._flush(deadline)

    def receive(self, deadline: Deadline) -> bytes | bytearray | str:
        """The next message: bytes of a binary one, str of a text one (which is capped, not refused)."""
        while not self._messages:
            if self._end is not None:
                raise ConnectionLost(self._end)
            count = self._stream.receive_into(self._buffer, deadline)
            self._feed(self._buffer[:count], deadline)
        return self._messages.popleft()

    def refuse_unasked(self, deadline: Deadline) -> None:
        """Make sure that nothing came that nobody asked for, not even in part; answers pings.

        Raises:
            WireError: a message waits, so the next reply would be taken for another one's.
        """
        while self._stream.has_pending() or self._unparsed_bytes > 0:
            if self._messages or self._end is not None:
                break
            count = self._stream.receive_into(self._buffer, deadline)
            self._feed(self._buffer[:count], deadline)
        if self._messages or self._fragments:
            raise WireError("the peer sent a message that was not asked for")
        if self._end is not None:
            raise ConnectionLost(self._end)

    def say_goodbye(self, deadline: Deadline, code: int = 1000, reason: str = "") -> None:
        """Send a Close frame; the peer's own can still be received, as a ConnectionLost that names it."""
        try:
            self._protocol.send_close(code, reason)
        except InvalidState:
            raise ConnectionLost("the connection is closed") from None
        self._flush(deadline)

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Say goodbye if that needs no waiting, and close."""
        with contextlib.suppress(TimeoutError, ConnectionLost):
            self.say_goodbye(time.monotonic(), code, reason)
        self._stream.close()
        self._forget()

    def _forget(self) -> None:
        """Let go of all that was received.

        The protocol's parser and its errors refer to themselves, and the garbage collector, which counts
        objects and not bytes, may come round late: by then there could be gigabytes of such messages.
        """
        self._messages.clear()
        self._fragments.clear()
        self._buffer = memoryview(b"")
        self._protocol.parser.close()
        self._protocol.parser_exc = None
        self._protocol.reader.buffer.clear()

    def abort(self) -> None:
        """Make every call on this connection end now; safe from another thread."""
        self._stream.abort()

    def _flush(self, deadline: Deadline) -> None:
        for data in self._protocol.data_to_send():
            if data:
                self._stream.send_all(data, deadline)

    def _feed(self, data: bytes | memoryview, deadline: Deadline) -> None:
        if not data:
            return
        self._unparsed_bytes += len(data)
        # The protocol only appends it to its own buffer, so a view does as well as bytes.
        self._protocol.receive_data(data)  # type: ignore[arg-type]
        for frame in self._protocol.events_received():
            assert isinstance(frame, Frame)
            self._unparsed_bytes -= _wire_bytes(len(frame.data)) + self._mask_bytes
            self._take(frame)
        error = self._protocol.parser_exc
        if error is not None:
            if isinstance(error, PayloadTooBig):
                size = (error.size or 0) + (error.current_size or 0)
                raise WireError(f"a message of {size} bytes or more, above the limit of {error.max_size}")
            raise WireError(f"not the WebSocket protocol: {error}")
        self._flush(deadline)

    def _take(self, frame: Frame) -> None:
        if frame.opcode is Opcode.CLOSE:
            self._end = f"the peer closed the connection: {Close.parse(bytes(frame.data))}"
            return
        if frame.opcode not in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            return
        if frame.opcode is not Opcode.CONT:
            self._is_text = frame.opcode is Opcode.TEXT
        if frame.fin and not self._fragments:
            message: bytes | bytearray = frame.data  # type: ignore[assignment]
        else:
            self._fragments.append(frame.data)  # type: ignore[arg-type]
            if len(self._fragments) > MAX_FRAGMENTS:
                raise WireError(f"a message in more than {MAX_FRAGMENTS} fragments")
            if not frame.fin:
                return
            message, self._fragments = b"".join(self._fragments), []
        self._messages.append(
            message[:TEXT_CAP_BYTES].decode("utf-8", "replace") if self._is_text else message
        )


def _wire_bytes(payload_bytes: int) -> int:
    """Size of an unmasked frame; RFC 6455 section 5.2 demands the shortest form of the length."""
    return payload_bytes + (2 if payload_bytes < 126 else 4 if payload_bytes < 65536 else 10)


def open_websocket(
    stream: ByteStream, host: str, port: int, path: str, max_bytes: int, deadline: Deadline
) -> WebSocket:
    """The client's opening handshake.

    Raises:
        TimeoutError, ConnectionLost, WireError: the last one when the peer is no WebSocket server.
    """
    resource, _, query = path.partition("?")
    address = WebSocketURI(False, host, port, resource, query)
    protocol = ClientProtocol(address, max_size=max_bytes, logger=_QUIET)
    protocol.send_request(protocol.connect())
    stream.send_all(b"".join(protocol.data_to_send()), deadline)
    head, rest = _receive_http_head(stream, deadline)
    protocol.receive_data(head)
    if protocol.state is not State.OPEN:
        # The exception is missing where the protocol still waits for the body of a refusal.
        status_line = head.split(b"\r\n", 1)[0][:120].decode("ascii", "replace")
        raise WireError(f"the peer did not open a WebSocket: {protocol.handshake_exc or status_line}")
    protocol.events_received()
    return WebSocket(stream, protocol, rest)


def accept_websocket(stream: ByteStream, max_bytes: int, deadline: Deadline) -> WebSocket:
    """The server's opening handshake; a refused client is told why over HTTP.

    Raises:
        TimeoutError, ConnectionLost, WireError: the last one when the peer is no WebSocket client.
    """
    protocol = ServerProtocol(max_size=max_bytes)
    head, rest = _receive_http_head(stream, deadline)
    protocol.receive_data(head)
    request = next((event for event in protocol.events_received() if isinstance(event, Request)), None)
    if request is not None:
        protocol.send_response(protocol.accept(request))
    stream.send_all(b"".join(protocol.data_to_send()), deadline)
    if protocol.state is not State.OPEN:
        raise WireError(f"the peer did not open a WebSocket: {protocol.handshake_exc}")
    return WebSocket(stream, protocol, rest)


def _receive_http_head(stream: ByteStream, deadline: Deadline) -> tuple[bytes, bytes]:
    """The head of an HTTP message with its empty line, and what came after it."""
    data = bytearray()
    chunk = memoryview(bytearray(4096))
    while (end := data.find(b"\r\n\r\n")) < 0:
        if len(data) > MAX_HTTP_HEAD_BYTES:
            raise WireError("the peer did not open a WebSocket: its HTTP head is too long")
        try:
            count = stream.receive_into(chunk, deadline)
        except ConnectionLost:
            if data:
                raise WireError("the peer did not open a WebSocket: its HTTP head is cut short") from None
            raise
        data += chunk[:count]
    return bytes(data[: end + 4]), bytes(data[end + 4 :])
