"""A real https server on loopback, with an authority of its own, and a resolver that knows made-up names."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from orchestrator.adapters.artifacts.fetch import FetchLimits
from tests.archive_server import ArchiveServer, Certificate, make_certificate, serving


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture
def server(certificate: Certificate) -> Iterator[ArchiveServer]:
    with serving(certificate.context()) as owner:
        yield owner


@pytest.fixture
def plain_server() -> Iterator[ArchiveServer]:
    """One that speaks http without TLS."""
    with serving(None) as owner:
        yield owner


@pytest.fixture
def limits(certificate: Certificate) -> FetchLimits:
    """Limits that let the server of these tests be reached."""
    return FetchLimits(
        max_bytes=100_000,
        timeout_seconds=20.0,
        schemes=("https",),
        allow_private_addresses=True,
        ca_file=str(certificate.file),
    )


@dataclass
class Resolver:
    """Made-up names with the addresses that each look-up gives; the last one for ever."""

    names: dict[str, list[list[str]]] = field(default_factory=dict)
    lookups: list[str] = field(default_factory=list)


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    known = Resolver()
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        if host not in known.names:
            return real(host, port, *args, **kwargs)
        known.lookups.append(host)
        answers = known.names[host]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [
            (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port))
            for address in addresses
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return known
