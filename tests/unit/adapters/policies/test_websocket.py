"""Our client against servers that lie, stall, repeat themselves or hang up."""

from __future__ import annotations

import gc
import pickle
import resource
import socket
import struct
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

import msgpack
import numpy as np
import pytest

from orchestrator.adapters.policies.websocket import WebSocketConnection, WebSocketConnector
from orchestrator.domain.errors import (
    AuthenticationFailed,
    PolicyError,
    PolicyLate,
    PolicyLost,
    PolicyProtocolError,
    PolicyRaised,
)
from orchestrator.submission.wire import packb, unpackb
from tests.unit.adapters.policies.hostile_servers import Peer, Script, frame, scripted_server

ACTION = frame(packb({"actions": np.zeros(2)}))
OBSERVATION = {"observation": np.zeros(3)}
NUMBERED = {"server": "orchestrator", "extensions": ["reset", "sequence"]}


@contextmanager
def connected(script: Script) -> Iterator[WebSocketConnection]:
    with scripted_server(script) as port:
        connection = WebSocketConnector("127.0.0.1", port).connect(10)
        try:
            yield connection
        finally:
            connection.close()


def answering(*replies: bytes, metadata: object = None) -> Script:
    """Reads one frame before each reply, and stays until the test is over."""

    def script(peer: Peer) -> None:
        peer.upgrade(metadata)
        for reply in replies:
            peer.read_frame()
            peer.send(reply)
        peer.finished.wait(10)

    return script


def test_a_plain_server_is_driven_without_extensions() -> None:
    def script(peer: Peer) -> None:
        peer.upgrade({"reset_pose": [0.5]})
        opcode, payload = peer.read_frame()
        assert opcode == 2
        assert unpackb(payload).keys() == {"observation"}
        peer.send(ACTION)
        peer.finished.wait(10)

    with connected(script) as connection:
        connection.reset(1, 2, 10)

        assert connection.act(OBSERVATION, 10).tolist() == [0, 0]
        assert connection.metadata == {"reset_pose": [0.5]}
        assert not connection.supports_reset


def test_a_late_reply_never_becomes_an_action() -> None:
    def script(peer: Peer) -> None:
        peer.upgrade()
        peer.read_frame()
        peer.finished.wait(10)
        peer.send(ACTION)

    with connected(script) as connection:
        with pytest.raises(PolicyLate):
            connection.act(OBSERVATION, 0.1)
        with pytest.raises(PolicyLost):
            connection.act(OBSERVATION, 10)


def test_a_reply_in_drips_is_late_at_the_deadline_of_the_whole_message() -> None:
    def script(peer: Peer) -> None:
        peer.upgrade()
        peer.read_frame()
        for byte in ACTION:
            peer.send(bytes([byte]))
            if peer.finished.wait(0.05):
                return

    # No single byte is late: only a deadline of the whole message ends this.
    with connected(script) as connection, pytest.raises(PolicyLate):
        connection.act(OBSERVATION, 0.3)


def test_a_reply_in_pieces_within_the_deadline_is_whole() -> None:
    def script(peer: Peer) -> None:
        peer.upgrade()
        peer.read_frame()
        for byte in ACTION:
            peer.send(bytes([byte]))
        peer.read_frame()
        payload = packb({"actions": 7})
        peer.send(frame(payload[:3], fin=False) + frame(b"are you there", 9) + frame(payload[3:], 0))
        assert peer.read_frame() == (10, b"are you there")

    with connected(script) as connection:
        assert connection.act(OBSERVATION, 10).tolist() == [0, 0]
        assert connection.act(OBSERVATION, 10) == 7


def test_an_announced_length_beyond_the_cap_is_refused_before_anything_is_allocated() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with (
        connected(answering(b"\x82" + struct.pack("!BQ", 127, 2**40))) as connection,
        pytest.raises(PolicyProtocolError, match="above the limit"),
    ):
        connection.act(OBSERVATION, 10)

    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024


