"""A real https server on loopback that hands out archives, with a certificate authority of its own."""

from __future__ import annotations

import datetime
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

NAMES = ("localhost", "archives.example")  # what the certificate is for, besides 127.0.0.1

Answer = Callable[[BaseHTTPRequestHandler], None]


@dataclass(frozen=True)
class Certificate:
    """Self-signed: its file is the server's chain and the client's authority at once."""

    file: Path
    key_file: Path

    def context(self) -> ssl.SSLContext:
        """TLS of a server that shows it."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.file, self.key_file)
        return context


def make_certificate(directory: Path) -> Certificate:
    """A fresh certificate in the directory."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    addresses = [x509.IPAddress(ip_address("127.0.0.1"))]
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([*map(x509.DNSName, NAMES), *addresses]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    made = Certificate(directory / "certificate.pem", directory / "key.pem")
    made.file.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    made.key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return made


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # server_close() joins them

    def __init__(self, owner: ArchiveServer) -> None:
        self.owner = owner
        super().__init__(("127.0.0.1", 0), _Handler)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        self.owner.connections += 1
        return True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that turn away from the certificate are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 10

    def do_GET(self) -> None:
        self.server.owner.requests.append((self.path, dict(self.headers.items())))
        self.server.owner.answers[self.path](self)
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@dataclass
class ArchiveServer:
    """Answers by path. `connections` counts what was accepted, with or without a request after it."""

    answers: dict[str, Answer] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    server_names: list[str | None] = field(default_factory=list)
    connections: int = 0
    port: int = 0
    stopping: threading.Event = field(default_factory=threading.Event)

    def url(self, path: str, host: str = "localhost") -> str:
        return f"https://{host}:{self.port}{path}"

    def answer(self, path: str, body: bytes = b"", status: int = 200, **headers: str) -> str:
        """Lay an answer under `path`; its URL. Underscores in header names stand for hyphens."""

        def send(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                handler.send_header(name.replace("_", "-"), value)
            handler.end_headers()
            handler.wfile.write(body)

        self.answers[path] = send
        return self.url(path)

    def redirect(self, path: str, location: str, status: int = 302) -> str:
        return self.answer(path, status=status, Location=location)


@contextmanager
def serving(context: ssl.SSLContext | None) -> Iterator[ArchiveServer]:
    """A server on loopback, with TLS if there is a context for it."""
    owner = ArchiveServer()
    with _Server(owner) as http_server:
        if context is not None:
            context.sni_callback = lambda _, name, __: owner.server_names.append(name)
            http_server.socket = context.wrap_socket(
                http_server.socket, server_side=True, do_handshake_on_connect=False
            )
        owner.port = http_server.server_port
        thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield owner
        finally:
            owner.stopping.set()
            http_server.shutdown()
            thread.join()
