"""Policy servers that break one rule of docs/protocol.md each, and one that breaks none."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from orchestrator.submission.wire import packb, unpackb
from tests.unit.adapters.policies.hostile_servers import Peer, frame


class RightServer:
    """Keeps every rule; its policy draws numbers that depend on the seed of the reset alone."""

    metadata: Any = {"extensions": ["reset", "sequence"]}  # noqa: RUF012 - never changed
    settings: dict[str, Any] = {"max_size": 2**26}  # noqa: RUF012

    def greet(self, connection: ServerConnection) -> None:
        connection.send(packb(self.metadata))

    def converse(self, connection: ServerConnection) -> None:
        self.greet(connection)
        random = np.random.default_rng(0)
        while True:
            message = connection.recv()
            try:
                request = unpackb(message)
                if "__orchestrator__" in request:
                    random = self.reset(connection, request, random)
                else:
                    self.act(connection, request, random)
            except ConnectionClosed:
                raise
            except Exception as error:
                self.fail(connection, error)
                return

    def reset(self, connection: ServerConnection, request: Any, random: Any) -> Any:
        connection.send(packb({"__orchestrator__": "reset", "sequence": request["sequence"]}))
        return np.random.default_rng(request["seed"])

    def act(self, connection: ServerConnection, request: Any, random: Any) -> None:
        actions = random.normal() + request["observation"][0]
        connection.send(packb({"actions": actions, "__sequence__": request["__sequence__"]}))

    def fail(self, connection: ServerConnection, error: Exception) -> None:
        connection.send(f"{type(error).__name__}: {error}")
        connection.close(1011)


class SilentServer(RightServer):
    def greet(self, connection: ServerConnection) -> None:
        pass


class TextMetadata(RightServer):
    def greet(self, connection: ServerConnection) -> None:
        connection.send('{"extensions": []}')


class ListMetadata(RightServer):
    metadata = ("reset",)


class JsonMetadata(RightServer):
    def greet(self, connection: ServerConnection) -> None:
        connection.send(b'{"extensions": []}')


class WrongExtensions(RightServer):
    metadata = {"extensions": "reset"}  # noqa: RUF012


class TalkativeServer(RightServer):
    def greet(self, connection: ServerConnection) -> None:
        super().greet(connection)
        connection.send(packb({"actions": 0}))


class TwoReplies(RightServer):
    def act(self, connection: ServerConnection, request: Any, random: Any) -> None:
        super().act(connection, request, random)
        if self.counts(request) == 3:
            connection.send(packb({"actions": 0}))

    def counts(self, request: Any) -> int:
        self.acts = getattr(self, "acts", 0) + 1
        return self.acts


class NoActions(RightServer):
    def act(self, connection: ServerConnection, request: Any, random: Any) -> None:
        connection.send(packb({"action": 0, "__sequence__": request["__sequence__"]}))


class BareActions(RightServer):
    def act(self, connection: ServerConnection, request: Any, random: Any) -> None:
        connection.send(packb([0.5]))


class TextReply(RightServer):
    def act(self, connection: ServerConnection, request: Any, random: Any) -> None:
        connection.send('{"actions": 0}')


class ObjectArray(RightServer):
    def act(self, connection: ServerConnection, request: Any, random: Any) -> None:
        array = {b"__ndarray__": True, b"data": bytes(8), b"dtype": "|O", b"shape": [1]}
        connection.send(packb({"actions": array, "__sequence__": request["__sequence__"]}))


class ShortArray(RightServer):
    def act(self, connection: ServerConnection, request: Any, random: Any) -> None:
        array = {b"__ndarray__": True, b"data": bytes(8), b"dtype": "<f4", b"shape": [4]}
        connection.send(packb({"actions": array, "__sequence__": request["__sequence__"]}))


class OldNumber(RightServer):
    def act(self, connection: ServerConnection, request: Any, random: Any) -> None:
        connection.send(packb({"actions": 0, "__sequence__": 1}))


class NoNumber(RightServer):
    def act(self, connection: ServerConnection, request: Any, random: Any) -> None:
        connection.send(packb({"actions": 0}))


class ResetAsObservation(RightServer):
    def reset(self, connection: ServerConnection, request: Any, random: Any) -> Any:
        connection.send(packb({"actions": 0, "__sequence__": request["sequence"]}))
        return random


class ResetWithoutNumber(RightServer):
    def reset(self, connection: ServerConnection, request: Any, random: Any) -> Any:
        connection.send(packb({"__orchestrator__": "reset"}))
        return random


class ForgetfulReset(RightServer):
    """Acknowledges a reset, and goes on as before."""

    def reset(self, connection: ServerConnection, request: Any, random: Any) -> Any:
        super().reset(connection, request, random)
        return random


class SilentError(RightServer):
    def fail(self, connection: ServerConnection, error: Exception) -> None:
        connection.close(1011)


class BinaryError(RightServer):
    def fail(self, connection: ServerConnection, error: Exception) -> None:
        connection.send(packb({"error": str(error)}))


class SmallMessages(RightServer):
    settings = {"max_size": 2**20}  # noqa: RUF012 - as the library has it


class OneAtATime(RightServer):
    """Refuses whoever comes second."""

    def __init__(self) -> None:
        self.place = threading.Lock()

    def converse(self, connection: ServerConnection) -> None:
        if not self.place.acquire(blocking=False):
            connection.close(1013)
            return
        try:
            super().converse(connection)
        finally:
            self.place.release()


class Queueing(RightServer):
    """Lets whoever comes second wait."""

    def __init__(self) -> None:
        self.place = threading.Lock()

    def converse(self, connection: ServerConnection) -> None:
        with self.place:
            super().converse(connection)


class PlainServer(RightServer):
    """Announces nothing, as openpi's servers do."""

    metadata: Any = {}  # noqa: RUF012

    def act(self, connection: ServerConnection, request: Any, random: Any) -> None:
        connection.send(packb({"actions": request["observation"][:1]}))


