"""The mutual challenge at the start of a connection, and the one request that follows it.

    client                                       server
    "ORC1" + nonce                        ->
                                          <-     nonce + HMAC(key, "server" + client's + server's nonce)
    HMAC(key, "client" + server's + client's) ->
    request                               ->
                                          <-     reply

Both sides prove that they hold the session key before either believes a byte. Fresh nonces make a replay
worthless, the two words a reflection. Requests and replies are msgpack maps with a length of four bytes.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from orchestrator.submission.transport import ByteStream, Deadline
from orchestrator.submission.wire import WireError, WireLimits, packb, unpackb

MAGIC = b"ORC1"
KEY_BYTES = 32
NONCE_BYTES = 32
PROOF_BYTES = 32
MAX_MESSAGE_BYTES = 64 * 1024
_LIMITS = WireLimits(frame_bytes=MAX_MESSAGE_BYTES, depth=4, items=64, arrays=0)


class HandshakeFailed(Exception):
    """The peer did not prove that it holds the session key."""


class HostState(StrEnum):
    """What a submission host says of itself."""

    SEALING = "sealing"  # takes nothing before its network is closed
    WAITING = "waiting"  # for the archive
    PREPARING = "preparing"  # makes the environment that the submission requires
    LOADING = "loading"
    SERVING = "serving"
    FAILED = "failed"


def _proof(key: bytes, role: bytes, first_nonce: bytes, second_nonce: bytes) -> bytes:
    return hmac.digest(key, role + first_nonce + second_nonce, "sha256")


def _check_key(key: bytes) -> None:
    if len(key) != KEY_BYTES:
        raise ValueError(f"a session key has {KEY_BYTES} bytes, not {len(key)}")


def prove_as_client(stream: ByteStream, key: bytes, deadline: Deadline) -> None:
    """Returns when the server has proved itself and our proof is sent.

    Raises:
        HandshakeFailed, TimeoutError, ConnectionLost.
    """
    _check_key(key)
    client_nonce = secrets.token_bytes(NONCE_BYTES)
    stream.send_all(MAGIC + client_nonce, deadline)
    answer = stream.receive_exactly(NONCE_BYTES + PROOF_BYTES, deadline)
    server_nonce, proof = answer[:NONCE_BYTES], answer[NONCE_BYTES:]
    if not hmac.compare_digest(proof, _proof(key, b"server", client_nonce, server_nonce)):
        raise HandshakeFailed("the server did not prove the session key")
    stream.send_all(_proof(key, b"client", server_nonce, client_nonce), deadline)


def prove_as_server(stream: ByteStream, key: bytes, deadline: Deadline) -> None:
    """Returns when the client has proved itself; a peer that did not begin with the magic learns nothing.

    Raises:
        HandshakeFailed, TimeoutError, ConnectionLost.
    """
    _check_key(key)
    if stream.receive_exactly(len(MAGIC), deadline) != MAGIC:
        raise HandshakeFailed("the client began without a challenge")
    client_nonce = stream.receive_exactly(NONCE_BYTES, deadline)
    server_nonce = secrets.token_bytes(NONCE_BYTES)
    stream.send_all(server_nonce + _proof(key, b"server", client_nonce, server_nonce), deadline)
    proof = stream.receive_exactly(PROOF_BYTES, deadline)
    if not hmac.compare_digest(proof, _proof(key, b"client", server_nonce, client_nonce)):
        raise HandshakeFailed("the client did not prove the session key")


def send_message(stream: ByteStream, message: Mapping[str, Any], deadline: Deadline) -> None:
    """Send a request or a reply."""
    packed = packb(dict(message))
    if len(packed) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {len(packed)} bytes, above the limit of {MAX_MESSAGE_BYTES}")
    stream.send_all(len(packed).to_bytes(4, "big") + packed, deadline)


def receive_message(stream: ByteStream, deadline: Deadline) -> dict[str, Any]:
    """The peer's request or reply.

    Raises:
        WireError, TimeoutError, ConnectionLost.
    """
    size = int.from_bytes(stream.receive_exactly(4, deadline), "big")
    if size > MAX_MESSAGE_BYTES:
        raise WireError(f"a message of {size} bytes, above the limit of {MAX_MESSAGE_BYTES}")
    message = unpackb(stream.receive_exactly(size, deadline), limits=_LIMITS)
    if not isinstance(message, dict):
        raise WireError("a message that is not a map")
    return message


def reply(ok: bool, state: HostState, error: str | None = None, *, sealed: bool) -> dict[str, Any]:
    """The server's answer to a request; `sealed`: nothing can be reached from its container, by proof."""
    return {"ok": ok, "state": state.value, "error": error, "sealed": sealed}
