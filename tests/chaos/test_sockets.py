"""What is done to the sockets of another process is what its peer sees."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.chaos import sockets

ECHO = """
import socket
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
connection, _ = listener.accept()
while data := connection.recv(100):
    connection.sendall(data)
"""


@pytest.fixture
def server() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", ECHO], stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture
def client(server: subprocess.Popen[str]) -> Iterator[socket.socket]:
    assert server.stdout is not None
    with socket.create_connection(("127.0.0.1", int(server.stdout.readline())), timeout=10) as connection:
        connection.sendall(b"hello")
        assert connection.recv(100) == b"hello"
        yield connection


def the_descriptor(server: subprocess.Popen[str]) -> int:
    [descriptor] = sockets.connections_of(server.pid)
    return descriptor


def test_a_reset_is_seen_by_the_peer(server: subprocess.Popen[str], client: socket.socket) -> None:
    with sockets.stolen(server.pid, the_descriptor(server)) as connection:
        sockets.reset(connection)

    with pytest.raises(ConnectionResetError):
        client.recv(100)


def test_after_a_half_close_the_peer_reads_an_end(
    server: subprocess.Popen[str], client: socket.socket
) -> None:
    with sockets.stolen(server.pid, the_descriptor(server)) as connection:
        sockets.half_close(connection)

    assert client.recv(100) == b""


def test_what_arrives_at_a_deaf_socket_is_there_when_it_hears_again(
    server: subprocess.Popen[str], client: socket.socket
) -> None:
    with sockets.stolen(server.pid, the_descriptor(server)) as connection:
        with sockets.deaf(connection):
            client.sendall(b"again")
            client.settimeout(0.3)
            with pytest.raises(TimeoutError):
                client.recv(100)
        client.settimeout(10)

        assert client.recv(100) == b"again"


def test_a_delayed_connection_loses_nothing(server: subprocess.Popen[str], client: socket.socket) -> None:
    began = time.monotonic()
    with sockets.stolen(server.pid, the_descriptor(server)) as connection:
        sockets.delay(connection, 0.2)
    client.sendall(b"again")

    assert client.recv(100) == b"again"
    assert time.monotonic() - began >= 0.2
