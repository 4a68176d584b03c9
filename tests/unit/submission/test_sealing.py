"""A submission host takes nothing before its network is closed; listeners stand for what it may reach."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.adapters.policies.host_client import SubmissionHostClient
from orchestrator.adapters.policies.websocket import WebSocketConnector
from orchestrator.domain.errors import InfrastructureError
from orchestrator.ports import Endpoint
from orchestrator.submission import sealing
from orchestrator.submission.handshake import prove_as_client, receive_message, send_message
from orchestrator.submission.sealing import Address, CannotSeal, seal_addresses, wait_until_sealed
from orchestrator.submission.transport import ByteStream
from tests.policy_processes import ECHO_AGENT, RunningServer, running, write_archive

KEY = bytes(range(32))


class Reachable:
    """An API server that a pod can reach until its NetworkPolicy is in force."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=64)
        self.address = Address(host, self._listener.getsockname()[1])
        self.dialled = threading.Semaphore(0)
        self._connections: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._connections.append(self._listener.accept()[0])
                self.dialled.release()

    def await_dials(self, count: int) -> None:
        for _ in range(count):
            assert self.dialled.acquire(timeout=30)

    def refuse(self) -> None:
        """From now on whoever dials is refused."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()
        for connection in self._connections:
            connection.close()

    def drop(self) -> None:
        """From now on who dials hears nothing: the queue of connections is full, and packets are dropped."""
        self.refuse()
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind((self.address.host, self.address.port))
        self._listener.listen(0)
        for _ in range(4):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex((self.address.host, self.address.port))
            self._connections.append(sock)

    @property
    def environ(self) -> dict[str, str]:
        return {
            "KUBERNETES_SERVICE_HOST": self.address.host,
            "KUBERNETES_SERVICE_PORT": str(self.address.port),
        }


@pytest.fixture
def api() -> Iterator[Reachable]:
    reachable = Reachable()
    yield reachable
    reachable.refuse()


@contextlib.contextmanager
def sealing_host(
    work: Path, environ: dict[str, str], *options: str, key: bytes = KEY
) -> Iterator[RunningServer]:
    command = ["-m", "orchestrator.submission.host", "--directory", str(work), "--seal", *options]
    with running(command, environment={**environ, "ORCHESTRATOR_SESSION_KEY": key.hex()}) as host:
        yield host


def ask(host: RunningServer, **request: Any) -> dict[str, Any]:
    deadline = time.monotonic() + 20
    stream = ByteStream.connect("127.0.0.1", host.port, deadline)
    try:
        prove_as_client(stream, KEY, deadline)
        send_message(stream, request, deadline)
        return receive_message(stream, deadline)
    finally:
        stream.close()


def ask_until(host: RunningServer, state: str) -> dict[str, Any]:
    until = time.monotonic() + 30
    while (answer := ask(host, op="status"))["state"] != state:
        assert time.monotonic() < until, answer
    return answer


def client(host: RunningServer) -> SubmissionHostClient:
    return SubmissionHostClient(Endpoint("127.0.0.1", host.port), KEY, require_sealed=True)


# ------------------------------------------------------------------------------------------ the dials


@pytest.mark.parametrize("end", ["refuse", "drop"])
def test_it_is_sealed_once_no_dial_is_answered_any_more(api: Reachable, end: str) -> None:
    sealed = threading.Event()

    def seal() -> None:
        wait_until_sealed([api.address], 60, lambda what: None)
        sealed.set()

    thread = threading.Thread(target=seal, daemon=True)
    thread.start()
    api.await_dials(3)
    assert not sealed.is_set()

    getattr(api, end)()

    assert sealed.wait(20)
    thread.join(10)


def test_five_dials_in_a_row_have_to_fail(api: Reachable, monkeypatch: pytest.MonkeyPatch) -> None:
    dialled: list[int] = []
    answers = iter([errno.ECONNREFUSED] * 4 + [0] + [errno.ECONNREFUSED] * 5)

    class Scripted(socket.socket):
        def connect_ex(self, address: Any) -> int:
            dialled.append(next(answers))
            return dialled[-1]

    monkeypatch.setattr(sealing.socket, "socket", Scripted)

    wait_until_sealed([api.address], 60, lambda what: None)

    assert len(dialled) == 10
    assert next(answers, None) is None


def test_every_address_has_to_be_out_of_reach(api: Reachable) -> None:
    other = Reachable()
    other.refuse()

    with pytest.raises(CannotSeal, match=f"{api.address} takes connections"):
        wait_until_sealed([other.address, api.address], 0.3, lambda what: None)


def test_an_address_of_the_sixth_version_is_dialled() -> None:
    try:
        api = Reachable("::1")
    except OSError:
        pytest.skip("this machine has no IPv6")

    with pytest.raises(CannotSeal, match=rf"\[::1\]:{api.address.port} takes connections"):
        wait_until_sealed([api.address], 0.2, lambda what: None)
    api.refuse()

    wait_until_sealed([api.address], 10, lambda what: None)


def test_trouble_of_our_own_is_no_proof(api: Reachable, monkeypatch: pytest.MonkeyPatch) -> None:
    api.refuse()

    class Short(socket.socket):
        def connect_ex(self, address: Any) -> int:
            return errno.EADDRNOTAVAIL

    monkeypatch.setattr(sealing.socket, "socket", Short)

    with pytest.raises(CannotSeal, match="cannot be dialled: Cannot assign"):
        wait_until_sealed([api.address], 0.2, lambda what: None)


def test_what_is_open_is_told_after_a_while(api: Reachable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "SAID_AFTER_SECONDS", 0.1)
    told: list[str] = []

    with pytest.raises(CannotSeal, match="enforces no NetworkPolicy"):
        wait_until_sealed([api.address], 0.5, told.append)

    assert set(told) == {f"the network of the container is open: {api.address} takes connections"}


def test_the_addresses_are_those_of_the_kubelet_and_of_the_command_line() -> None:
    environ = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}

    addresses = seal_addresses(environ, ["10.0.0.1:53", "[fd00::2]:6443"])

    assert [str(address) for address in addresses] == ["[fd00::1]:443", "10.0.0.1:53", "[fd00::2]:6443"]


@pytest.mark.parametrize(
    ("environ", "further"),
    [
        ({}, []),
        ({}, ["10.0.0.1:443"]),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, []),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "https"}, []),
        ({"KUBERNETES_SERVICE_HOST": "kubernetes.default.svc", "KUBERNETES_SERVICE_PORT": "443"}, []),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "443"}, ["example.org:443"]),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "443"}, ["10.0.0.1:0"]),
    ],
)
def test_an_address_that_is_missing_or_none_is_an_error(environ: dict[str, str], further: list[str]) -> None:
    with pytest.raises(CannotSeal):
        seal_addresses(environ, further)


# ------------------------------------------------------------------------------------------- the host


def test_an_unsealed_host_takes_no_byte(api: Reachable, tmp_path: Path) -> None:
    with sealing_host(tmp_path / "work", api.environ) as host:
        api.await_dials(1)

        answers = [
            ask(host, **request) for request in ({"op": "status"}, {"op": "push", "size": 9, "sha256": ""})
        ]

        assert answers == [{"ok": True, "state": "sealing", "error": None, "sealed": False}] * 2
        assert ask(host, op="policy")["ok"] is False
        assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize("end", ["refuse", "drop"])
async def test_the_archive_goes_to_a_sealed_host_which_goes_on_saying_so(
    api: Reachable, tmp_path: Path, end: str
) -> None:
    sha256 = write_archive(tmp_path / "a.tar.gz", {"agent.py": ECHO_AGENT})
    with sealing_host(tmp_path / "work", api.environ) as host:
        api.await_dials(2)
        getattr(api, end)()

        await client(host).push_archive(tmp_path / "a.tar.gz", sha256, 60)

        assert ask(host, op="status") == {"ok": True, "state": "serving", "error": None, "sealed": True}
        connection = WebSocketConnector("127.0.0.1", host.port, KEY).connect(10)
        assert connection.act({"observation": 5}, 10) == 5
        connection.close()


async def test_a_submission_with_a_server_of_its_own_says_so_too(api: Reachable, tmp_path: Path) -> None:
    example = Path(__file__).parents[3] / "examples" / "cartpole_server" / "main.py"
    sha256 = write_archive(tmp_path / "a.tar.gz", {"main.py": example.read_text()})
    with sealing_host(tmp_path / "work", api.environ) as host:
        api.refuse()

        await client(host).push_archive(tmp_path / "a.tar.gz", sha256, 60)

        assert ask(host, op="status") == {"ok": True, "state": "serving", "error": None, "sealed": True}
        os.kill(host.process.pid, signal.SIGTERM)  # ends its main.py, too
        host.process.wait(30)


async def test_a_cluster_that_never_seals_is_told_what_it_lacks(api: Reachable, tmp_path: Path) -> None:
    sha256 = write_archive(tmp_path / "a.tar.gz", {"agent.py": ECHO_AGENT})
    with (
        sealing_host(tmp_path / "work", api.environ) as host,
        pytest.raises(InfrastructureError, match=r"not enforce the NetworkPolicy.*`orchestrator preflight`"),
    ):
        await client(host).push_archive(tmp_path / "a.tar.gz", sha256, 1)

    assert list((tmp_path / "work").iterdir()) == []


async def test_a_host_whose_time_to_seal_is_over_says_what_is_open(api: Reachable, tmp_path: Path) -> None:
    sha256 = write_archive(tmp_path / "a.tar.gz", {"agent.py": ECHO_AGENT})
    with (
        sealing_host(tmp_path / "work", api.environ, "--seal-timeout", "0.3") as host,
        pytest.raises(InfrastructureError, match=f"{api.address} takes connections"),
    ):
        await client(host).push_archive(tmp_path / "a.tar.gz", sha256, 60)


async def test_without_an_address_to_dial_nothing_is_ever_taken(tmp_path: Path) -> None:
    sha256 = write_archive(tmp_path / "a.tar.gz", {"agent.py": ECHO_AGENT})
    with (
        sealing_host(tmp_path / "work", {"KUBERNETES_SERVICE_HOST": ""}) as host,
        pytest.raises(InfrastructureError, match="do not say where the API server is"),
    ):
        await client(host).push_archive(tmp_path / "a.tar.gz", sha256, 60)

    assert list((tmp_path / "work").iterdir()) == []


async def test_a_host_that_does_not_seal_gets_nothing(tmp_path: Path) -> None:
    sha256 = write_archive(tmp_path / "a.tar.gz", {"agent.py": ECHO_AGENT})
    command = ["-m", "orchestrator.submission.host", "--directory", str(tmp_path / "work")]
    with (
        running(command, environment={"ORCHESTRATOR_SESSION_KEY": KEY.hex()}) as host,
        pytest.raises(InfrastructureError, match="without --seal"),
    ):
        await client(host).push_archive(tmp_path / "a.tar.gz", sha256, 60)

    assert list((tmp_path / "work").iterdir()) == []


def test_a_signal_ends_it_while_it_seals_itself(api: Reachable, tmp_path: Path) -> None:
    with sealing_host(tmp_path / "work", api.environ) as host:
        api.await_dials(1)

        os.kill(host.process.pid, signal.SIGTERM)

        assert host.process.wait(30) == -signal.SIGTERM
