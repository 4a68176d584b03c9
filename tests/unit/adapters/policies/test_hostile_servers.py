"""Every trick of a policy server that we know, and what our client owes us all the same.

Whatever the server does: an error that names it, no later than the deadline, without much memory, after which
the connection is not used again, and the next one, to an honest server, works.
"""

from __future__ import annotations

import hmac
import socket
import struct
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import pytest
from gymnasium import spaces

from orchestrator.adapters.benchmarks.spaces import InvalidAction, NonFiniteAction, from_wire, split_chunk
from orchestrator.adapters.policies.websocket import WebSocketConnector
from orchestrator.domain.errors import (
    AuthenticationFailed,
    PolicyError,
    PolicyLate,
    PolicyLost,
    PolicyProtocolError,
    PolicyRaised,
)
from orchestrator.submission.handshake import MAGIC, NONCE_BYTES, PROOF_BYTES
from orchestrator.submission.wire import packb
from tests.policy_processes import ECHO_AGENT, running_policy_server, write_agent
from tests.unit.adapters.policies.hostile_servers import Peer, Script, frame, scripted_server

MIB = 2**20
KEY = bytes(range(32))
OBSERVATION = {"observation": np.zeros(3)}
ACTION = frame(packb({"actions": np.zeros(2)}))
LARGEST_MESSAGE_BYTES = MIB
# Twice the largest message and a buffer, which full of the smallest frames makes 8 MiB of them.
MEMORY_BYTES = 12 * MIB
# Of a case that is over at once: one that waited for it would be late, and not what it should be.
LONG_SECONDS = 60.0
SHORT_SECONDS = 0.3
# A deadline is held within this, on a machine however busy.
TOLERATED_SECONDS = 20.0


@dataclass(frozen=True)
class Hostile:
    """What a server does, and what our client says of it."""

    script: Script
    error: type[PolicyError]
    words: str = ""
    seconds: float = LONG_SECONDS
    key: bytes | None = None
    observation: Any = None


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebSocketConnector]:
    directory = write_agent(tmp_path_factory.mktemp("honest"), ECHO_AGENT)
    with running_policy_server(directory) as server:
        yield WebSocketConnector("127.0.0.1", server.port)


