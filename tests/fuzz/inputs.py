"""Messages of the policy wire, whole, lying and damaged; all of it drawn from one seeded generator."""

from __future__ import annotations

import base64
import hashlib
import random
import struct
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np

from orchestrator.submission.wire import packb

MAX_INPUT_BYTES = 64 * 1024

_DTYPES = ("|b1", "|i1", "|u1", "<i2", ">i4", "<i8", ">u2", "<u4", "<u8", "<f2", "<f4", ">f8")
_ODD_DTYPES = (
    "|O",
    "<U4",
    "|S3",
    "<M8[s]",
    "<m8[us]",
    "<c16",
    "|V8",
    "f8,i4",
    "float64",
    "",
    "<f16",
    7,
    None,
)
_SIZES = (0, 1, -1, 2, 255, 256, 2**16, 2**31, 2**32 - 1, 2**40, 2**40 + 1, 2**62, 2**63 - 1)
_INTEGERS = (0, 1, -1, 127, 128, -32, -33, 255, 2**16, 2**31, -(2**31), 2**32, 2**63 - 1, 2**64 - 1, -(2**63))
_FLOATS = (0.0, -0.0, 1.5, float("nan"), float("inf"), -float("inf"), 5e-324, 1.7e308)
_TEXTS = ("", "a", "actions", "observation", "ß\u20ac\U0001f916", "\0", "x" * 300)
_HEADS = (b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\x7f\xff\xff\xff")
_HEADS += (b"\xdc\xff\xff", b"\xde\xff\xff", b"\xc1", b"\xd4\x01\x00", b"\xc7\x05\x01", b"\x9f", b"\x8f")
_LENGTHS = (0, 1, 125, 126, 127, 128, 65535, 65536, 2**31, 2**40, 2**63, 2**64 - 1)

WEBSOCKET_KEY = base64.b64encode(b"k" * 16).decode()
_MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_ACCEPT = base64.b64encode(hashlib.sha1(WEBSOCKET_KEY.encode() + _MAGIC).digest())

SERVER_HEAD = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: " + _ACCEPT + b"\r\n\r\n"
)
CLIENT_HEAD = (
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: " + WEBSOCKET_KEY.encode() + b"\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


# ------------------------------------------------------------------------------------- whole messages


def value(rng: random.Random, depth: int = 4) -> Any:
    """Something that the wire carries."""
    kind = rng.randrange(12 if depth else 9)
    if kind < 2:
        return rng.choice((None, True, False))
    if kind < 4:
        return rng.choice(_INTEGERS) if rng.random() < 0.5 else rng.randrange(-(2**63), 2**64)
    if kind == 4:
        return rng.choice(_FLOATS)
    if kind == 5:
        return rng.choice(_TEXTS)
    if kind == 6:
        return rng.randbytes(rng.choice((0, 1, 31, 256, 700)))
    if kind < 9:
        return _array(rng)
    if kind == 9:
        return [value(rng, depth - 1) for _ in range(rng.randrange(5))]
    return {_key(rng): value(rng, depth - 1) for _ in range(rng.randrange(5))}


def _key(rng: random.Random) -> str | bytes:
    return rng.choice((*_TEXTS, "__sequence__", "__orchestrator__", "sequence", b"data", b"x"))


def _array(rng: random.Random) -> Any:
    dtype = np.dtype(rng.choice(_DTYPES))
    shape = [rng.choice((0, 1, 2, 3, 5)) for _ in range(rng.randrange(4))]
    flat = np.frombuffer(rng.randbytes(int(np.prod(shape, dtype=int)) * dtype.itemsize), dtype)
    if dtype.kind == "b":
        flat = np.frombuffer(bytes(byte & 1 for byte in flat.tobytes()), dtype)
    array = flat.reshape(shape)
    return array[()] if array.ndim == 0 and rng.random() < 0.5 else array


def message(rng: random.Random) -> bytes:
    """A message on its own: a value, a plausible reply or request, or a map that lies about an array."""
    kind = rng.randrange(4)
    if kind == 0:
        return packb(value(rng))
    if kind == 1:
        answer = {"actions": value(rng, 2), "server_timing": {"infer_ms": 1.25}}
        return packb({**answer, "__sequence__": rng.choice((1, 2, None, "1", 2**63))})
    if kind == 2:
        return _lying_array(rng)
    return packb({"__orchestrator__": "reset", "episode": rng.choice(_INTEGERS), "seed": 1, "sequence": 1})


def reply(rng: random.Random, number: int) -> bytes:
    """A policy's answer to the request of this number; now and then with something else for it."""
    sequence = number if rng.random() < 0.9 else value(rng, 1)
    if rng.random() < 0.1:
        return packb({"__orchestrator__": rng.choice(("reset", value(rng, 1))), "sequence": sequence})
    return packb({"actions": value(rng, 1), "__sequence__": sequence})


def odd_actions(rng: random.Random) -> Any:
    """Small on the wire, and large for who is careless with it."""
    kind = rng.randrange(4)
    if kind == 0:
        long: str | bytes = rng.choice(("x", b"x")) * rng.choice((10, 20_000))
        return [long] + [rng.choice(("a", b"a", 1, None))] * rng.choice((3, 2000))
    if kind == 1:
        shape = [rng.choice((1, 10_001, 2**20, 2**40)), *rng.choices((0, 0, 1, 4), k=rng.randrange(1, 3))]
        return np.zeros(shape if 0 in shape else [1, 4], np.uint8)
    if kind == 2:
        return {rng.choice((b"\xff", "x")) * 20_000: 1, "a": {}, "a/b": [1] * 4}
    return [np.zeros(rng.choice((0, 1, 4)), rng.choice(_DTYPES)) for _ in range(rng.choice((1, 3, 2000)))]


def metadata(rng: random.Random) -> bytes:
    """What a server says of itself."""
    extensions = rng.choice((["reset", "sequence"], ["reset", "sequence"], [], "reset", [value(rng, 1)]))
    return packb(rng.choice(({}, {"extensions": extensions}, {"extensions": extensions}, {"pose": [0.5]})))


def _lying_array(rng: random.Random) -> bytes:
    marker = rng.choice((b"__ndarray__", b"__npgeneric__", "__ndarray__"))
    dtype = rng.choice(_DTYPES if rng.random() < 0.6 else _ODD_DTYPES)
    data = rng.choice(
        (bytes(8), bytes(16), rng.randbytes(8), b"", "text", 5, -1, 1.5, 2**64 - 1, True, [], {})
    )
    shape = rng.choice(
        (
            [1],
            [2],
            [],
            [rng.choice(_SIZES) for _ in range(rng.randrange(1, 5))],
            [1] * rng.choice((31, 32, 33)),
            [0] + [rng.choice(_SIZES)] * 8,
            [1.0],
            [True],
            [[1]],
            "1",
            None,
            {"1": 1},
        )
    )
    lie: dict[Any, Any] = {marker: True, b"data": data, b"dtype": dtype, b"shape": shape}
    if rng.random() < 0.3:
        del lie[rng.choice(list(lie))]
    packed: bytes = msgpack.packb({"actions": lie} if rng.random() < 0.5 else lie)
    return packed


# --------------------------------------------------------------------------------------------- damage

Damage = Callable[[random.Random, bytearray, int], None]


def _flip(rng: random.Random, data: bytearray, at: int) -> None:
    if data:
        data[at % len(data)] ^= 1 << rng.randrange(8)


def _overwrite(rng: random.Random, data: bytearray, at: int) -> None:
    if data:
        data[at % len(data)] = rng.choice((0, 1, 0x7F, 0x80, 0xC1, 0xFF, rng.randrange(256)))


def _overwrite_length(rng: random.Random, data: bytearray, at: int) -> None:
    size = rng.choice((1, 2, 4, 8))
    data[at : at + size] = (rng.choice(_LENGTHS) & (256**size - 1)).to_bytes(size, "big")


def _insert(rng: random.Random, data: bytearray, at: int) -> None:
    data[at:at] = rng.choice(_HEADS) if rng.random() < 0.5 else rng.randbytes(rng.randrange(1, 9))


def _delete(rng: random.Random, data: bytearray, at: int) -> None:
    del data[at : at + rng.randrange(1, 9)]


def _cut(rng: random.Random, data: bytearray, at: int) -> None:
    del data[at:]


def _double(rng: random.Random, data: bytearray, at: int) -> None:
    data[at:at] = data[at : at + rng.randrange(1, 200)] * rng.randrange(1, 4)


def _append(rng: random.Random, data: bytearray, at: int) -> None:
    data += rng.randbytes(rng.randrange(1, 20)) if rng.random() < 0.5 else bytes(data[:at])


def _nest(rng: random.Random, data: bytearray, at: int) -> None:
    opening = rng.choice((b"\x91", b"\x81\xa1a", b"\x92\xc0", b"\xdc\x00\x01"))
    data[:0] = opening * rng.choice((1, 2, 29, 31, 32, 33, 200))


_DAMAGES: tuple[Damage, ...] = (
    *(_flip, _overwrite, _overwrite_length, _insert),
    *(_delete, _cut, _double, _append, _nest),
)


def damaged(rng: random.Random, data: bytes) -> bytes:
    """`data` after a few random changes; one time in four unchanged."""
    changed = bytearray(data)
    for _ in range(rng.choice((0, 0, 1, 1, 1, 2, 3, 6))):
        rng.choice(_DAMAGES)(rng, changed, rng.randrange(len(changed) + 1))
    return bytes(changed[:MAX_INPUT_BYTES])


# --------------------------------------------------------------------------------------------- frames


def frames(rng: random.Random, payload: bytes, *, masked: bool) -> bytes:
    """A message in one or several frames, with control frames in between."""
    opcode = 2 if rng.random() < 0.9 else 1
    cuts = sorted(rng.randrange(len(payload) + 1) for _ in range(rng.choice((0, 0, 0, 1, 3))))
    pieces = [payload[start:end] for start, end in zip([0, *cuts], [*cuts, len(payload)], strict=True)]
    sent = bytearray()
    for index, piece in enumerate(pieces):
        last = index == len(pieces) - 1
        sent += frame(piece, opcode if index == 0 else 0, fin=last, masked=masked)
        if rng.random() < 0.1:
            sent += frame(
                rng.randbytes(rng.choice((0, 4, 125))), rng.choice((9, 10)), fin=True, masked=masked
            )
    if rng.random() < 0.05:
        sent += frame(rng.choice((b"", b"\x03\xe8", b"\x03\xf3died", b"\x03", b"\0\0")), 8, masked=masked)
    return bytes(sent)


def frame(payload: bytes, opcode: int, *, fin: bool = True, masked: bool) -> bytes:
    """One frame of either side."""
    head = bytes([(0x80 if fin else 0) | opcode])
    mask_bit = 0x80 if masked else 0
    if len(payload) < 126:
        head += bytes([mask_bit | len(payload)])
    elif len(payload) < 65536:
        head += struct.pack("!BH", mask_bit | 126, len(payload))
    else:
        head += struct.pack("!BQ", mask_bit | 127, len(payload))
    # A mask of zeros changes nothing, and any mask is as valid as another.
    return head + (bytes(4) if masked else b"") + payload
