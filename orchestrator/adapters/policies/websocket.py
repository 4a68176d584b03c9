"""Drives a policy over the wire of openpi's servers: our own server, or an unmodified one of theirs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.domain.errors import (
    AuthenticationFailed,
    PolicyError,
    PolicyLate,
    PolicyLost,
    PolicyProtocolError,
    PolicyRaised,
)
from orchestrator.ports import Observation, PolicyConnection, PolicyConnector
from orchestrator.submission.handshake import HandshakeFailed, prove_as_client, receive_message, send_message
from orchestrator.submission.transport import ByteStream, ConnectionLost, WebSocket, open_websocket
from orchestrator.submission.wire import WireError, WireLimits, packb, unpackb

CONTROL_KEY = "__orchestrator__"
SEQUENCE_KEY = "__sequence__"
RAISED_TEXT_CHARACTERS = 16 * 1024


_TRANSPORT_ERRORS = (TimeoutError, ConnectionLost, WireError, HandshakeFailed)


def _in_policy_words(error: Exception) -> PolicyError:
    """The transport's error as the port names it."""
    if isinstance(error, TimeoutError):
        return PolicyLate(str(error))
    if isinstance(error, WireError):
        return PolicyProtocolError(str(error))
    if isinstance(error, HandshakeFailed):
        return AuthenticationFailed(str(error))
    return PolicyLost(str(error))


@dataclass(frozen=True)
class WebSocketConnector(PolicyConnector):
    """Connections to the policy at `host`:`port`.

    With a `session_key` (32 bytes) each connection begins with the mutual challenge; without one the peer is
    any server of the wire. `max_message_bytes` bounds one message of the peer before anything is allocated.
    """

    host: str
    port: int
    session_key: bytes | None = field(default=None, repr=False)
    path: str = "/"
    max_message_bytes: int = 64 * 2**20

    def connect(self, timeout_seconds: float) -> WebSocketConnection:
        """A connection whose metadata was read.

        Raises:
            PolicyLost, PolicyLate, PolicyProtocolError, AuthenticationFailed; PolicyRaised when the server
                answered with a traceback in place of its metadata.
        """
        deadline = time.monotonic() + timeout_seconds
        try:
            stream = ByteStream.connect(self.host, self.port, deadline)
            try:
                return self._greet(stream, deadline)
            except BaseException:
                stream.close()
                raise
        except _TRANSPORT_ERRORS as error:
            raise _in_policy_words(error) from error

    def _greet(self, stream: ByteStream, deadline: float) -> WebSocketConnection:
        if self.session_key is not None:
            prove_as_client(stream, self.session_key, deadline)
            _ask_for_policy(stream, deadline)
        websocket = open_websocket(stream, self.host, self.port, self.path, self.max_message_bytes, deadline)
        limits = WireLimits(frame_bytes=self.max_message_bytes)
        try:
            metadata = _unpack_reply(websocket.receive(deadline), limits)
        except BaseException:
            websocket.close()
            raise
        return WebSocketConnection(websocket, metadata, limits)


def _ask_for_policy(stream: ByteStream, deadline: float) -> None:
    send_message(stream, {"op": "policy"}, deadline)
    answer = receive_message(stream, deadline)
    if answer.get("ok") is not True:
        raise ConnectionLost(f"the submission host does not serve: {answer.get('error')}")


def _unpack_reply(message: bytes | bytearray | str, limits: WireLimits) -> dict[str, Any]:
    if isinstance(message, str):
        raise PolicyRaised(message[-RAISED_TEXT_CHARACTERS:])
    reply = unpackb(message, limits=limits, writable=True)
    if not isinstance(reply, dict):
        raise WireError(f"a reply that is a {type(reply).__name__}, not a map")
    return reply


def _is(value: Any, expected: str | int) -> bool:
    """Equal and of the same type: an array would compare element by element, and True with 1."""
    return type(value) is type(expected) and bool(value == expected)


class WebSocketConnection(PolicyConnection):
    """One open connection. Made by `WebSocketConnector.connect`; not for use by several threads."""

    def __init__(self, websocket: WebSocket, metadata: dict[str, Any], limits: WireLimits) -> None:
        self._websocket = websocket
        self._metadata = metadata
        self._limits = limits
        announced = metadata.get("extensions")
        extensions = [each for each in announced if type(each) is str] if isinstance(announced, list) else []
        self._resets = "reset" in extensions
        self._numbers = "sequence" in extensions
        self._sequence = 0
        self._usable = True

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self._metadata

    @property
    def supports_reset(self) -> bool:
        return self._resets

    def reset(self, episode: int, seed: int, timeout_seconds: float) -> None:
        if not self._resets:
            return
        self._sequence += 1
        request = {CONTROL_KEY: "reset", "episode": episode, "seed": seed, "sequence": self._sequence}
        reply = self._exchange(packb(request), timeout_seconds)
        if not (_is(reply.get(CONTROL_KEY), "reset") and _is(reply.get("sequence"), self._sequence)):
            raise self._violation(f"the reply to the reset is not one, or not to request {self._sequence}")

    def act(self, observation: Observation, timeout_seconds: float) -> Any:
        if self._numbers:
            self._sequence += 1
            observation = {**observation, SEQUENCE_KEY: self._sequence}
        # A TypeError from here is the caller's: nothing was sent, the connection stays whole.
        reply = self._exchange(packb(observation), timeout_seconds)
        if self._numbers and not _is(reply.get(SEQUENCE_KEY), self._sequence):
            number = reply.get(SEQUENCE_KEY)
            came = f"request {number}" if type(number) is int else "none"
            raise self._violation(f"a reply to {came} came for request {self._sequence}")
        if "actions" not in reply:
            raise self._violation("the reply has no key `actions`")
        return reply["actions"]

    def abort(self) -> None:
        """Make a call that waits for the policy end now, as lost; safe from another thread."""
        self._websocket.abort()

    def close(self) -> None:
        if self._usable:
            self._usable = False
            self._websocket.close()

    def _exchange(self, request: bytes, timeout_seconds: float) -> dict[str, Any]:
        """The reply to one request.

        After any error the stream may hold half a message, or a late one: nothing may use it again.
        """
        if not self._usable:
            raise PolicyLost("the connection was closed")
        deadline = time.monotonic() + timeout_seconds
        try:
            self._websocket.refuse_unasked(deadline)
            self._websocket.send(request, deadline)
            return _unpack_reply(self._websocket.receive(deadline), self._limits)
        except TimeoutError as error:
            self.close()
            raise PolicyLate(f"no whole reply within {timeout_seconds:g} s") from error
        except _TRANSPORT_ERRORS as error:
            self.close()
            raise _in_policy_words(error) from error
        except BaseException:
            self.close()
            raise

    def _violation(self, reason: str) -> PolicyProtocolError:
        self.close()
        return PolicyProtocolError(reason)
