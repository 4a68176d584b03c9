"""What a canary pod runs in a submission's place: tries to reach what no submission may, and tells.

`python -m orchestrator.submission.probe --nonce TEXT --tcp NAME=HOST:PORT ...`. Its report is one line of its
log. It holds no secret and needs nothing but the standard library; started just like a submission's host, in
the same pod, it shows what holds for every submission of the namespace.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.submission.first_process import leave_first_process
from orchestrator.submission.listening import listen
from orchestrator.submission.sealing import Address, CannotSeal, seal_addresses, wait_until_sealed

REPORT_PREFIX = "orchestrator-probe "
BANNER_PREFIX = b"orchestrator-probe "
API = "the API server"
METADATA = "the metadata address"
METADATA_ADDRESS = Address("169.254.169.254", 80)
DNS_PORT = 53
DNS_AFTER_API = 9
DNS_NAME = "kubernetes.default.svc.cluster.local"
TRIES = 2
TRY_SECONDS = 1.0
MOST_AT_ONCE = 32
UNFILTERED = "no system call is filtered (seccomp)"  # a sandbox with a kernel of its own has other means
TOKEN_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of dialling one target; `how` in words."""

    name: str
    address: str
    reached: bool
    how: str


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What one canary has seen. `open_network` is why it could not be sealed, None where it was."""

    nonce: str
    sealed_after_seconds: float | None
    open_network: str | None
    outcomes: tuple[Outcome, ...]
    weaknesses: tuple[str, ...]

    def line(self) -> str:
        """The report as one line of a log."""
        return REPORT_PREFIX + json.dumps(asdict(self))

    @classmethod
    def find(cls, log: str, nonce: str) -> ProbeReport | None:
        """The report with this nonce in a log; None where there is none, or what is there is none of ours."""
        for line in log.splitlines():
            if line.startswith(REPORT_PREFIX):
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    found: dict[str, Any] = json.loads(line.removeprefix(REPORT_PREFIX))
                    outcomes = tuple(Outcome(**each) for each in found.pop("outcomes"))
                    report = cls(**found | {"outcomes": outcomes, "weaknesses": tuple(found["weaknesses"])})
                    if report.nonce == nonce:
                        return report
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Report, stay for a while, so that others can try to reach this pod, and end."""
    leave_first_process()
    options = _parse(arguments)
    listener = listen(options.host, options.port)
    threading.Thread(target=_greet, args=(listener, options.nonce), daemon=True).start()
    sealed_after, open_network = _seal(options.seal_timeout)
    report = ProbeReport(
        options.nonce,
        sealed_after,
        open_network,
        tuple(_dial_all(_dials(options.tcp, options.dns, os.environ))),
        tuple(weaknesses()),
    )
    print(report.line(), flush=True)
    time.sleep(options.stay)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m orchestrator.submission.probe")
    parser.add_argument("--nonce", required=True, help="tells this canary's words from all others")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--tcp", action="append", default=[], metavar="NAME=HOST:PORT", help="to be dialled")
    parser.add_argument("--dns", action="append", default=[], metavar="HOST", help="a server to be asked")
    parser.add_argument("--seal-timeout", type=float, default=30.0, help="seconds for the policy to come")
    parser.add_argument("--stay", type=float, default=0.0, help="seconds after the report")
    return parser.parse_args(arguments)


def _greet(listener: socket.socket, nonce: str) -> None:
    """Tell everybody who connects who this is."""
    while True:
        with contextlib.suppress(OSError):
            peer, _ = listener.accept()
            with peer:
                peer.settimeout(TRY_SECONDS)
                peer.sendall(BANNER_PREFIX + nonce.encode() + b"\n")


def _seal(timeout_seconds: float) -> tuple[float | None, str | None]:
    """After how many seconds the network was closed, or why it is not known to be."""
    began = time.monotonic()
    try:
        wait_until_sealed(seal_addresses(os.environ, []), timeout_seconds, lambda what: None)
    except CannotSeal as error:
        return None, str(error)
    return round(time.monotonic() - began, 3), None