@contextmanager
def within_memory(allowed_bytes: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < allowed_bytes


@contextmanager
def within_deadline(seconds: float) -> Iterator[None]:
    started_at = time.monotonic()
    yield
    assert time.monotonic() - started_at < seconds + TOLERATED_SECONDS


def connector_to(port: int, hostile: Hostile) -> WebSocketConnector:
    return WebSocketConnector("127.0.0.1", port, hostile.key, max_message_bytes=LARGEST_MESSAGE_BYTES)


def check_honest(honest: WebSocketConnector) -> None:
    connection = honest.connect(30)
    assert connection.act({"observation": 7}, 30) == 7
    connection.close()


def sending(data: bytes) -> Script:
    """Answers the opening handshake and the first observation, and stays."""

    def script(peer: Peer) -> None:
        peer.upgrade()
        peer.read_frame()
        peer.send(data)
        peer.finished.wait(10)

    return script


def after_observation(play: Script) -> Script:
    def script(peer: Peer) -> None:
        peer.upgrade()
        peer.read_frame()
        play(peer)

    return script


def for_ever(data: bytes) -> Script:
    def script(peer: Peer) -> None:
        while not peer.finished.is_set():
            peer.send(data)

    return script


def array_reply(**fields: Any) -> bytes:
    array = {"__ndarray__": True, "data": bytes(8), "dtype": "<f8", "shape": [1], **fields}
    packed: bytes = msgpack.packb({"actions": {key.encode(): value for key, value in array.items()}})
    return frame(packed)


def in_turn(*plays: Script) -> Script:
    def script(peer: Peer) -> None:
        for play in plays:
            play(peer)

    return script


def upgrade(peer: Peer) -> None:
    peer.upgrade()


def read_head(peer: Peer) -> None:
    peer.read_http_head()


def stay(peer: Peer) -> None:
    peer.finished.wait(10)


def saying(data: bytes) -> Script:
    return lambda peer: peer.send(data)


def dripping(data: bytes) -> Script:
    return lambda peer: peer.drip(data)


def hang_up(peer: Peer) -> None:
    peer.socket.close()


def half_close(peer: Peer) -> None:
    peer.send(ACTION[:-1])
    peer.socket.shutdown(socket.SHUT_WR)
    peer.finished.wait(10)


def reset_mid_frame(peer: Peer) -> None:
    peer.send(ACTION[:-1])
    peer.reset()


def fragment(opcode: int = 2) -> bytes:
    return frame(b"x" * 1000, opcode, fin=False)


REPLIES = {
    # Time.
    "a byte at a time": Hostile(
        after_observation(dripping(ACTION * 100)), PolicyLate, "no whole reply within", SHORT_SECONDS
    ),
    "nothing": Hostile(sending(b""), PolicyLate, "no whole reply within", SHORT_SECONDS),
    "pings without end": Hostile(
        after_observation(for_ever(frame(b"x" * 125, 9) * 10)), PolicyLate, "", SHORT_SECONDS
    ),
    "pongs without end": Hostile(
        after_observation(for_ever(frame(b"x" * 125, 10) * 10)),
        PolicyLate,
        "no whole reply within",
        SHORT_SECONDS,
    ),
    "never reads": Hostile(
        in_turn(upgrade, stay),
        PolicyLate,
        "no whole reply within",
        SHORT_SECONDS,
        observation={"image": np.zeros(12 * MIB, np.uint8)},
    ),
    # Size.
    "announces a terabyte": Hostile(
        sending(b"\x82" + struct.pack("!BQ", 127, 2**40)), PolicyProtocolError, "limit"
    ),
    "announces 2**64 - 1 bytes": Hostile(
        sending(b"\x82" + struct.pack("!BQ", 127, 2**64 - 1)), PolicyProtocolError, "limit"
    ),
    "a text of a terabyte": Hostile(
        sending(b"\x81" + struct.pack("!BQ", 127, 2**40)), PolicyProtocolError, "limit"
    ),
    "a byte above the limit": Hostile(
        sending(b"\x82" + struct.pack("!BQ", 127, MIB + 1)), PolicyProtocolError, "limit"
    ),
    "fragments above the limit": Hostile(
        after_observation(in_turn(saying(fragment()), for_ever(fragment(0)))),
        PolicyProtocolError,
        "limit",
    ),
    "empty fragments without end": Hostile(
        after_observation(in_turn(saying(fragment()), for_ever(frame(b"", 0, fin=False) * 100))),
        PolicyProtocolError,
        "fragments",
    ),
    # Frames.
    "a compressed frame": Hostile(sending(b"\xc2\x01x"), PolicyProtocolError, "reserved"),
    "a reserved bit": Hostile(sending(b"\xa2\x01x"), PolicyProtocolError, "reserved"),
    "an unknown opcode": Hostile(sending(b"\x83\x00"), PolicyProtocolError, "opcode"),
    "a masked frame": Hostile(sending(b"\x82\x81\0\0\0\0x"), PolicyProtocolError, "mask"),
    "a continuation of nothing": Hostile(sending(frame(b"x", 0)), PolicyProtocolError, "continuation"),
    "a message inside another": Hostile(sending(fragment() + ACTION), PolicyProtocolError, "continuation"),
    "a fragmented ping": Hostile(sending(frame(b"x", 9, fin=False)), PolicyProtocolError, "control"),
    "a ping of 126 bytes": Hostile(
        sending(b"\x89" + struct.pack("!BH", 126, 126) + bytes(126)), PolicyProtocolError, "control"
    ),
    "a close with half a code": Hostile(sending(b"\x88\x01\x03"), PolicyProtocolError, "close"),
    "a close mid-message": Hostile(sending(fragment() + frame(b"\x03\xe8", 8)), PolicyProtocolError, ""),
    "a close in place of a reply": Hostile(sending(frame(b"\x03\xf3died", 8)), PolicyLost, "1011.*died"),
    "HTTP in place of a frame": Hostile(
        sending(b"HTTP/1.1 500 Oops\r\nContent-Length: 100\r\n\r\n" + b"x" * 100), PolicyProtocolError, ""
    ),
    # The end.
    "half-closes mid-frame": Hostile(after_observation(half_close), PolicyLost, "closed"),
    "resets mid-frame": Hostile(after_observation(reset_mid_frame), PolicyLost, ""),
    "hangs up": Hostile(after_observation(hang_up), PolicyLost, ""),
    # Text.
    "a traceback": Hostile(sending(frame(b"Traceback: no", 1)), PolicyRaised, "Traceback: no"),
    "a text that is not UTF-8": Hostile(sending(frame(b"\xff\xfe\0", 1)), PolicyRaised, "\ufffd"),
    "a megabyte of text": Hostile(sending(frame(b"x" * MIB, 1)), PolicyRaised, "x"),
    # The codec.
    "no msgpack": Hostile(sending(frame(b"\xc1")), PolicyProtocolError, "0xc1"),
    "nothing in a frame": Hostile(sending(frame(b"")), PolicyProtocolError, "cut short"),
    "more than a message": Hostile(sending(frame(packb({"actions": 1}) * 2)), PolicyProtocolError, "after"),
    "no map": Hostile(sending(frame(packb([1]))), PolicyProtocolError, "not a map"),
    "a map without actions": Hostile(sending(frame(packb({"action": 1}))), PolicyProtocolError, "`actions`"),
    "numbers for keys": Hostile(sending(frame(msgpack.packb({1: 1}))), PolicyProtocolError, ""),
    "four billion items": Hostile(sending(frame(b"\xdd\xff\xff\xff\xff")), PolicyProtocolError, "items"),
    "four billion keys": Hostile(sending(frame(b"\xdf\xff\xff\xff\xff")), PolicyProtocolError, "items"),
    "100,000 levels": Hostile(sending(frame(b"\x91" * 100_000)), PolicyProtocolError, "deeper"),
    "an extension type": Hostile(sending(frame(b"\xd4\x01\x00")), PolicyProtocolError, "0xd4"),
    # Arrays.
    **{
        f"an array of {what}": Hostile(sending(array_reply(dtype=dtype)), PolicyProtocolError, "dtype")
        for what, dtype in {
            "objects": "|O",
            "texts": "<U2",
            "bytes": "|S8",
            "times": "<M8[s]",
            "structures": "f4,i4",
            "complex numbers": "<c8",
            "long doubles": "<f16",
            "nonsense": "nonsense",
            "a number for a dtype": 8,
        }.items()
    },
    **{
        f"an array of shape {what}": Hostile(sending(array_reply(shape=shape)), PolicyProtocolError, "")
        for what, shape in {
            "[2] for one number": [2],
            "[-1]": [-1],
            "[2**62, 2**62]": [2**62, 2**62],
            "[2**64 - 1]": [2**64 - 1],
            "[1.0]": [1.0],
            "33 dimensions": [1] * 33,
            "none": None,
            "a text": "1",
        }.items()
    },
    "an array of pickles": Hostile(
        sending(array_reply(dtype="|O", data=b"cos\nsystem\n(S'false'\ntR.")), PolicyProtocolError, "dtype"
    ),
    "4097 arrays": Hostile(
        sending(frame(packb({"actions": [np.zeros(1, np.uint8)] * 4097}))), PolicyProtocolError, "arrays"
    ),
}


@pytest.mark.parametrize("case", REPLIES)
def test_a_hostile_reply_ends_its_connection_and_nothing_else(case: str, honest: WebSocketConnector) -> None:
    hostile = REPLIES[case]
    observation = hostile.observation or OBSERVATION
    allowed_bytes = MEMORY_BYTES + 4 * len(packb(observation))
    with scripted_server(hostile.script) as port, within_memory(allowed_bytes):
        connection = connector_to(port, hostile).connect(LONG_SECONDS)
        try:
            with (
                within_deadline(hostile.seconds),
                pytest.raises(hostile.error, match=f"(?s){hostile.words}") as caught,
            ):
                connection.act(observation, hostile.seconds)
            with pytest.raises(PolicyLost):
                connection.act(OBSERVATION, LONG_SECONDS)
        finally:
            connection.close()

    assert len(str(caught.value)) < 20_000
    check_honest(honest)


def unasked(peer: Peer) -> None:
    peer.upgrade(behind=ACTION)
    peer.finished.wait(10)


def twice(peer: Peer) -> None:
    peer.upgrade()
    peer.read_frame()
    peer.send(ACTION * 2)
    peer.finished.wait(10)


def late(peer: Peer) -> None:
    """The first reply comes after its deadline, when the second observation would be on its way."""
    peer.upgrade()
    peer.read_frame()
    peer.finished.wait(10)
    peer.send(ACTION)


@pytest.mark.parametrize(
    ("script", "errors"),
    [
        (unasked, [PolicyProtocolError, PolicyLost]),
        (twice, [None, PolicyProtocolError, PolicyLost]),
        (late, [PolicyLate, PolicyLost, PolicyLost]),
    ],
)
def test_a_reply_is_never_taken_for_that_to_another_observation(
    script: Script, errors: list[type[PolicyError] | None], honest: WebSocketConnector
) -> None:
    with scripted_server(script) as port, within_memory(MEMORY_BYTES):
        connection = WebSocketConnector("127.0.0.1", port).connect(LONG_SECONDS)
        for error in errors:
            seconds = SHORT_SECONDS if error is PolicyLate else LONG_SECONDS
            if error is None:
                connection.act(OBSERVATION, seconds)
                continue
            with within_deadline(seconds), pytest.raises(error):
                connection.act(OBSERVATION, seconds)
        connection.close()

    check_honest(honest)


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (frame(packb({"actions": np.array([1.0, np.nan])})), NonFiniteAction),
        (frame(packb({"actions": [1.0, float("inf")]})), NonFiniteAction),
        (frame(packb({"actions": np.zeros(3)})), InvalidAction),
        (frame(packb({"actions": "left"})), InvalidAction),
        (frame(packb({"actions": ["x" * 100_000] + ["a"] * 20_000})), InvalidAction),
        (array_reply(data=b"", shape=[2**40, 0]), InvalidAction),
        (array_reply(data=b"", shape=[2**40, 2, 0]), InvalidAction),
    ],
)
def test_what_the_wire_lets_through_and_no_environment_takes_is_refused_within_memory(
    reply: bytes, error: type[Exception]
) -> None:
    space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    with scripted_server(sending(reply)) as port, within_memory(MEMORY_BYTES):
        connection = WebSocketConnector("127.0.0.1", port).connect(LONG_SECONDS)
        actions = connection.act(OBSERVATION, LONG_SECONDS)
        with pytest.raises(error):
            from_wire(space, split_chunk(space, actions)[0])
        connection.close()


