"""What can happen to a TCP connection of another process: done to the very socket, by the kernel.

No proxy stands between worker and policy. `pidfd_getfd` gives this process a descriptor of their socket; that
needs the right to trace them (root, or `kernel.yama.ptrace_scope=0`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
import time
from collections.abc import Iterator

import psutil

_PIDFD_GETFD = 438
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
_BPF_RETURN_CONSTANT = 0x06
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def stolen(pid: int, descriptor: int) -> Iterator[socket.socket]:
    """The socket behind a descriptor of the process; the process keeps it.

    Raises:
        OSError: the process or the descriptor is gone, or may not be touched.
    """
    process = os.pidfd_open(pid)
    try:
        number = _libc.syscall(_PIDFD_GETFD, process, descriptor, 0)
        if number < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
    finally:
        os.close(process)
    with socket.socket(fileno=number) as found:
        yield found


def connections_of(pid: int) -> list[int]:
    """The descriptors of the process's established TCP connections."""
    with contextlib.suppress(psutil.Error):
        connections = psutil.Process(pid).net_connections("tcp")
        return [each.fd for each in connections if each.status == psutil.CONN_ESTABLISHED]
    return []


def reset(connection: socket.socket) -> None:
    """Both ends get "connection reset by peer"."""
    address = struct.pack("H14x", socket.AF_UNSPEC)
    if _libc.connect(connection.fileno(), address, len(address)) != 0:
        raise OSError(ctypes.get_errno(), "connect(AF_UNSPEC)")


def half_close(connection: socket.socket) -> None:
    """The peer reads an end, and may still send."""
    connection.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def deaf(connection: socket.socket) -> Iterator[None]:
    """Whatever arrives is dropped for the block; the kernels send it again afterwards."""
    instruction = struct.pack("HBBI", _BPF_RETURN_CONSTANT, 0, 0, 0)
    buffer = ctypes.create_string_buffer(instruction)
    program = struct.pack("HxxxxxxP", 1, ctypes.addressof(buffer))
    connection.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
    try:
        yield
    finally:
        connection.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)


def delay(connection: socket.socket, seconds: float) -> None:
    """For so long, what arrives takes a fifth of a second or more, for it has to be sent twice."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with deaf(connection):
            time.sleep(0.02)
        time.sleep(0.02)