@contextmanager
def running_server(server: RightServer) -> Iterator[int]:
    """The port on which it serves, a thread for each connection."""

    def converse(connection: ServerConnection) -> None:
        with suppress(ConnectionClosed):
            server.converse(connection)

    settings: dict[str, Any] = {"compression": None, "ping_interval": None, **server.settings}
    with serve(converse, "127.0.0.1", 0, **settings) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        try:
            yield running.socket.getsockname()[1]
        finally:
            running.shutdown()
            thread.join(20)


# ------------------------------------------------------------------------------------ byte by byte

Script = Callable[[Peer], None]


@contextmanager
def scripted_connections(script: Script) -> Iterator[int]:
    """The port of a server that plays `script` with every client, a thread for each."""
    finished = threading.Event()
    threads: list[threading.Thread] = []

    def play(connection: socket.socket) -> None:
        connection.settimeout(20)
        with connection, suppress(OSError):
            script(Peer(connection, finished))

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=play, args=(connection,)))
            threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield listener.getsockname()[1]
        finally:
            finished.set()
            listener.shutdown(socket.SHUT_RDWR)
            for thread in (accepting, *threads):
                thread.join(25)


def answers_http(peer: Peer) -> None:
    peer.read_http_head()
    peer.send(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")


def is_no_web_server(peer: Peer) -> None:
    peer.read_http_head()
    peer.send(b"hello\r\n\r\n")


def hangs_up(peer: Peer) -> None:
    peer.read_http_head()


class CompressingPeer(Peer):
    """Agrees to what nobody has offered."""

    def send(self, data: bytes) -> None:
        head, _, rest = data.partition(b"\r\n\r\n")
        super().send(head + b"\r\nSec-WebSocket-Extensions: permessage-deflate\r\n\r\n" + rest)


def compresses(peer: Peer) -> None:
    CompressingPeer(peer.socket, peer.finished).upgrade()
    peer.read_frame()


def masks_its_frames(peer: Peer) -> None:
    peer.upgrade(behind=b"\x82\x81\x00\x00\x00\x00\x80")
    peer.read_frame()


def sends_a_gigabyte(peer: Peer) -> None:
    peer.upgrade({})
    peer.read_frame()
    peer.send(b"\x82\x7f" + (2**30).to_bytes(8, "big") + bytes(1000))
    peer.read_frame()


def ignores_the_end(peer: Peer) -> None:
    """Takes a Close frame for an observation."""
    peer.upgrade({})
    while True:
        peer.read_frame()
        peer.send(frame(packb({"actions": 0})))
