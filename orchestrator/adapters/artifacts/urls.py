"""Judges where an archive's URL leads: its form, its scheme and host, and the addresses behind the name.

Nothing here shows the query or the credentials of a URL: both may be secret.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Collection

import httpx

from orchestrator.domain.errors import InfrastructureError, SubmissionError

DEFAULT_PORTS = {"https": 443, "http": 80}
SHOWN_CHARACTERS = 200
MAX_HOST_CHARACTERS = 253

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")  # all that is routed today
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are the IPv4 address dialled
# Refused whatever the tables of this Python say, which differ, and where private addresses are allowed.
NEVER_DIALLED = (
    ipaddress.IPv4Network("168.63.129.16/32"),  # the host agent of Azure's machines
    ipaddress.IPv4Network("192.0.0.0/24"),  # IETF protocol assignments, answered by the nearest router
    ipaddress.IPv4Network("192.88.99.0/24"),  # 6to4 relays
    ipaddress.IPv6Network("64:ff9b:1::/48"),  # NAT64 of one's own, with the IPv4 address anywhere (RFC 8215)
    ipaddress.IPv6Network("2001::/32"),  # Teredo, which wraps an IPv4 address
    ipaddress.IPv6Network("2002::/16"),  # 6to4, which wraps an IPv4 address and is given up (RFC 7526)
    ipaddress.IPv6Network("3fff::/20"),  # documentation
)


def parse_url(text: str, base: httpx.URL | None = None) -> httpx.URL:
    """The URL, relative to `base` if there is one; with a host in lower case and without a trailing dot.

    Raises:
        SubmissionError: it is malformed; the text says what is wrong, in words of ours only.
    """
    try:
        url = httpx.URL(text) if base is None else base.join(text)
    except (httpx.InvalidURL, ValueError) as error:  # ValueError: of urllib's parts, and IDNA's UnicodeError
        # The parser's own words quote the URL, and what it takes for a port may be a password.
        raise malformed(_complaint(str(error))) from None
    if not url.scheme:
        raise malformed("it has no scheme, like https://")
    if url.port is not None and not 0 < url.port < 2**16:
        raise malformed("its port is no number from 1 to 65535")
    host = url.raw_host.decode("ascii").rstrip(".")
    if "%" in host and ":" not in host:  # the parser escapes what can stand in no name
        raise malformed("its host is no name that DNS knows")
    return url.copy_with(host=host) if host != url.raw_host.decode("ascii") else url


def malformed(reason: str) -> SubmissionError:
    """The refusal of a URL that means nothing."""
    return SubmissionError(f"the archive's URL is malformed: {reason}")


def _complaint(parser_text: str) -> str:
    text = parser_text.lower()
    for word, reason in (
        ("printable", "it holds a character that is not printable"),
        ("too long", "it is too long"),
        ("port", "its port is no number from 1 to 65535"),
        ("ipv", "its host is no IP address"),
        ("idna", "its host is no name that DNS knows"),
        ("netloc", "its host is no name that DNS knows"),
    ):
        if word in text:
            return reason
    return "it cannot be told apart into scheme, host and path"


def shown(url: httpx.URL) -> str:
    """The URL without query and credentials, shortened."""
    path = url.raw_path.partition(b"?")[0].decode("ascii", "replace")
    text = f"{url.scheme}://{host_of(url)}{path}"
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def host_of(url: httpx.URL) -> str:
    """The host in ASCII, as it is looked up and as certificates name it."""
    # Not `url.host`, which decodes IDNA and raises on names that only look like it.
    return url.raw_host.decode("ascii")


def check_host(url: httpx.URL, allowed: Collection[str] | None) -> None:
    """Refuse a host that is not on the operator's list; without a list (None), none is refused.

    `allowed`: `example.org` is that name alone, `.example.org` every name below it.

    Raises:
        SubmissionError: the host is missing or not allowed.
    """
    host = host_of(url).lower()
    if not host:
        raise malformed("it names no host")
    if len(host) > MAX_HOST_CHARACTERS or not _decodes(url):
        raise malformed("its host is no name that DNS knows")
    if allowed is not None and not any(_matches(host, entry) for entry in allowed):
        names = ", ".join(allowed) or "none"
        raise SubmissionError(f"archives may not be fetched from {host}: allowed are {names}")


def is_listed(url: httpx.URL, hosts: Collection[str]) -> bool:
    """Whether the URL's host is one of these, as in `check_host`."""
    return any(_matches(host_of(url).lower(), entry) for entry in hosts)


def _decodes(url: httpx.URL) -> bool:
    try:
        return bool(url.host)
    except ValueError:  # IDNA's UnicodeError: xn-- before what is no punycode
        return False


def _matches(host: str, entry: str) -> bool:
    entry = entry.lower().rstrip(".")
    return host.endswith(entry) if entry.startswith(".") else host == entry


async def resolve(url: httpx.URL, *, allow_private: bool) -> list[str]:
    """The addresses behind the URL's host, in the resolver's order; all of them were judged.

    Whoever dials must dial one of these and not the name, which may be resolved anew to another address.

    Raises:
        SubmissionError: one of the addresses may not be dialled (see `check_address`).
        InfrastructureError: the name could not be resolved.
    """
    host, port = host_of(url), url.port or DEFAULT_PORTS[url.scheme]
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:
        raise malformed("its host is no name that DNS knows") from None
    except OSError as error:
        raise InfrastructureError(f"the archive's host {host} is not known to DNS") from error
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    for address in addresses:
        check_address(address, host, allow_private=allow_private)
    return addresses


def check_address(address: str, host: str, *, allow_private: bool = False) -> None:
    """Refuse an address inside the network of the control plane, also one that stands inside an IPv6 address.

    `allow_private` admits private and loopback addresses; link-local ones, where clouds keep their metadata,
    are refused even then.

    Raises:
        SubmissionError: the address may not be dialled. The text does not tell it: it would let strangers
            read our DNS.
    """
    if not _may_be_dialled(_reached(address), allow_private):
        raise SubmissionError(
            f"the archive's host {host} has an address that is not public, and no other is dialled"
        )


def _reached(address: str) -> IPAddress:
    """What is reached by dialling `address`: the kernel or a gateway may take an IPv4 address out of it."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv4Address):
        return ip
    if ip.ipv4_mapped is not None:
        return ip.ipv4_mapped
    if ip in NAT64:
        return ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF)
    # Every other form that wraps one (IPv4-compatible, IPv4-translated, 6to4, Teredo) is refused whole.
    return ip


def _may_be_dialled(ip: IPAddress, allow_private: bool) -> bool:
    if ip.is_multicast or ip.is_unspecified or ip.is_link_local:
        return False
    if any(ip in network for network in NEVER_DIALLED):
        return False
    if allow_private and (ip.is_private or ip.is_loopback):
        return True
    if ip.is_reserved or not ip.is_global:
        return False
    return isinstance(ip, ipaddress.IPv4Address) or ip in GLOBAL_UNICAST
