"""Opens the socket on which a container is reached."""

from __future__ import annotations

import socket

EVERY_ADDRESS = "::"  # of both versions
BACKLOG = 128


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; `::` takes connections of both versions of IP, as far as this machine has them.

    Raises:
        OSError: the address cannot be had.
    """
    if host == EVERY_ADDRESS and not socket.has_dualstack_ipv6():
        host = "0.0.0.0"  # noqa: S104 - the network is closed by policy
    if ":" not in host:
        return socket.create_server((host, port), backlog=BACKLOG)
    dualstack = host == EVERY_ADDRESS
    return socket.create_server(
        (host, port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=dualstack
    )