def test_fragments_do_not_get_round_the_cap() -> None:
    def script(peer: Peer) -> None:
        peer.upgrade()
        peer.read_frame()
        for number in range(100):
            peer.send(frame(bytes(1000), 0 if number else 2, fin=False))

    with scripted_server(script) as port:
        connection = WebSocketConnector("127.0.0.1", port, max_message_bytes=10_000).connect(10)
        with pytest.raises(PolicyError) as caught:
            connection.act(OBSERVATION, 10)

    assert isinstance(caught.value, PolicyProtocolError | PolicyLost)


def test_endless_empty_fragments_are_refused() -> None:
    def script(peer: Peer) -> None:
        peer.upgrade()
        peer.read_frame()
        peer.send(frame(b"", fin=False))
        while not peer.finished.is_set():
            peer.send(frame(b"", 0, fin=False) * 100)

    with connected(script) as connection, pytest.raises(PolicyProtocolError, match="fragments"):
        connection.act(OBSERVATION, 10)


MIB = 2**20
LARGE = b"\x82" + struct.pack("!BQ", 127, 32 * MIB) + bytes(16 * MIB)  # and half of it to come
LARGE_FRAGMENT = frame(bytes(16 * MIB), fin=False)


@pytest.mark.parametrize(
    ("metadata", "reply"),
    [
        (b"", LARGE),
        (b"", LARGE_FRAGMENT),
        (b"", LARGE_FRAGMENT + b"\x83\x00"),
        (b"", LARGE_FRAGMENT + b"\x80" + struct.pack("!BQ", 127, 2**40)),
        (b"", frame(bytes(16 * MIB))),
        (b"", frame(packb({"actions": bytes(16 * MIB)})) * 2),
        (b"", frame(b"\x03\xe8", 8)),
        (LARGE, b""),
        (LARGE_FRAGMENT + b"\x83\x00", b""),
        (frame(packb([bytes(16 * MIB)])), b""),
    ],
)
def test_a_discarded_connection_keeps_nothing_that_it_received(metadata: bytes, reply: bytes) -> None:
    """Also before the garbage collector comes round: it does not know how large its cycles are."""

    def script(peer: Peer) -> None:
        peer.upgrade(metadata=metadata)
        if not metadata:
            peer.read_frame()
            peer.send(reply)

    def drive_until_the_error(port: int) -> None:
        connection = WebSocketConnector("127.0.0.1", port).connect(30)
        while True:
            connection.act(OBSERVATION, 30)

    with scripted_server(script) as port, pytest.raises(PolicyError):
        drive_until_the_error(port)  # what is imported and cached by the first one is no leak
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        with scripted_server(script) as port:
            before, _ = tracemalloc.get_traced_memory()
            with pytest.raises(PolicyError):
                drive_until_the_error(port)
            kept = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
        gc.enable()

    # One buffer kept is many times as much; what other threads of this process trace meanwhile is not.
    assert kept < MIB


def object_array() -> bytes:
    array = {b"__ndarray__": True, b"data": b"\x80\x04N.", b"dtype": "|O", b"shape": [1]}
    packed: bytes = msgpack.packb({"actions": array})
    return packed


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (frame(object_array()), "dtype"),
        (frame(b"\xc1"), "0xc1"),
        (frame(packb([1])), "not a map"),
        (frame(packb({"action": 1})), "no key `actions`"),
        (frame(b""), "cut short"),
        (b"\x83\x00", "opcode"),
        (b"\xc2\x00", "reserved"),
        (b"\x82\x80\x00\x00\x00\x00", "mask"),
        (frame(b"x", 0), "continuation"),
        (b"HTTP/1.1 400 Bad Request\r\n" + b"x" * 200, "WebSocket"),
    ],
)
def test_a_malformed_reply_is_a_protocol_error_and_ends_the_connection(reply: bytes, reason: str) -> None:
    with connected(answering(reply)) as connection:
        with pytest.raises(PolicyProtocolError, match=reason):
            connection.act(OBSERVATION, 10)
        with pytest.raises(PolicyLost):
            connection.act(OBSERVATION, 10)


