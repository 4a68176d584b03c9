"""What is fuzzed: each target plays one input against our code and says how it ended.

An ending that is not documented is raised, and so is a broken promise (as AssertionError). The bytes go
through real sockets, in one thread: a peer has written its part before it is read, or writes it after ours
was sent.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import random
import secrets
import shutil
import socket
import sys
import tarfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol
from unittest import mock

import numpy as np
from gymnasium import spaces

from orchestrator.adapters.benchmarks.spaces import InvalidAction, NonFiniteAction, from_wire, split_chunk
from orchestrator.adapters.policies.host_client import Answer, SubmissionHostClient
from orchestrator.adapters.policies.websocket import WebSocketConnector
from orchestrator.domain.errors import InfrastructureError, PolicyError, SubmissionError
from orchestrator.ports import Endpoint
from orchestrator.submission.archive import ArchiveLimits
from orchestrator.submission.door import Door
from orchestrator.submission.handshake import (
    MAGIC,
    NONCE_BYTES,
    PROOF_BYTES,
    HandshakeFailed,
    HostState,
    prove_as_client,
    prove_as_server,
)
from orchestrator.submission.policy_server import PolicyServer
from orchestrator.submission.preparation import Prepared
from orchestrator.submission.reception import SubmissionHost
from orchestrator.submission.transport import ByteStream, ConnectionLost
from orchestrator.submission.wire import WireError, WireLimits, packb, unpackb
from tests.fuzz.inputs import (
    CLIENT_HEAD,
    SERVER_HEAD,
    WEBSOCKET_KEY,
    damaged,
    frames,
    message,
    metadata,
    odd_actions,
    reply,
    value,
)

KEY = bytes(range(32))
NONCE = b"n" * NONCE_BYTES
SOON_SECONDS = 5.0
AT_ONCE_SECONDS = 0.002
REFUSALS = (TimeoutError, ConnectionLost, WireError, HandshakeFailed)


class Target(Protocol):
    """Something to fuzz."""

    def play(self, rng: random.Random) -> str:
        """Draw one input, play it, and name how it ended."""
        ...


# ------------------------------------------------------------------------------------------- sockets


class _LocalSocket(socket.socket):
    """One end of a socket pair: a stream like TCP's, but without TCP's options."""

    def setsockopt(self, level: int, *rest: Any) -> None:  # type: ignore[override]
        if level != socket.IPPROTO_TCP:
            super().setsockopt(level, *rest)


@contextmanager
def local_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Our end and the peer's."""
    ours, peer = socket.socketpair()
    with _LocalSocket(fileno=ours.detach()) as ours, peer:
        peer.setblocking(False)
        yield ours, peer


def _received(peer: socket.socket) -> bytes:
    """All that was sent to the peer."""
    data = bytearray()
    try:
        while chunk := peer.recv(2**16):
            data += chunk
    except (BlockingIOError, ConnectionResetError):
        pass
    return bytes(data)


class _AnsweredStream(ByteStream):
    """A stream whose peer sends its next chunk after each thing that is sent to it.

    It hangs up once our side waits for more than it will send, or else stays silent.
    """

    def __init__(
        self, ours: socket.socket, peer: socket.socket, chunks: Sequence[bytes], *, hangs_up: bool
    ) -> None:
        super().__init__(ours)
        self._peer = peer
        self._chunks = list(chunks)
        self._hangs_up = hangs_up

    def send_all(self, data: bytes | memoryview, deadline: float | None) -> None:
        super().send_all(data, deadline)
        if self._chunks:
            self._peer.sendall(self._chunks.pop(0))

    def receive_into(self, buffer: memoryview, deadline: float | None) -> int:
        if self._hangs_up and not self.has_pending():
            self._chunks.clear()
            self._peer.shutdown(socket.SHUT_WR)
        return super().receive_into(buffer, deadline)


# ------------------------------------------------------------------------------------------- decoder

TIGHT = {"depth": 5, "items": 40, "arrays": 3, "text_bytes": 400, "frame_bytes": 900}
_PLAIN = (type(None), bool, int, float, str, bytes)
_DTYPE_KINDS = "biuf"