# ------------------------------------------------------------------------------------------- dialling


def _dials(tcp: Iterable[str], dns: Iterable[str], environ: Mapping[str, str]) -> list[Callable[[], Outcome]]:
    dials: list[Callable[[], Outcome]] = [partial(_dial, METADATA, METADATA_ADDRESS)]
    servers = [Address.of(host, str(DNS_PORT)) for host in dns]
    with contextlib.suppress(CannotSeal, ValueError):
        (api,) = seal_addresses(environ, [])
        dials.append(partial(_dial, API, api))
        # kubeadm and most others: the API server has the first address of the services, DNS the tenth.
        servers.append(Address(str(ipaddress.ip_address(api.host) + DNS_AFTER_API), DNS_PORT))
    for text in tcp:
        name, _, place = text.rpartition("=")
        dials.append(partial(_dial, name, Address.parse(place)))
    for server in dict.fromkeys(servers):
        dials += [partial(_dial, "DNS over TCP", server), partial(_ask, "DNS", server)]
    return dials


def _dial_all(dials: Sequence[Callable[[], Outcome]]) -> list[Outcome]:
    with ThreadPoolExecutor(min(len(dials), MOST_AT_ONCE)) as pool:
        return list(pool.map(lambda dial: dial(), dials))


def _dial(name: str, address: Address) -> Outcome:
    how = ""
    for _ in range(TRIES):
        try:
            socket.create_connection((address.host, address.port), TRY_SECONDS).close()
        except TimeoutError:
            how = f"no answer within {TRY_SECONDS:g} s"
        except OSError as error:
            how = error.strerror or str(error)
        else:
            return Outcome(name, str(address), True, "connected")
    return Outcome(name, str(address), False, how)


def _ask(name: str, address: Address) -> Outcome:
    """Ask a DNS server; any answer of its will do."""
    how = ""
    for _ in range(TRIES):
        number = secrets.token_bytes(2)
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                sock.settimeout(TRY_SECONDS)
                sock.connect((address.host, address.port))
                sock.send(_question(number))
                if sock.recv(512)[:2] == number:
                    return Outcome(name, str(address), True, "answered")
                how = "something else was answered"
        except TimeoutError:
            how = f"no answer within {TRY_SECONDS:g} s"
        except OSError as error:
            how = error.strerror or str(error)
    return Outcome(name, str(address), False, how)


def _question(number: bytes) -> bytes:
    """A query for an A record (RFC 1035, section 4)."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in DNS_NAME.split("."))
    return number + b"\x01\x00" + b"\x00\x01" + bytes(6) + labels + b"\x00" + b"\x00\x01" + b"\x00\x01"


# ---------------------------------------------------------------------------------- the pod, from inside


def weaknesses(proc: Path = Path("/proc"), token: Path = TOKEN_FILE, root: Path = Path("/")) -> list[str]:
    """What this process has that a submission's must not have."""
    status = dict(
        line.split(":", 1) for line in (proc / "self" / "status").read_text().splitlines() if ":" in line
    )
    found = []
    if os.getuid() == 0:
        found.append("it runs as root")
    if int(status.get("CapEff", "0").strip(), 16) or int(status.get("CapBnd", "0").strip(), 16):
        found.append("it has capabilities, or can gain some")
    if status.get("NoNewPrivs", "1").strip() == "0":
        found.append("programs that it starts can gain rights (no_new_privs is not set)")
    if status.get("Seccomp", "2").strip() == "0":
        found.append(UNFILTERED)
    if token.exists():
        found.append("a token for the Kubernetes API lies in it")
    if _is_writable(root):
        found.append("its root can be written to")
    return found


def _is_writable(directory: Path) -> bool:
    path = directory / f".orchestrator-probe-{os.getpid()}"
    try:
        path.touch()
    except OSError:
        return bool(os.access(directory, os.W_OK))  # says so of a read-only file system, too
    path.unlink()
    return True


if __name__ == "__main__":
    sys.exit(main())
