"""One connection to a policy server under test: sends what it is told to, and says exactly what came back.

Built on the transport and the codec of the client that evaluates, so both mean the same by every rule.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

from orchestrator.ports import Endpoint
from orchestrator.submission.transport import ByteStream, ConnectionLost, WebSocket, open_websocket
from orchestrator.submission.wire import WireError, WireLimits, packb, unpackb

CONTROL_KEY = "__orchestrator__"
SEQUENCE_KEY = "__sequence__"
MAX_MESSAGE_BYTES = 64 * 2**20
NO_FRAMES = "not the WebSocket protocol"
CLOSE_SECONDS = 5.0
PARTING_SECONDS = 1.0

_SHOWN_CHARACTERS = 120


class Came(Enum):
    """What came in answer to a request."""

    VALUE = "a message"
    TEXT = "a text message"
    NOTHING = "nothing"
    END = "the end of the connection"
    GARBAGE = "no message of the wire"  # a message that does not decode, or no WebSocket frames at all


@dataclass(frozen=True, slots=True)
class Answer:
    """What came: a value, or the reason why there is none."""

    came: Came
    value: Any = None
    reason: str = ""

    @property
    def as_map(self) -> dict[str, Any] | None:
        """The value where it is a map."""
        return self.value if self.came is Came.VALUE and isinstance(self.value, dict) else None

    def __str__(self) -> str:
        """What came as a noun, for a sentence: "first came ..."."""
        match self.came:
            case Came.TEXT:
                return f"a text message: {_last_line(self.value)}"
            case Came.NOTHING:
                return f"nothing {self.reason}"
            case Came.END:
                return f"the end of the connection{self.reason and ': '}{self.reason}"
            case Came.GARBAGE if self.is_too_large:
                return self.reason
            case Came.GARBAGE if self.breaks_frames:
                return f"what is {self.reason}"
            case Came.GARBAGE:
                return f"what is no message: {self.reason}"
        if self.as_map is None:
            return f"a {type(self.value).__name__}, where a map is due"
        return f"a map with the keys {sorted(map(str, self.as_map))}"

    @property
    def breaks_frames(self) -> bool:
        """Whether it is not even a WebSocket message."""
        return self.came is Came.GARBAGE and self.reason.startswith(NO_FRAMES)

    @property
    def is_too_large(self) -> bool:
        return self.came is Came.GARBAGE and "above the limit" in self.reason


def _end(error: ConnectionLost) -> Answer:
    return Answer(Came.END, reason=str(error).removeprefix("the peer closed the connection").lstrip(": "))


class NotOpened(Exception):
    """No connection. `is_connected`: TCP was, but no WebSocket; `is_refusal`: nobody had to wait for it."""

    def __init__(self, words: str, is_connected: bool, is_refusal: bool) -> None:
        super().__init__(words, is_connected, is_refusal)
        self.words = words
        self.is_connected = is_connected
        self.is_refusal = is_refusal

    def __str__(self) -> str:
        return self.words


class ProbeLine:
    """An open connection. Blocking; `abort` may be called from another thread."""

    def __init__(self, stream: ByteStream, websocket: WebSocket, reply_seconds: float) -> None:
        self._stream = stream
        self._websocket = websocket
        self._reply_seconds = reply_seconds
        self._sequence = 0
        self.largest_bytes = 0

    @classmethod
    def open(cls, server: Endpoint, connect_seconds: float, reply_seconds: float) -> ProbeLine:
        """A connection on which nothing was read yet.

        Raises:
            NotOpened: nobody listens there, or no WebSocket was opened.
        """
        deadline = time.monotonic() + connect_seconds
        try:
            stream = ByteStream.connect(server.host, server.port, deadline)
        except ConnectionLost as error:
            raise NotOpened(str(error), is_connected=False, is_refusal=True) from error
        except TimeoutError as error:
            raise NotOpened(str(error), is_connected=False, is_refusal=False) from error
        try:
            websocket = open_websocket(stream, server.host, server.port, "/", MAX_MESSAGE_BYTES, deadline)
        except TimeoutError as error:
            stream.close()
            words = f"no answer to the HTTP request within {connect_seconds:g} s"
            raise NotOpened(words, is_connected=True, is_refusal=False) from error
        except (ConnectionLost, WireError) as error:
            stream.close()
            raise NotOpened(str(error), is_connected=True, is_refusal=True) from error
        return cls(stream, websocket, reply_seconds)

    def receive(self, seconds: float) -> Answer:
        """The next message, whatever it is."""
        try:
            message = self._websocket.receive(time.monotonic() + seconds)
        except TimeoutError:
            return Answer(Came.NOTHING, reason=f"within {seconds:g} s")
        except ConnectionLost as error:
            return _end(error)
        except WireError as error:
            return Answer(Came.GARBAGE, reason=str(error))
        if isinstance(message, str):
            return Answer(Came.TEXT, message)
        self.largest_bytes = max(self.largest_bytes, len(message))
        try:
            value = unpackb(message, limits=WireLimits(frame_bytes=MAX_MESSAGE_BYTES))
        except WireError as error:
            return Answer(Came.GARBAGE, reason=str(error))
        return Answer(Came.VALUE, value)

    def ask(self, request: bytes) -> Answer:
        """What comes in answer to one binary message."""
        try:
            self._websocket.send(request, time.monotonic() + self._reply_seconds)
        except TimeoutError:
            return Answer(Came.NOTHING, reason=f"within {self._reply_seconds:g} s: it was not even read")
        except ConnectionLost as error:
            # The server may have said why before it hung up.
            said = self.receive(self._reply_seconds)
            return _end(error) if said.came is Came.GARBAGE else said
        return self.receive(self._reply_seconds)

    def next_sequence(self) -> int:
        """A number that no request of this connection has had."""
        self._sequence += 7
        return self._sequence

    def reset(self, episode: int, seed: int) -> tuple[int, Answer]:
        """Tell the policy that an episode begins; the number of the request, and what came."""
        number = self.next_sequence()
        request = {CONTROL_KEY: "reset", "episode": episode, "seed": seed, "sequence": number}
        return number, self.ask(packb(request))

    def act(self, observation: Mapping[str, Any], *, numbered: bool) -> tuple[int | None, Answer]:
        """Send an observation; its number where it has one, and what came."""
        if not numbered:
            return None, self.ask(packb(dict(observation)))
        number = self.next_sequence()
        return number, self.ask(packb({**observation, SEQUENCE_KEY: number}))

    def say_goodbye(self, seconds: float) -> Answer:
        """What comes after a Close frame of ours: an END that names the server's own, in order."""
        try:
            self._websocket.say_goodbye(time.monotonic() + seconds)
        except ConnectionLost as error:
            return _end(error)
        except TimeoutError:
            return Answer(Came.NOTHING, reason=f"within {seconds:g} s: it was not even read")
        return self.receive(seconds)

    def abort(self) -> None:
        """Make every call on this connection end now; safe from another thread."""
        self._stream.abort()

    def close(self) -> None:
        self._websocket.close()


