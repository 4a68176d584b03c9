"""Proves that nothing can be reached from this container, before anything of a submission comes into it.

A pod is started before its NetworkPolicy is in force, and what was connected by then stays connected. So the
API server of the cluster is dialled, which answers every pod that may reach it, until that fails. Where it
goes on answering the cluster does not enforce its policies.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

DIALS = 5  # in a row that have to fail
DIAL_PAUSE_SECONDS = 0.05
# A closed network refuses, or says nothing at all. In an open one even a busy API server takes a connection
# within milliseconds: its kernel does it.
DIAL_SECONDS = 1.0
SAID_AFTER_SECONDS = 5.0

# What a dial ends with where a policy forbids it, by the rules of iptables, nftables, eBPF and routes.
# Whatever else goes wrong is our own trouble, and proves nothing.
_CLOSED = frozenset(
    {
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.ETIMEDOUT,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.EACCES,
        errno.EPERM,
    }
)


class CannotSeal(Exception):
    """It is not proved that the egress is closed, for the reason in the text."""


@dataclass(frozen=True, slots=True)
class Address:
    """An IP address, of either version, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Address:
        """The address that is written `HOST:PORT`, or `[HOST]:PORT`.

        Raises:
            CannotSeal: it is none; a name is none, as it would take a DNS that answers.
        """
        host, _, port = text.rpartition(":")
        return cls.of(host.removeprefix("[").removesuffix("]"), port)

    @classmethod
    def of(cls, host: str, port: str) -> Address:
        """Likewise, in two parts."""
        try:
            address = cls(str(ipaddress.ip_address(host)), int(port))
        except ValueError:
            address = cls("", 0)
        if not 0 < address.port < 2**16:
            raise CannotSeal(f"{host[:80]}:{port[:8]} is no IP address with a port")
        return address


def seal_addresses(environ: Mapping[str, str], further: Sequence[str]) -> list[Address]:
    """What has to become unreachable: the API server as the kubelet names it, and `further` ones.

    Raises:
        CannotSeal: no API server is named, or what is named is no address.
    """
    host, port = environ.get("KUBERNETES_SERVICE_HOST"), environ.get("KUBERNETES_SERVICE_PORT")
    if not host or not port:
        raise CannotSeal(
            "KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT do not say where the API server is: "
            "without it nothing proves that the network is closed"
        )
    return [Address.of(host, port), *map(Address.parse, further)]


def wait_until_sealed(
    addresses: Sequence[Address], timeout_seconds: float, say: Callable[[str], None]
) -> None:
    """Returns when none of the addresses can be reached; `say` is told what still can, after a while.

    Raises:
        CannotSeal: the time is over.
    """
    began = time.monotonic()
    while (trouble := _trouble(addresses)) is not None:
        waited = time.monotonic() - began
        if waited >= timeout_seconds:
            raise CannotSeal(
                f"{trouble}, {waited:.0f} s after the start: the cluster enforces no NetworkPolicy on it"
            )
        if waited >= SAID_AFTER_SECONDS:
            say(trouble)
        time.sleep(DIAL_PAUSE_SECONDS)


@dataclass(slots=True)
class _Dial:
    address: Address
    socket: socket.socket
    deadline: float


def _trouble(addresses: Sequence[Address]) -> str | None:
    """Why a row of dials proves nothing; None when each of them failed as in a closed network.

    They overlap: a network that drops packets takes one dial's time, not that of all of them.
    """
    due = deque(
        (time.monotonic() + number * DIAL_PAUSE_SECONDS, address)
        for number in range(DIALS)
        for address in addresses
    )
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as sockets:
        while due or selector.get_map():
            now = time.monotonic()
            while due and due[0][0] <= now:
                address = due.popleft()[1]
                try:
                    sock = sockets.enter_context(_socket(address))
                    code = sock.connect_ex((address.host, address.port))
                except OSError as error:
                    return f"{address} cannot be dialled: {error.strerror or error}"
                if code == errno.EINPROGRESS:
                    selector.register(sock, selectors.EVENT_WRITE, _Dial(address, sock, now + DIAL_SECONDS))
                elif (trouble := _judge(address, code)) is not None:
                    return trouble
            if not due and not selector.get_map():
                return None
            for dial in _finished(selector, due[0][0] if due else now + DIAL_SECONDS):
                code = dial.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if (trouble := _judge(dial.address, code)) is not None:
                    return trouble
    return None


def _finished(selector: selectors.BaseSelector, until: float) -> Iterator[_Dial]:
    """The dials that have an end by then; one whose time is over has failed, and is forgotten."""
    first = min([until, *(key.data.deadline for key in selector.get_map().values())])
    for key, _ in selector.select(max(first - time.monotonic(), 0)):
        selector.unregister(key.fileobj)
        yield key.data
    for key in list(selector.get_map().values()):
        if key.data.deadline <= time.monotonic():
            selector.unregister(key.fileobj)


def _socket(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setblocking(False)
    return sock


def _judge(address: Address, code: int) -> str | None:
    if code == 0:
        return f"the network of the container is open: {address} takes connections"
    return None if code in _CLOSED else f"{address} cannot be dialled: {os.strerror(code)}"
