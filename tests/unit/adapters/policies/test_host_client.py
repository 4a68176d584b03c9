"""The client of the submission host against hosts that die, stall or are not ours."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.adapters.policies.host_client import SubmissionHostClient
from orchestrator.domain.errors import InfrastructureError, SubmissionError, SubmissionSilent
from orchestrator.ports import Endpoint
from orchestrator.submission.handshake import prove_as_server, receive_message, send_message
from orchestrator.submission.transport import ByteStream
from tests.unit.adapters.policies.hostile_servers import Peer, scripted_server

KEY = bytes(range(32))
SHA256 = "ab" * 32


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "archive"
    path.write_bytes(b"some bytes")
    return path


def client(port: int, grace_seconds: float = 0.2) -> SubmissionHostClient:
    return SubmissionHostClient(Endpoint("127.0.0.1", port), KEY, grace_seconds=grace_seconds)


class ScriptedHost:
    """Proves the key, then answers the requests of successive connections with `answers`, in turn."""

    def __init__(self, *answers: dict[str, Any] | None) -> None:
        self._answers = list(answers)
        self.requests: list[dict[str, Any]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> ScriptedHost:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread up
        self._thread.join(20)
        self._listener.close()

    def _run(self) -> None:
        with suppress(OSError):
            self._answer_all()
        self._listener.close()  # from now on nobody is at home

    def _answer_all(self) -> None:
        while self._answers:
            sock, _ = self._listener.accept()
            with sock:
                stream, deadline = ByteStream(sock), time.monotonic() + 10
                prove_as_server(stream, KEY, deadline)
                self.requests.append(receive_message(stream, deadline))
                answer = self._answers.pop(0)
                if answer is None:
                    continue
                send_message(stream, answer, deadline)
                takes = self.requests[-1]["op"] == "push"
                if takes and answer["state"] == "waiting" and answer["ok"]:
                    stream.receive_exactly(self.requests[-1]["size"], deadline)
                    send_message(stream, self._answers.pop(0), deadline)  # type: ignore[arg-type]


def state(name: str, ok: bool = True, error: str | None = None) -> dict[str, Any]:
    return {"ok": ok, "state": name, "error": error}


async def test_it_asks_until_the_policy_serves(archive: Path) -> None:
    answers = state("waiting"), state("loading"), state("loading"), None, state("loading"), state("serving")
    with ScriptedHost(*answers) as host:
        await client(host.port, grace_seconds=20).push_archive(archive, SHA256.upper(), 20)

    assert host.requests[0] == {"op": "push", "size": 10, "sha256": SHA256}
    assert [request["op"] for request in host.requests[1:]] == ["status"] * 4


async def test_a_host_that_serves_already_gets_no_bytes(archive: Path) -> None:
    with ScriptedHost(state("serving")) as host:
        await client(host.port).push_archive(archive, SHA256, 20)


async def test_a_failure_while_loading_is_the_submissions(archive: Path) -> None:
    with (
        ScriptedHost(state("waiting"), state("loading"), state("failed", False, "Traceback: no")) as host,
        pytest.raises(SubmissionError, match="Traceback: no"),
    ):
        await client(host.port).push_archive(archive, SHA256, 20)


async def test_a_host_that_has_another_archive_is_no_fault_of_the_submission(archive: Path) -> None:
    with (
        ScriptedHost(state("serving", False, "another archive is here already")) as host,
        pytest.raises(InfrastructureError, match="another archive"),
    ):
        await client(host.port).push_archive(archive, SHA256, 20)


async def test_an_unknown_state_is_no_fault_of_the_submission(archive: Path) -> None:
    with (
        ScriptedHost(state("dancing")) as host,
        pytest.raises(InfrastructureError, match="dancing"),
    ):
        await client(host.port).push_archive(archive, SHA256, 20)


async def test_a_submission_that_accepts_nobody_while_it_loads_is_silent(archive: Path) -> None:
    with (
        ScriptedHost(state("waiting"), state("loading")) as host,
        pytest.raises(SubmissionSilent, match=r"no connection to 127\.0\.0\.1"),
    ):
        await client(host.port).push_archive(archive, SHA256, 20)


@pytest.mark.parametrize("nonsense", [state("dancing"), state("loading", False, "not you")])
async def test_a_submission_that_breaks_the_protocol_while_it_loads_is_silent(
    nonsense: dict[str, Any], archive: Path
) -> None:
    with (
        ScriptedHost(state("waiting"), state("loading"), nonsense) as host,
        pytest.raises(SubmissionSilent, match=r"dancing|not you"),
    ):
        await client(host.port).push_archive(archive, SHA256, 20)


async def test_loading_beyond_the_deadline_is_the_submissions(archive: Path) -> None:
    standing = state("loading") | {"where": '  File "agent.py", line 3'}
    answers = state("waiting"), state("loading"), *[standing] * 200
    with (
        ScriptedHost(*answers) as host,
        pytest.raises(SubmissionError, match=r'within 0.5 s; it stands at:\n  File "agent.py", line 3'),
    ):
        await client(host.port).push_archive(archive, SHA256, 0.5)


async def test_start_up_time_stands_still_while_the_environment_is_made_which_is_told(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    passed = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + sum(passed))
    monkeypatch.setattr("orchestrator.adapters.policies.host_client.time", clock)

    async def tell(what: str) -> None:
        told.append(what)
        passed.append(100.0 if what else 0.0)  # longer than there is to load

    preparing = [
        state("preparing") | {"where": where} for where in ("looks", "installs", "installs", "tries")
    ]
    answers = state("waiting"), state("loading"), *preparing, state("loading"), state("serving")
    with ScriptedHost(*answers) as host:
        await client(host.port).push_archive(archive, SHA256, 20, tell)

    assert told == ["looks", "installs", "tries", ""]


async def test_an_environment_that_is_never_made_ends_the_wait(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.adapters.policies.host_client.PREPARATION_GRACE_SECONDS", 0.1)
    preparing = state("preparing") | {"where": "installs requirements.txt"}
    with ScriptedHost(state("waiting"), *[preparing] * 200) as host:
        endpoint = Endpoint("127.0.0.1", host.port)
        impatient = SubmissionHostClient(endpoint, KEY, environment_timeout_seconds=0.2)
        with pytest.raises(SubmissionError, match=r"installs requirements\.txt"):
            await impatient.push_archive(archive, SHA256, 20)


def sealing_client(port: int) -> SubmissionHostClient:
    return SubmissionHostClient(Endpoint("127.0.0.1", port), KEY, require_sealed=True)


def sealed(name: str) -> dict[str, Any]:
    return state(name) | {"sealed": True}


async def test_a_host_is_asked_and_nothing_else_until_it_is_sealed(archive: Path) -> None:
    answers = [state("sealing")] * 3 + [sealed(name) for name in ("waiting", "waiting", "loading", "serving")]
    with ScriptedHost(*answers) as host:
        await sealing_client(host.port).push_archive(archive, SHA256, 20)

    assert [request["op"] for request in host.requests] == ["status"] * 4 + ["push", "status"]


async def test_the_start_up_time_begins_when_the_host_is_sealed_and_what_is_open_is_told(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    passed = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + sum(passed))
    monkeypatch.setattr("orchestrator.adapters.policies.host_client.time", clock)

    async def tell(what: str) -> None:
        told.append(what)
        passed.append(15.0)  # twice that is more than there is

    open_network = state("sealing") | {"where": "10.96.0.1:443 takes connections"}
    answers = open_network, *[sealed(name) for name in ("waiting", "waiting", "loading", "serving")]
    with ScriptedHost(*answers) as host:
        await sealing_client(host.port).push_archive(archive, SHA256, 20, tell)

    assert told == ["10.96.0.1:443 takes connections", ""]


async def test_a_host_that_holds_an_archive_without_a_proof_is_not_used(archive: Path) -> None:
    with (
        ScriptedHost(state("serving")) as host,
        pytest.raises(InfrastructureError, match="without a proof that its network is closed"),
    ):
        await sealing_client(host.port).push_archive(archive, SHA256, 20)


async def test_a_failure_that_the_host_takes_upon_itself_is_no_fault_of_the_submission(archive: Path) -> None:
    failed = state("failed", False, "no space left") | {"ours": True}
    with (
        ScriptedHost(state("waiting"), state("loading"), failed) as host,
        pytest.raises(InfrastructureError, match="no space left"),
    ):
        await client(host.port).push_archive(archive, SHA256, 20)


async def test_nobody_at_the_port_is_lost(archive: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    with pytest.raises(InfrastructureError, match="lost"):
        await client(port).push_archive(archive, SHA256, 20)


def silent(peer: Peer) -> None:
    peer.finished.wait(10)


def without_key(peer: Peer) -> None:
    peer.socket.recv(36)
    peer.send(bytes(64))
    peer.finished.wait(10)


@pytest.fixture
def silent_port() -> Iterator[int]:
    with scripted_server(silent) as port:
        yield port


async def test_a_silent_host_is_late_before_it_held_the_archive(silent_port: int, archive: Path) -> None:
    with pytest.raises(InfrastructureError, match="in time"):
        await client(silent_port).push_archive(archive, SHA256, 0.3)


async def test_a_host_without_the_key_gets_nothing(archive: Path) -> None:
    with scripted_server(without_key) as port, pytest.raises(InfrastructureError, match="session key"):
        await client(port).push_archive(archive, SHA256, 20)


async def test_a_cancelled_push_ends_its_connection_at_once(archive: Path) -> None:
    ended = asyncio.Event()
    started = asyncio.Event()
    loop = asyncio.get_running_loop()

    def notice_the_end(peer: Peer) -> None:
        peer.socket.recv(36)
        loop.call_soon_threadsafe(started.set)
        assert peer.socket.recv(1) == b""
        loop.call_soon_threadsafe(ended.set)

    with scripted_server(notice_the_end) as port:
        push = asyncio.create_task(client(port).push_archive(archive, SHA256, 60))
        await asyncio.wait_for(started.wait(), 10)
        push.cancel()

        with pytest.raises(asyncio.CancelledError):
            await push
        await asyncio.wait_for(ended.wait(), 10)