class ServerUnderTest:
    """Opens connections to one server, and can end whatever waits on them."""

    def __init__(self, endpoint: Endpoint, connect_seconds: float, reply_seconds: float) -> None:
        self._endpoint = endpoint
        self.connect_seconds = connect_seconds
        self._reply_seconds = reply_seconds
        self._lock = threading.Lock()
        self._open: list[ProbeLine] = []
        self._is_stopped = False

    @contextmanager
    def line(self) -> Iterator[ProbeLine]:
        """A connection for the block, ended in good order: some servers serve one at a time.

        Raises:
            NotOpened: nobody listens there, or no WebSocket was opened.
        """
        line = ProbeLine.open(self._endpoint, self.connect_seconds, self._reply_seconds)
        with self._lock:
            self._open.append(line)
            if self._is_stopped:
                line.abort()
        try:
            yield line
            line.say_goodbye(PARTING_SECONDS)
        finally:
            with self._lock:
                self._open.remove(line)
            line.close()

    @property
    def is_stopped(self) -> bool:
        return self._is_stopped

    def stop(self) -> None:
        """Make every call on a connection end now, and those to come; from any thread."""
        with self._lock:
            self._is_stopped = True
            for line in self._open:
                line.abort()


def _last_line(text: str) -> str:
    """Of a traceback the line that names the exception."""
    lines = text.strip().splitlines() or [""]
    line = lines[-1]
    return repr(line if len(line) <= _SHOWN_CHARACTERS else f"{line[: _SHOWN_CHARACTERS - 3]}...")