# ------------------------------------------------------------------------------------------ greetings


def answering_http(data: bytes) -> Script:
    def script(peer: Peer) -> None:
        peer.read_http_head()
        peer.send(data)
        peer.finished.wait(10)

    return script


def without_end(head: bytes, more: bytes) -> Script:
    def script(peer: Peer) -> None:
        peer.read_http_head()
        peer.send(head)
        for_ever(more)(peer)

    return script


def greeting(metadata: bytes) -> Script:
    def script(peer: Peer) -> None:
        peer.upgrade(metadata=metadata)
        peer.finished.wait(10)

    return script


def challenged(answer: Script) -> Script:
    """Reads the client's challenge first."""

    def script(peer: Peer) -> None:
        peer.challenge = peer.exactly(len(MAGIC) + NONCE_BYTES)
        answer(peer)
        peer.finished.wait(10)

    return script


def replayed(peer: Peer) -> None:
    """What an honest host of this very key answered to another client."""
    client, server = bytes(NONCE_BYTES), b"s" * NONCE_BYTES
    peer.send(server + hmac.digest(KEY, b"server" + client + server, "sha256"))


def upgrade_with(header: bytes) -> Script:
    """An opening handshake that is right but for one more header."""

    def script(peer: Peer) -> None:
        peer.upgrade(header=header)
        peer.finished.wait(10)

    return script