def test_a_text_frame_is_the_policys_exception() -> None:
    text = "Traceback (most recent call last):\nValueError: no"

    with connected(answering(frame(text.encode(), 1))) as connection:
        with pytest.raises(PolicyRaised, match="ValueError: no"):
            connection.act(OBSERVATION, 10)
        with pytest.raises(PolicyLost):
            connection.act(OBSERVATION, 10)


def test_a_huge_or_undecodable_text_is_shortened_not_refused() -> None:
    with (
        connected(answering(frame(b"\xff" * 1_000_000, 1))) as connection,
        pytest.raises(PolicyRaised) as caught,
    ):
        connection.act(OBSERVATION, 10)

    assert len(str(caught.value)) < 100_000


@pytest.mark.parametrize("cut", [1, 2, 12, len(ACTION) - 1])
def test_a_second_reply_to_one_request_is_found_before_the_next(cut: int) -> None:
    """Also where only its first bytes have come, and the rest comes later."""

    def script(peer: Peer) -> None:
        peer.upgrade()
        peer.read_frame()
        peer.send(ACTION + ACTION[:cut])
        peer.send(ACTION[cut:])
        peer.finished.wait(10)

    with connected(script) as connection:
        connection.act(OBSERVATION, 10)

        with pytest.raises(PolicyProtocolError, match="not asked for"):
            connection.act(OBSERVATION, 10)


def test_a_message_before_the_first_observation_is_refused() -> None:
    def script(peer: Peer) -> None:
        peer.upgrade(behind=ACTION)
        peer.finished.wait(10)

    with connected(script) as connection, pytest.raises(PolicyProtocolError, match="not asked for"):
        connection.act(OBSERVATION, 10)


def test_pings_between_observations_are_answered_and_harmless() -> None:
    def script(peer: Peer) -> None:
        peer.upgrade(behind=frame(b"1", 9))
        frames = [peer.read_frame(), peer.read_frame()]
        assert frames[0] == (10, b"1")
        assert frames[1][0] == 2
        peer.send(ACTION + frame(b"2", 9))
        assert peer.read_frame() == (10, b"2")
        assert peer.read_frame()[0] == 2
        peer.send(ACTION)

    with connected(script) as connection:
        connection.act(OBSERVATION, 10)
        connection.act(OBSERVATION, 10)


LOOKALIKES = [True, 1.0, np.int64(1), np.array(1), np.array([1]), np.array([1, 1]), [1]]


@pytest.mark.parametrize("sequence", [None, 0, 2, "1", 1.5, *LOOKALIKES])
def test_a_reply_with_another_number_is_refused(sequence: object) -> None:
    reply = frame(packb({"actions": 1, "__sequence__": sequence}))

    with (
        connected(answering(reply, metadata=NUMBERED)) as connection,
        pytest.raises(PolicyProtocolError, match=r"a reply to .+ came for request 1"),
    ):
        connection.act(OBSERVATION, 10)


@pytest.mark.parametrize(
    "reply",
    [
        {},
        {"__orchestrator__": "reset"},
        {"__orchestrator__": "reset", "sequence": 9},
        {"__orchestrator__": np.array([1, 2]), "sequence": 1},
        *({"__orchestrator__": "reset", "sequence": lookalike} for lookalike in LOOKALIKES),
        {"actions": 1},
    ],
)
def test_a_reset_needs_its_own_answer(reply: dict[str, object]) -> None:
    with (
        connected(answering(frame(packb(reply)), metadata=NUMBERED)) as connection,
        pytest.raises(PolicyProtocolError, match="reset"),
    ):
        connection.reset(0, 1, 10)


@pytest.mark.parametrize("extensions", ["reset", {"reset": 1}, [["reset"]], None, 5, [np.zeros(2)]])
def test_odd_announcements_count_as_none(extensions: object) -> None:
    with connected(answering(metadata={"extensions": extensions})) as connection:
        assert not connection.supports_reset


def closing(peer: Peer) -> None:
    peer.send(frame(struct.pack("!H", 1011) + b"policy died", 8))


def half_closing(peer: Peer) -> None:
    peer.socket.shutdown(socket.SHUT_WR)
    peer.finished.wait(10)


def cutting(peer: Peer) -> None:
    peer.send(ACTION[:9])


