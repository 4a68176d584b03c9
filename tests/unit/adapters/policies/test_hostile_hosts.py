"""Every trick of what answers in a submission host's place, and what our client owes us all the same."""

from __future__ import annotations

import hmac
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from orchestrator.adapters.policies.host_client import SubmissionHostClient
from orchestrator.domain.errors import InfrastructureError, OrchestratorError, SubmissionError
from orchestrator.ports import Endpoint
from orchestrator.submission.handshake import (
    MAGIC,
    NONCE_BYTES,
    PROOF_BYTES,
    prove_as_server,
    receive_message,
    send_message,
)
from orchestrator.submission.transport import ByteStream
from orchestrator.submission.wire import packb
from tests.policy_processes import ECHO_AGENT, running_host, write_archive
from tests.unit.adapters.policies.hostile_servers import Peer, Script, scripted_server

MIB = 2**20
KEY = bytes(range(32))
MEMORY_BYTES = 3 * MIB
LONG_SECONDS = 60.0
SHORT_SECONDS = 0.5
TOLERATED_SECONDS = 20.0


@dataclass(frozen=True)
class Hostile:
    """What a host does with every connection, and what our client says of it."""

    script: Script
    words: str
    seconds: float = LONG_SECONDS
    error: type[OrchestratorError] = InfrastructureError


@dataclass(frozen=True)
class Archive:
    path: Path
    sha256: str


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    path = tmp_path_factory.mktemp("archive") / "a.tar.gz"
    return Archive(path, write_archive(path, {"agent.py": ECHO_AGENT}))


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SubmissionHostClient]:
    with running_host(tmp_path_factory.mktemp("honest") / "work", KEY) as server:
        yield SubmissionHostClient(Endpoint("127.0.0.1", server.port), KEY)


def proved(play: Script) -> Script:
    """Proves the session key, takes the request, and goes on with `play`."""

    def script(peer: Peer) -> None:
        stream, deadline = ByteStream(peer.socket), time.monotonic() + 10
        prove_as_server(stream, KEY, deadline)
        peer.request = receive_message(stream, deadline)
        peer.socket.settimeout(10)
        play(peer)

    return script


def challenged(play: Script) -> Script:
    """Reads the challenge, and goes on with `play`."""

    def script(peer: Peer) -> None:
        peer.challenge = peer.exactly(len(MAGIC) + NONCE_BYTES)
        play(peer)
        peer.finished.wait(10)

    return script


def saying(data: bytes) -> Script:
    def script(peer: Peer) -> None:
        peer.send(data)
        peer.finished.wait(10)

    return script


def answering(message: bytes) -> Script:
    return saying(len(message).to_bytes(4, "big") + message)


def standing(state: str, *, ok: bool = True, error: str | None = None) -> bytes:
    return packb({"ok": ok, "state": state, "error": error})


def taking(state: str) -> Script:
    """Takes whatever is pushed, and says that it stands there then."""

    def script(peer: Peer) -> None:
        stream, deadline = ByteStream(peer.socket), time.monotonic() + 10
        if peer.request["op"] == "push":
            send_message(stream, {"ok": True, "state": "waiting"}, deadline)
            stream.receive_exactly(peer.request["size"], deadline)
        send_message(stream, {"ok": True, "state": state}, deadline)

    return script


def replay(peer: Peer) -> None:
    """What an honest host of this very key answered to another client."""
    client, server = bytes(NONCE_BYTES), b"s" * NONCE_BYTES
    peer.send(server + hmac.digest(KEY, b"server" + client + server, "sha256"))


def drip_reply(peer: Peer) -> None:
    message = standing("waiting", error="x" * 1000)
    peer.drip(len(message).to_bytes(4, "big") + message)


