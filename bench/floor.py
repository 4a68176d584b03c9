"""The floor: bytes there and bytes back over loopback TCP, with nothing of Python between but two calls."""

from __future__ import annotations

import multiprocessing
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from statistics import median


class Floor:
    """A connection to a process that answers `request_bytes` with `reply_bytes`."""

    def __init__(self, connection: socket.socket, request_bytes: int, reply_bytes: int) -> None:
        self._connection = connection
        self._request = bytes(request_bytes)
        self._reply = bytearray(reply_bytes)

    def round_trips(self, count: int) -> float:
        """The median of so many, in microseconds."""
        send, receive = self._connection.sendall, self._connection.recv_into
        view, size, now = memoryview(self._reply), len(self._reply), time.perf_counter_ns
        taken = []
        for _ in range(count):
            began = now()
            send(self._request)
            got = receive(view)
            while got < size:
                got += receive(view[got:])
            taken.append(now() - began)
        return median(taken) / 1000


@contextmanager
def floor(request_bytes: int, reply_bytes: int) -> Iterator[Floor]:
    """The floor for messages of these sizes, for the block."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, request_bytes, reply_bytes), daemon=True)
    process.start()
    try:
        with socket.create_connection(("127.0.0.1", ours.recv())) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield Floor(connection, request_bytes, reply_bytes)
    finally:
        process.kill()
        process.join()


def _serve(told: Connection, request_bytes: int, reply_bytes: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        told.send(listener.getsockname()[1])
        connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    view, reply = memoryview(bytearray(request_bytes)), bytes(reply_bytes)
    while True:
        got = 0
        while got < request_bytes:
            count = connection.recv_into(view[got:])
            if count == 0:
                return
            got += count
        connection.sendall(reply)