GREETINGS = {
    # Another protocol.
    "a redirect": Hostile(
        answering_http(b"HTTP/1.1 301 Moved\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"),
        PolicyProtocolError,
        "301",
    ),
    "401": Hostile(
        answering_http(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n"), PolicyProtocolError, "401"
    ),
    "503 with a body to come": Hostile(
        answering_http(b"HTTP/1.1 503 Busy\r\nContent-Length: 1000\r\n\r\n"), PolicyProtocolError, "503"
    ),
    "a chunked page": Hostile(
        without_end(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"5\r\nhello\r\n"),
        PolicyProtocolError,
        "200",
    ),
    "a length of 4,000 digits": Hostile(
        answering_http(b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 4000 + b"\r\n\r\n"),
        PolicyProtocolError,
        "HTTP",
    ),
    "headers without end": Hostile(
        without_end(b"HTTP/1.1 101 Switching Protocols\r\n", b"X-More: of this\r\n"),
        PolicyProtocolError,
        "too long",
    ),
    "one header without end": Hostile(
        without_end(b"HTTP/1.1 101 Switching Protocols\r\nX: ", b"x" * 100), PolicyProtocolError, "too long"
    ),
    "a status line without end": Hostile(without_end(b"", b"x" * 100), PolicyProtocolError, "too long"),
    "a TLS alert": Hostile(
        in_turn(read_head, saying(b"\x15\x03\x03\0\x02\x02\x28")),
        PolicyProtocolError,
        "HTTP",
    ),
    "SSH": Hostile(
        in_turn(read_head, saying(b"SSH-2.0-OpenSSH_9\r\n")),
        PolicyProtocolError,
        "HTTP",
    ),
    "HTTP/2": Hostile(
        answering_http(b"HTTP/2 101 Switching Protocols\r\n\r\n"), PolicyProtocolError, "WebSocket"
    ),
    "an upgrade without proof": Hostile(
        answering_http(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
        ),
        PolicyProtocolError,
        "Accept",
    ),
    "an upgrade to compression": Hostile(
        upgrade_with(b"Sec-WebSocket-Extensions: permessage-deflate\r\n"), PolicyProtocolError, "extension"
    ),
    "an upgrade to a subprotocol": Hostile(
        upgrade_with(b"Sec-WebSocket-Protocol: chat\r\n"), PolicyProtocolError, "subprotocol"
    ),
    # Time, and the end.
    "nothing": Hostile(stay, PolicyLate, "deadline", SHORT_SECONDS),
    "no metadata": Hostile(greeting(frame(b"", 9)), PolicyLate, "deadline", SHORT_SECONDS),
    "metadata a byte at a time": Hostile(
        in_turn(lambda peer: peer.upgrade(metadata=frame(b"", 9)), dripping(frame(packb({"x": "x" * 1000})))),
        PolicyLate,
        "deadline",
        SHORT_SECONDS,
    ),
    "an answer a byte at a time": Hostile(
        in_turn(read_head, dripping(b"HTTP/1.1 101 " * 100)),
        PolicyLate,
        "deadline",
        SHORT_SECONDS,
    ),
    "hangs up at once": Hostile(hang_up, PolicyLost, ""),
    "resets at once": Hostile(lambda peer: peer.reset(), PolicyLost, ""),
    "hangs up mid-answer": Hostile(
        in_turn(read_head, saying(b"HTTP/1.1 101 ")),
        PolicyProtocolError,
        "cut short",
    ),
    # Metadata.
    "metadata that is no map": Hostile(greeting(frame(packb([]))), PolicyProtocolError, "not a map"),
    "metadata of 40 levels": Hostile(greeting(frame(b"\x91" * 40 + b"\xc0")), PolicyProtocolError, "deeper"),
    "metadata of a terabyte": Hostile(
        greeting(b"\x82" + struct.pack("!BQ", 127, 2**40)), PolicyProtocolError, "limit"
    ),
    "metadata of four billion items": Hostile(
        greeting(frame(b"\xdd\xff\xff\xff\xff")), PolicyProtocolError, "items"
    ),
    "metadata in a masked frame": Hostile(greeting(b"\x82\x81\0\0\0\0x"), PolicyProtocolError, "mask"),
    "a traceback for metadata": Hostile(greeting(frame(b"Traceback: no", 1)), PolicyRaised, "Traceback: no"),
    "a close for metadata": Hostile(greeting(frame(b"\x03\xf5later", 8)), PolicyLost, "later"),
    # The challenge.
    "does not know the key": Hostile(
        challenged(saying(bytes(NONCE_BYTES + PROOF_BYTES))),
        AuthenticationFailed,
        "session key",
        key=KEY,
    ),
    "replays an answer": Hostile(challenged(replayed), AuthenticationFailed, "session key", key=KEY),
    "reflects the challenge": Hostile(
        challenged(lambda peer: peer.send(peer.challenge[len(MAGIC) :] * 2)),
        AuthenticationFailed,
        "session key",
        key=KEY,
    ),
    "answers the challenge in HTTP": Hostile(
        challenged(saying(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 99\r\n\r\n" + b"x" * 99)),
        AuthenticationFailed,
        "session key",
        key=KEY,
    ),
    "half an answer to the challenge": Hostile(
        challenged(saying(bytes(NONCE_BYTES))), PolicyLate, "deadline", SHORT_SECONDS, KEY
    ),
    "hangs up on the challenge": Hostile(challenged(hang_up), PolicyLost, "", key=KEY),
}


@pytest.mark.parametrize("case", GREETINGS)
def test_a_hostile_greeting_gives_no_connection_and_harms_no_other(
    case: str, honest: WebSocketConnector
) -> None:
    hostile = GREETINGS[case]
    with (
        scripted_server(hostile.script) as port,
        within_memory(MEMORY_BYTES),
        within_deadline(hostile.seconds),
        pytest.raises(hostile.error, match=f"(?s){hostile.words}") as caught,
    ):
        connector_to(port, hostile).connect(hostile.seconds)

    assert len(str(caught.value)) < 20_000
    check_honest(honest)