def check_allowed(decoded: Any, limits: WireLimits, writable: bool) -> None:
    """What the decoder returned holds nothing that the wire does not have, and no more than the limits."""
    left = {"items": limits.items, "arrays": limits.arrays, "text_bytes": limits.text_bytes}

    def walk(part: Any, depth: int) -> None:
        assert depth <= limits.depth, "nested too deep"
        kind = type(part)
        if kind is str and len(part) > 31:  # shorter ones count as items
            left["text_bytes"] -= len(part.encode())
        if kind in _PLAIN:
            return
        if kind is list:
            left["items"] -= len(part)
            for item in part:
                walk(item, depth + 1)
        elif kind is dict:
            left["items"] -= 2 * len(part)
            for key, item in part.items():
                assert type(key) in (str, bytes), kind
                walk(key, depth + 1)
                walk(item, depth + 1)
        elif kind is np.ndarray:
            left["arrays"] -= 1
            assert part.dtype.kind in _DTYPE_KINDS, part.dtype
            assert part.dtype.itemsize <= 8, part.dtype
            assert part.flags.writeable == writable
            assert part.dtype.kind != "b" or not part.tobytes().strip(b"\0\1")
        else:
            assert isinstance(part, np.generic), kind
            assert part.dtype.kind in _DTYPE_KINDS, part.dtype

    walk(decoded, 0)
    assert min(left.values()) >= 0, left