UNPROVED = "did not prove the session key"
HOSTS = {
    "does not know the key": Hostile(challenged(saying(bytes(NONCE_BYTES + PROOF_BYTES))), UNPROVED),
    "replays an answer": Hostile(challenged(replay), UNPROVED),
    "reflects the challenge": Hostile(
        challenged(lambda peer: peer.send(peer.challenge[len(MAGIC) :] * 2)), UNPROVED
    ),
    "speaks HTTP": Hostile(challenged(saying(b"HTTP/1.1 400 Bad Request\r\n\r\n" + b"x" * 99)), UNPROVED),
    "speaks TLS": Hostile(challenged(saying(b"\x16\x03\x03\x00\x7a" + bytes(122))), UNPROVED),
    "half an answer to the challenge": Hostile(
        challenged(saying(bytes(NONCE_BYTES))), "did not take the archive in time", SHORT_SECONDS
    ),
    "says nothing": Hostile(challenged(saying(b"")), "did not take the archive in time", SHORT_SECONDS),
    "hangs up on everybody": Hostile(lambda peer: peer.socket.close(), "lost", SHORT_SECONDS),
    "resets every connection": Hostile(lambda peer: peer.reset(), "lost", SHORT_SECONDS),
    "resets after the proof": Hostile(proved(lambda peer: peer.reset()), "lost", SHORT_SECONDS),
    "a reply a byte at a time": Hostile(
        proved(drip_reply), "did not take the archive in time", SHORT_SECONDS
    ),
    "announces 4 GB": Hostile(proved(saying(b"\xff\xff\xff\xff")), "above the limit"),
    "announces a byte too much": Hostile(proved(saying(b"\0\1\0\1")), "above the limit"),
    "an empty reply": Hostile(proved(answering(b"")), "cut short"),
    "a reply that is no map": Hostile(proved(answering(packb([1]))), "not a map"),
    "four billion items": Hostile(proved(answering(b"\xdd\xff\xff\xff\xff")), "items"),
    "a reply of 40 levels": Hostile(proved(answering(b"\x91" * 40 + b"\xc0")), "deeper"),
    "a reply with an array": Hostile(proved(answering(packb({"state": np.zeros(1)}))), "arrays"),
    "an unknown state": Hostile(proved(answering(standing("dancing"))), "unknown state 'dancing'"),
    "a state of 60,000 letters": Hostile(proved(answering(standing("x" * 60_000))), "unknown state 'xxx"),
    "a refusal": Hostile(proved(answering(standing("serving", ok=False, error="not you"))), "not you"),
    "a failure": Hostile(
        proved(answering(standing("failed", ok=False, error="Traceback: no"))),
        "Traceback: no",
        error=SubmissionError,
    ),
    "takes the archive for ever": Hostile(
        proved(taking("waiting")), "did not take the archive in time", SHORT_SECONDS
    ),
    "loads for ever": Hostile(proved(taking("loading")), "did not load", SHORT_SECONDS, SubmissionError),
    "unknown once it loads": Hostile(proved(taking("singing")), "unknown state 'singing'"),
}


@pytest.mark.parametrize("case", HOSTS)
async def test_a_hostile_host_is_told_by_its_error_in_time_and_harms_no_other(
    case: str, honest: SubmissionHostClient, archive: Archive
) -> None:
    hostile = HOSTS[case]
    with scripted_server(hostile.script, clients=1000) as port:
        client = SubmissionHostClient(Endpoint("127.0.0.1", port), KEY, grace_seconds=0.1)
        tracemalloc.start()
        started_at = time.monotonic()
        try:
            with pytest.raises(hostile.error, match=hostile.words) as caught:
                await client.push_archive(archive.path, archive.sha256, hostile.seconds)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

    assert time.monotonic() - started_at < hostile.seconds + TOLERATED_SECONDS
    assert peak < MEMORY_BYTES
    assert len(str(caught.value)) < 2000
    await honest.push_archive(archive.path, archive.sha256, LONG_SECONDS)


async def test_a_host_that_does_not_read_what_it_asked_for_is_late(tmp_path: Path) -> None:
    def never_read(peer: Peer) -> None:
        send_message(ByteStream(peer.socket), {"ok": True, "state": "waiting"}, time.monotonic() + 10)
        peer.finished.wait(10)

    large = tmp_path / "large"
    large.write_bytes(bytes(16 * MIB))
    with (
        scripted_server(proved(never_read), clients=1000) as port,
        pytest.raises(InfrastructureError, match="did not take the archive in time"),
    ):
        await SubmissionHostClient(Endpoint("127.0.0.1", port), KEY).push_archive(
            large, "0" * 64, SHORT_SECONDS
        )
