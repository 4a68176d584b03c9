"""Bytes that are passed through between two sockets: both ways, with both ends, and within bounds."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from orchestrator.submission.relay import Relay
from orchestrator.submission.transport import ByteStream

PATIENCE_SECONDS = 30.0


@dataclass
class Passage:
    """A relay at work between two peers: `client` and `server` are the far ends."""

    relay: Relay
    client: socket.socket
    server: socket.socket
    thread: threading.Thread

    def ended(self) -> bool:
        self.thread.join(PATIENCE_SECONDS)
        return not self.thread.is_alive()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    for each in (one, other):
        each.settimeout(PATIENCE_SECONDS)
    return one, other


@contextmanager
def passing(stall_seconds: float = PATIENCE_SECONDS) -> Iterator[Passage]:
    client, near_client = tcp_pair()
    server, near_server = tcp_pair()
    relay = Relay(stall_seconds)
    streams = ByteStream(near_client), ByteStream(near_server)

    def run() -> None:
        relay.run(*streams)
        for stream in streams:
            stream.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield Passage(relay, client, server, thread)
    finally:
        for sock in (client, server):
            sock.close()
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()


@pytest.fixture
def passage() -> Iterator[Passage]:
    with passing() as passage:
        yield passage


def receive_all(sock: socket.socket) -> bytes:
    data = bytearray()
    while chunk := sock.recv(65536):
        data += chunk
    return bytes(data)


def test_who_ends_its_own_direction_is_still_answered(passage: Passage) -> None:
    passage.client.sendall(b"question")
    passage.client.shutdown(socket.SHUT_WR)

    assert receive_all(passage.server) == b"question"
    passage.server.sendall(b"answer")
    passage.server.shutdown(socket.SHUT_WR)

    assert receive_all(passage.client) == b"answer"
    assert passage.ended()


def test_more_than_any_buffer_holds_passes_both_ways_at_once(passage: Passage) -> None:
    data = bytes(range(256)) * 50_000
    senders = [
        threading.Thread(target=sock.sendall, args=(data,)) for sock in (passage.client, passage.server)
    ]
    received: list[bytes] = []

    def receive(sock: socket.socket) -> None:
        parts = bytearray()
        while len(parts) < len(data):
            parts += sock.recv(65536)
        received.append(bytes(parts))

    receivers = [threading.Thread(target=receive, args=(sock,)) for sock in (passage.client, passage.server)]
    for thread in (*senders, *receivers):
        thread.start()
    for thread in (*senders, *receivers):
        thread.join(PATIENCE_SECONDS)

    assert received == [data, data]


def test_the_last_words_of_a_server_that_is_gone_arrive_before_its_end(passage: Passage) -> None:
    passage.server.sendall(b"last words")
    passage.server.close()

    passage.relay.wait_answered(PATIENCE_SECONDS)

    assert receive_all(passage.client) == b"last words"


def test_a_client_that_is_gone_ends_the_servers_connection(passage: Passage) -> None:
    passage.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    passage.client.close()  # with a reset

    assert passage.server.recv(1) == b""
    assert passage.ended()


def test_a_server_that_never_answers_a_client_that_has_ended_is_given_up() -> None:
    with passing(stall_seconds=0.1) as passage:
        passage.client.shutdown(socket.SHUT_WR)

        assert passage.ended()
        assert passage.client.recv(1) == b""


def test_a_client_that_stays_after_the_server_has_ended_is_given_up() -> None:
    with passing(stall_seconds=0.1) as passage:
        passage.server.close()

        assert passage.ended()
        assert passage.client.recv(1) == b""


def test_a_peer_that_takes_nothing_ends_the_connection() -> None:
    with passing(stall_seconds=0.1) as passage:
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            send_without_end(passage.client)

        assert passage.ended()


def send_without_end(sock: socket.socket) -> None:
    while True:
        sock.sendall(bytes(2**20))