def resetting(peer: Peer) -> None:
    peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


# Half a message without an observation is one that nobody asked for: another error.
ENDS = [*((end, True) for end in (closing, half_closing, cutting, resetting))]
ENDS += [(end, False) for end in (closing, half_closing, resetting)]


@pytest.mark.parametrize(("end", "after_observation"), ENDS)
def test_every_end_of_the_connection_is_a_lost_policy(end: Script, after_observation: bool) -> None:
    def script(peer: Peer) -> None:
        peer.upgrade()
        if after_observation:
            peer.read_frame()
        end(peer)

    with connected(script) as connection, pytest.raises(PolicyLost):
        connection.act(OBSERVATION, 10)


def test_the_reason_of_a_close_is_told() -> None:
    def script(peer: Peer) -> None:
        peer.upgrade()
        peer.read_frame()
        closing(peer)

    with connected(script) as connection, pytest.raises(PolicyLost, match=r"1011.*policy died"):
        connection.act(OBSERVATION, 10)


def test_a_server_that_does_not_read_makes_a_large_observation_late() -> None:
    def script(peer: Peer) -> None:
        peer.upgrade()
        peer.finished.wait(10)

    with connected(script) as connection, pytest.raises(PolicyLate):
        connection.act({"image": np.zeros(30_000_000, np.uint8)}, 0.3)


def test_a_ping_flood_does_not_move_the_deadline() -> None:
    def script(peer: Peer) -> None:
        peer.upgrade()
        peer.read_frame()
        until = time.monotonic() + 8
        while not peer.finished.is_set() and time.monotonic() < until:
            peer.send(frame(b"x" * 100, 9) * 10)
        peer.send(ACTION)  # which nobody waits for any more

    with connected(script) as connection, pytest.raises(PolicyError):
        connection.act(OBSERVATION, 0.3)


def test_an_observation_that_cannot_be_sent_leaves_the_connection_whole() -> None:
    with connected(answering(ACTION)) as connection:
        with pytest.raises(TypeError, match="camera"):
            connection.act({"camera": object()}, 10)

        assert connection.act(OBSERVATION, 10).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("greeting", "error"),
    [
        (b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\nbusy", PolicyProtocolError),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n", PolicyProtocolError),
        (b"SSH-2.0-OpenSSH_9\r\n\r\n", PolicyProtocolError),
        (b"x" * 20_000, PolicyProtocolError),
        (b"", PolicyLost),
    ],
)
def test_what_is_no_websocket_server_is_refused(greeting: bytes, error: type[Exception]) -> None:
    def script(peer: Peer) -> None:
        peer.read_http_head()
        peer.send(greeting)

    with scripted_server(script) as port, pytest.raises(error):
        WebSocketConnector("127.0.0.1", port).connect(10)


def test_a_server_without_metadata_is_late() -> None:
    with (
        scripted_server(lambda peer: peer.finished.wait(10) and None) as port,
        pytest.raises(PolicyLate),
    ):
        WebSocketConnector("127.0.0.1", port).connect(0.2)


def test_a_server_that_does_not_know_the_challenge_is_no_container_of_ours() -> None:
    def script(peer: Peer) -> None:
        peer.socket.recv(36)
        peer.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 80\r\n\r\n" + b"x" * 80)

    with scripted_server(script) as port, pytest.raises(AuthenticationFailed):
        WebSocketConnector("127.0.0.1", port, bytes(32)).connect(10)


def test_nobody_at_the_port_is_a_lost_policy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    with pytest.raises(PolicyLost):
        WebSocketConnector("127.0.0.1", port).connect(5)


def test_a_connector_pickles_and_never_shows_its_key() -> None:
    connector = WebSocketConnector("10.0.0.7", 8000, b"k" * 32)

    assert pickle.loads(pickle.dumps(connector)) == connector
    assert "kkkk" not in repr(connector)


def test_closing_twice_is_harmless() -> None:
    with connected(answering()) as connection:
        connection.close()
        connection.close()

        with pytest.raises(PolicyLost):
            connection.reset(0, 0, 1) or connection.act(OBSERVATION, 1)
