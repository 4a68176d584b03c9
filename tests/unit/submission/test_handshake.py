"""The mutual challenge: only who holds the key gets through, whatever it repeats or sends back."""

from __future__ import annotations

import hmac
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from orchestrator.submission.handshake import (
    MAGIC,
    MAX_MESSAGE_BYTES,
    HandshakeFailed,
    prove_as_client,
    prove_as_server,
    receive_message,
    send_message,
)
from orchestrator.submission.transport import ByteStream, ConnectionLost
from orchestrator.submission.wire import WireError, packb

KEY = bytes(range(32))
OTHER_KEY = bytes(32)


def soon(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a TCP connection: client's, server's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    with client, server:
        client.settimeout(20)
        server.settimeout(20)
        yield client, server


@pytest.fixture
def background() -> Iterator[Callable[..., Future[Any]]]:
    with ThreadPoolExecutor() as pool:
        yield pool.submit


def read(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        chunk = sock.recv(count - len(data))
        assert chunk, "closed"
        data += chunk
    return data


def test_both_sides_with_the_key_get_through(pair, background) -> None:
    client, server = pair
    theirs = background(prove_as_server, ByteStream(server), KEY, soon())

    prove_as_client(ByteStream(client), KEY, soon())

    theirs.result()


def test_a_client_refuses_a_server_with_another_key(pair, background) -> None:
    client, server = pair
    background(prove_as_server, ByteStream(server), OTHER_KEY, soon())

    with pytest.raises(HandshakeFailed):
        prove_as_client(ByteStream(client), KEY, soon())
    client.close()


def test_a_server_refuses_a_client_with_another_key(pair) -> None:
    client, server = pair
    client.sendall(MAGIC + bytes(32) + bytes(32))

    with pytest.raises(HandshakeFailed):
        prove_as_server(ByteStream(server), KEY, soon())


def test_a_recorded_client_is_refused_by_the_next_challenge(pair, background) -> None:
    client, server = pair
    theirs = background(prove_as_server, ByteStream(server), KEY, soon())
    nonce = bytes(32)
    client.sendall(MAGIC + nonce)
    server_nonce = read(client, 64)[:32]
    recorded = MAGIC + nonce + hmac.digest(KEY, b"client" + server_nonce + nonce, "sha256")
    client.sendall(recorded[36:])
    theirs.result()

    client.sendall(recorded)

    with pytest.raises(HandshakeFailed):
        prove_as_server(ByteStream(server), KEY, soon())


def test_a_recorded_server_is_refused_by_the_next_challenge(pair) -> None:
    client, server = pair
    old_nonce, server_nonce = bytes(32), bytes([7]) * 32
    server.sendall(server_nonce + hmac.digest(KEY, b"server" + old_nonce + server_nonce, "sha256"))

    with pytest.raises(HandshakeFailed):
        prove_as_client(ByteStream(client), KEY, soon())


def test_a_server_that_sends_the_clients_own_bytes_back_is_refused(pair, background) -> None:
    client, server = pair

    def reflect() -> None:
        challenge = read(server, 36)
        server.sendall(challenge[4:] + challenge[4:])

    background(reflect)

    with pytest.raises(HandshakeFailed):
        prove_as_client(ByteStream(client), KEY, soon())


def test_the_servers_own_proof_does_not_prove_the_client(pair, background) -> None:
    client, server = pair
    theirs = background(prove_as_server, ByteStream(server), KEY, soon())

    client.sendall(MAGIC + bytes(32))
    client.sendall(read(client, 64)[32:])

    with pytest.raises(HandshakeFailed):
        theirs.result()


def test_a_server_cannot_be_made_to_prove_a_client(pair, background) -> None:
    """The attacker answers a client's challenge with a proof that it has another server make."""
    client, server = pair
    victim = background(prove_as_client, ByteStream(client), KEY, soon())
    read(server, 36)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        to_oracle = socket.create_connection(listener.getsockname())
        oracle, _ = listener.accept()
    with to_oracle, oracle:
        asked = background(prove_as_server, ByteStream(oracle), KEY, soon())
        to_oracle.sendall(MAGIC + bytes(32))  # a nonce of the attacker's own choice
        server.sendall(read(to_oracle, 64))
        to_oracle.close()

        with pytest.raises(HandshakeFailed):
            victim.result()
        with pytest.raises(ConnectionLost):
            asked.result()


def test_a_peer_that_begins_otherwise_learns_nothing(pair) -> None:
    client, server = pair
    client.sendall(b"GET / HTTP/1.1\r\n\r\n")

    with pytest.raises(HandshakeFailed):
        prove_as_server(ByteStream(server), KEY, soon())
    server.close()

    with pytest.raises(ConnectionResetError):
        client.recv(1)


@pytest.mark.parametrize("side", [prove_as_client, prove_as_server])
def test_a_silent_peer_is_given_up_at_the_deadline(side, pair) -> None:
    with pytest.raises(TimeoutError):
        side(ByteStream(pair[0]), KEY, soon(0.05))


@pytest.mark.parametrize("side", [prove_as_client, prove_as_server])
def test_a_peer_that_hangs_up_is_lost(side, pair) -> None:
    client, server = pair
    server.shutdown(socket.SHUT_WR)

    with pytest.raises(ConnectionLost):
        side(ByteStream(client), KEY, soon())


@pytest.mark.parametrize("side", [prove_as_client, prove_as_server])
def test_a_short_key_is_never_used(side, pair) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        side(ByteStream(pair[0]), b"short", soon())


def test_a_request_arrives_as_it_was_sent(pair) -> None:
    client, server = pair
    send_message(ByteStream(client), {"op": "push", "size": 5, "sha256": "ab"}, soon())

    assert receive_message(ByteStream(server), soon()) == {"op": "push", "size": 5, "sha256": "ab"}


@pytest.mark.parametrize(
    "data",
    [
        (MAX_MESSAGE_BYTES + 1).to_bytes(4, "big"),
        (0).to_bytes(4, "big"),
        (1).to_bytes(4, "big") + b"\xc0",
        (5).to_bytes(4, "big") + b"\xdd\xff\xff\xff\xff",
    ],
    ids=["too long", "empty", "no map", "huge list"],
)
def test_a_malformed_request_is_refused(data: bytes, pair) -> None:
    client, server = pair
    client.sendall(data)

    with pytest.raises(WireError):
        receive_message(ByteStream(server), soon())


def test_nothing_behind_a_request_is_read(pair) -> None:
    client, server = pair
    packed = packb({"op": "policy"})
    client.sendall(len(packed).to_bytes(4, "big") + packed + b"GET / HTTP")

    receive_message(ByteStream(server), soon())

    assert ByteStream(server).receive_exactly(10, soon()) == b"GET / HTTP"