@contextmanager
def at_most(peak_bytes: int) -> Iterator[None]:
    """The block allocates no more."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < peak_bytes, f"{peak} bytes, above {peak_bytes}"


class Decoder:
    """`unpackb`: whole, lying and damaged messages, under all sorts of limits."""

    def play(self, rng: random.Random) -> str:
        data = damaged(rng, message(rng))
        limits = WireLimits()
        if rng.random() < 0.3:
            tight = rng.choice(list(TIGHT))
            limits = replace(limits, **{tight: rng.randrange(TIGHT[tight])})
        writable = rng.random() < 0.5
        if rng.random() < 0.02:
            # An item of one byte becomes an object of some 70 bytes; nothing else grows as much.
            with at_most(16 * 1024 + 128 * len(data)), suppress(WireError):
                unpackb(data, limits=limits, writable=writable)
        try:
            decoded = unpackb(data, limits=limits, writable=writable)
        except WireError:
            return "WireError"
        check_allowed(decoded, limits, writable)
        packed = packb(decoded)
        assert packb(unpackb(packed)) == packed
        return "decoded"


class Actions:
    """What the decoder lets through, as the action or the chunk of actions of an environment."""

    def __init__(self) -> None:
        arm, gripper = spaces.Box(-1.0, 1.0, (4,), np.float32), spaces.Discrete(3, start=-1)
        self._spaces: list[spaces.Space[Any]] = [
            *(arm, gripper, spaces.Box(0, 255, (2, 2), np.uint8), spaces.MultiDiscrete([2, 3])),
            *(
                spaces.Box(-1.0, 1.0, (0,)),
                spaces.MultiBinary(3),
                spaces.Text(4),
                spaces.Tuple((gripper, arm)),
            ),
            spaces.Dict({"a": spaces.Dict({"b": arm, "data": gripper}), "x": spaces.MultiBinary(2)}),
        ]
        for number, space in enumerate(self._spaces):
            space.seed(number)

    def play(self, rng: random.Random) -> str:
        space = rng.choice(self._spaces)
        kind = rng.randrange(5)
        if kind < 2:
            came: Any = space.sample()
            data = damaged(rng, packb(came if kind else [came] * 3))
        elif kind == 2:
            data = packb(odd_actions(rng))
        else:
            data = damaged(rng, packb(value(rng)) if kind == 3 else message(rng))
        try:
            came = unpackb(data, writable=True)
        except WireError:
            return "not decoded"
        if isinstance(came, dict) and "actions" in came:
            came = came["actions"]
        if rng.random() < 0.02:
            with at_most(2**21 + 128 * len(data)):
                self._judge(space, came)
        return self._judge(space, came)

    def _judge(self, space: spaces.Space[Any], came: Any) -> str:
        try:
            actions = [from_wire(space, row).action for row in split_chunk(space, came)[:5]]
        except (InvalidAction, NonFiniteAction) as error:
            if len(str(error)) > 2000:  # it is shown to people
                raise
            return type(error).__name__
        for action in actions:
            assert space.contains(action), action
            packb(action)
        return "actions"


# --------------------------------------------------------------------------------------------- client


class Client:
    """Our client: the opening handshake, the metadata and three replies of a server."""

    def play(self, rng: random.Random) -> str:
        chunks = [SERVER_HEAD + frames(rng, metadata(rng), masked=False)]
        for number in (1, 2, 3):
            answer = reply(rng, number) if rng.random() < 0.9 else message(rng)
            chunks.append(frames(rng, answer, masked=False))
        spoilt = rng.randrange(6)
        chunks = [damaged(rng, chunk) if index == spoilt else chunk for index, chunk in enumerate(chunks)]
        hangs_up = rng.random() < 0.99
        seconds = SOON_SECONDS if hangs_up else AT_ONCE_SECONDS
        connector = WebSocketConnector("127.0.0.1", 1, max_message_bytes=100_000)
        with local_pair() as (ours, peer):
            stream = _AnsweredStream(ours, peer, chunks, hangs_up=hangs_up)
            try:
                connection = connector._greet(stream, time.monotonic() + seconds)
            except (*REFUSALS, PolicyError) as error:
                return f"no connection: {type(error).__name__}"
            return self._drive(connection, rng, seconds)

    def _drive(self, connection: Any, rng: random.Random, seconds: float) -> str:
        for replies in range(3):
            try:
                if rng.random() < 0.1:
                    connection.reset(1, 2, seconds)
                connection.act({"observation": 1.5}, seconds)
            except PolicyError as error:
                _check_discarded(connection)
                return f"{replies} replies, then {type(error).__name__}"
        return "3 replies"


def _check_discarded(connection: Any) -> None:
    try:
        connection.act({"observation": 1.5}, SOON_SECONDS)
    except PolicyError:
        return
    raise AssertionError("a connection was used again after an error")


# --------------------------------------------------------------------------------------------- server


class _Echo:
    def act(self, observation: Any) -> Any:
        return observation


class Server:
    """The policy server: the opening handshake and the observations of a client."""

    def __init__(self) -> None:
        self._server = PolicyServer(Path("/nonexistent"))
        # As `load()` leaves it.
        self._server._make_agent, self._server._state = _Echo, HostState.SERVING

    def play(self, rng: random.Random) -> str:
        chunks = [frames(rng, message(rng), masked=True) for _ in range(rng.randrange(1, 5))]
        spoilt = rng.randrange(-2, len(chunks))
        chunks = [damaged(rng, chunk) if index == spoilt else chunk for index, chunk in enumerate(chunks)]
        head = damaged(rng, CLIENT_HEAD) if spoilt == -1 else CLIENT_HEAD
        with local_pair() as (ours, peer):
            if rng.random() < 0.3:
                return self._all_at_once(ours, peer, head + b"".join(chunks))
            # The answer to the head, the metadata, and then every reply is followed by the next observation.
            peer.sendall(head)
            stream = _AnsweredStream(ours, peer, [b"", *chunks], hangs_up=True)
            with suppress(*REFUSALS):
                self._server.welcome(stream, None, time.monotonic() + SOON_SECONDS)
            return _judge_served(_received(peer))

    def _all_at_once(self, ours: socket.socket, peer: socket.socket, sent: bytes) -> str:
        peer.sendall(sent)
        peer.shutdown(socket.SHUT_WR)
        _open_door(self._server.welcome, None)._serve(ours)
        return _judge_served(_received(peer))


def _open_door(welcome: Callable[..., None], key: bytes | None, seconds: float = SOON_SECONDS) -> Door:
    """A door with nobody else at it; it raises what its thread would have died of."""
    door = Door(None, key, welcome, connections=1, greeting_seconds=seconds)  # type: ignore[arg-type]
    assert door._places.acquire(blocking=False)
    return door


def _judge_served(data: bytes) -> str:
    """What the server sent is HTTP and whole frames, none of them masked."""
    if not data:
        return "no answer"
    head, _, rest = data.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 101"):
        assert head.startswith((b"HTTP/1.1 4", b"HTTP/1.1 505")), head[:80]
        return "refused over HTTP"
    messages = 0
    while rest:
        opcode, length = rest[0] & 0x0F, rest[1]
        assert opcode in (1, 2, 8, 10)
        assert length < 128, "masked"
        start = 2 if length < 126 else 4 if length == 126 else 10
        size = int.from_bytes(rest[2:start], "big") if length >= 126 else length
        assert len(rest) >= start + size, "half a frame"
        messages += opcode == 2
        rest = rest[start + size :]
    return f"{messages - 1} replies" if messages else "opened, then refused"


# ------------------------------------------------------------------------------------------ handshake


def proof(role: bytes) -> bytes:
    """The only right answer in a campaign, where both nonces are fixed."""
    return hmac.digest(KEY, role + NONCE + NONCE, "sha256")


class Handshake:
    """Both sides of the mutual challenge: nothing but the right proof gets through."""

    def __init__(self) -> None:
        self._sides = {
            prove_as_client: NONCE + proof(b"server"),
            prove_as_server: MAGIC + NONCE + proof(b"client"),
        }

    def play(self, rng: random.Random) -> str:
        prove, right = rng.choice(list(self._sides.items()))
        given = damaged(rng, rng.choice(list(self._sides.values())) if rng.random() < 0.1 else right)
        hangs_up = rng.random() < 0.99
        with local_pair() as (ours, peer):
            peer.sendall(given)
            if hangs_up:
                peer.shutdown(socket.SHUT_WR)
            deadline = time.monotonic() + (SOON_SECONDS if hangs_up else AT_ONCE_SECONDS)
            try:
                prove(ByteStream(ours), KEY, deadline)
            except (HandshakeFailed, ConnectionLost, TimeoutError) as error:
                assert not (hangs_up and given.startswith(right)), "the right proof was refused"
                return type(error).__name__
        assert given.startswith(right), "something else than the right proof got through"
        return "proved"


def _archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        member = tarfile.TarInfo("agent.py")
        member.size = 5
        archive.addfile(member, io.BytesIO(b"pass\n"))
    return buffer.getvalue()


def _needs_nothing(directory: Path, sha256: str, tell: Callable[[str], None]) -> Prepared:
    return Prepared(sys.executable, {})


class Host:
    """The submission host behind its door: challenge, request, archive."""

    PROVED = MAGIC + NONCE + proof(b"client")

    def __init__(self, workdir: Path) -> None:
        self._archive = _archive()
        self._workdir = workdir
        sha256 = hashlib.sha256(self._archive).hexdigest()
        self._requests: list[tuple[dict[str, Any], bytes]] = [
            ({"op": "push", "size": len(self._archive), "sha256": sha256}, self._archive),
            ({"op": "push", "size": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}, b"abc"),
            ({"op": "push", "size": 2**40, "sha256": "0" * 64}, b""),
            *(({"op": operation}, b"") for operation in ("status", "policy", "dance", None, 1.5, ["push"])),
            ({}, b""),
        ]
        self._bytes_of = {hashlib.sha256(each).hexdigest(): each for each in (self._archive, b"abc")}

    def play(self, rng: random.Random) -> str:
        request, body = rng.choice(self._requests)
        packed = damaged(rng, packb(request)) if rng.random() < 0.5 else packb(request)
        body = damaged(rng, body) if rng.random() < 0.3 else body
        before, behind = self.PROVED, len(packed).to_bytes(4, "big") + packed + body
        spoilt = rng.randrange(10)
        if spoilt == 0:
            before = damaged(rng, before)
        elif spoilt == 1:
            behind = damaged(rng, behind)
        limits = ArchiveLimits(10_000, 10, 10, 10_000)
        host = SubmissionHost(self._workdir, 10_000, limits, SOON_SECONDS, _needs_nothing)
        with local_pair() as (ours, peer):
            peer.sendall(before + behind)
            peer.shutdown(socket.SHUT_WR)
            _open_door(host.welcome, KEY)._serve(ours)
            answered = _received(peer)[NONCE_BYTES + PROOF_BYTES :]
        assert not answered or (before + behind).startswith(self.PROVED), "answered without the right proof"
        assert host._sha256 is None or self._bytes_of.get(host._sha256, b"?") in behind, "another archive"
        unspoilt = packb(request)
        whole = (before + behind).startswith(self.PROVED + len(unspoilt).to_bytes(4, "big") + unspoilt)
        assert not (whole and request.get("size") == 2**40 and host._state is not HostState.FAILED)
        return f"{self._check_state(host)}, {'answered' if answered else 'silent'}"

    def _check_state(self, host: SubmissionHost) -> str:
        left = [path.name for path in self._workdir.iterdir()]
        state = host._state
        if state is HostState.LOADING and left == ["submission"]:
            assert (self._workdir / "submission" / "agent.py").read_bytes() == b"pass\n"
            shutil.rmtree(self._workdir / "submission")
        else:
            assert not left, left
            assert state in (HostState.WAITING, HostState.FAILED), state
        return state.value


class HostReplies:
    """Our client of the submission host: challenge, replies, and its push."""

    def __init__(self, workdir: Path) -> None:
        self._archive = workdir / "archive"
        self._archive.write_bytes(b"some bytes")
        known = ("sealing", "waiting", "preparing", "loading", "serving", "failed")
        states = (*known, *known, "dancing", None, ["waiting"])
        self._replies = [
            {"ok": ok, "state": state, "error": error, "where": error, "ours": ok, "sealed": sealed}
            for state in states
            for ok, error in ((True, None), (False, "no"), (1, 5), (None, ["x"]))
            for sealed in (True, False, 1)
        ]

    def play(self, rng: random.Random) -> str:
        chunks = [NONCE + proof(b"server"), b"", self._reply(rng), self._reply(rng)]
        if rng.random() < 0.1:
            spoilt = rng.randrange(4)
            chunks[spoilt] = damaged(rng, chunks[spoilt])
        client = SubmissionHostClient(Endpoint("127.0.0.1", 1), KEY, require_sealed=rng.random() < 0.5)
        held = rng.random() < 0.3
        last = Answer(HostState.WAITING, sealed=rng.random() < 0.5)
        with local_pair() as (ours, peer):
            stream = _AnsweredStream(ours, peer, chunks, hangs_up=True)
            call: Any = SimpleNamespace(connect=lambda endpoint, deadline: stream)
            deadline = time.monotonic() + SOON_SECONDS
            try:
                answer = client._advance(self._archive, "AB" * 32, held, last, deadline, call)
            except (*REFUSALS, SubmissionError, InfrastructureError) as error:
                return type(error).__name__
        return f"the host is {answer.state.value}"

    def _reply(self, rng: random.Random) -> bytes:
        packed = packb(rng.choice(self._replies))
        if rng.random() < 0.5:
            packed = damaged(rng, packed)
        return len(packed).to_bytes(4, "big") + packed


# --------------------------------------------------------------------------------------------- choice

TARGETS = ("decoder", "actions", "client", "server", "handshake", "host", "host_replies")


def make_target(name: str, workdir: Path) -> Target:
    """The target of that name; `workdir` is empty, and its own."""
    if name == "host":
        return Host(workdir)
    if name == "host_replies":
        return HostReplies(workdir)
    return {
        "decoder": Decoder,
        "actions": Actions,
        "client": Client,
        "server": Server,
        "handshake": Handshake,
    }[name]()


def _fixed_bytes(count: int = NONCE_BYTES) -> bytes:
    return b"n" * count


def _fixed_key() -> str:
    return WEBSOCKET_KEY


@contextmanager
def without_chance() -> Iterator[None]:
    """Fixes the nonces and keys that our side draws, so that a seed alone decides what happens."""
    # Functions, for a mock keeps a record of every call: that alone would break the cap on memory.
    with (
        mock.patch.object(secrets, "token_bytes", _fixed_bytes),
        mock.patch("websockets.client.generate_key", _fixed_key),
    ):
        yield
