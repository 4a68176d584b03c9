"""The msgpack codec of the policy wire: that of openpi's servers, with a decoder made for hostile peers.

Arrays travel as `{b"__ndarray__": True, b"data", b"dtype", b"shape"}`, numpy scalars as
`{b"__npgeneric__": True, b"data", b"dtype"}`. Nothing is ever pickled.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgpack  # type: ignore[import-untyped]
import numpy as np

MAX_DIMENSIONS = 32
MAX_DIMENSION = 2**40

Buffer = bytes | bytearray | memoryview


class WireError(ValueError):
    """The peer sent something that the wire does not allow."""


@dataclass(frozen=True, slots=True)
class WireLimits:
    """What one message may hold, so that decoding takes twice its bytes and some 40 MiB at most.

    `items` counts list elements, map keys and map values together, `text_bytes` all longer texts: each of
    their bytes may become four in memory.
    """

    frame_bytes: int = 64 * 2**20
    depth: int = 32
    items: int = 2**18
    arrays: int = 4096
    text_bytes: int = 4 * 2**20


DEFAULT_LIMITS = WireLimits()


def _allowed_dtypes() -> dict[str, np.dtype[Any]]:
    one_byte = ("|b1", "|i1", "|u1")
    wider = ("i2", "i4", "i8", "u2", "u4", "u8", "f2", "f4", "f8")
    names = (*one_byte, *(f"{order}{kind}" for order in "<>" for kind in wider))
    return {name: np.dtype(name) for name in names}


# Neither objects nor structures, strings, times or complex numbers: no action or observation is one.
_DTYPES = _allowed_dtypes()


# ------------------------------------------------------------------------------------------ encoding


def _encode_numpy(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype.str in _DTYPES:
            return {
                b"__ndarray__": True,
                b"data": value.tobytes(),
                b"dtype": value.dtype.str,
                b"shape": value.shape,
            }
        raise TypeError(f"an array of dtype {value.dtype} cannot be sent")
    if isinstance(value, np.generic):
        if value.dtype.str in _DTYPES:
            return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
        raise TypeError(f"a numpy scalar of dtype {value.dtype} cannot be sent")
    raise TypeError(f"a value of type {type(value).__module__}.{type(value).__qualname__} cannot be sent")


class _ThreadPacker(threading.local):
    """One packer a thread: it keeps its buffer, and is not safe to share."""

    def __init__(self) -> None:
        self.pack = msgpack.Packer(default=_encode_numpy).pack


_packer = _ThreadPacker()


def packb(value: Any) -> bytes:
    """One message.

    Takes None, bool, int of 64 bits, float, str, bytes, lists, tuples, dicts with keys of str or bytes, and
    numpy scalars and arrays of booleans, integers and floats (16 to 64 bits). Tuples arrive as lists.

    Raises:
        TypeError: something in `value` cannot be sent; the text names its key.
    """
    try:
        packed: bytes = _packer.pack(value)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise TypeError(_first_obstacle(value) or str(error)) from None
    return packed


def _first_obstacle(value: Any, path: str = "", depth: int = 0) -> str | None:
    if depth > 64:
        return f"{path or 'the value'}: nested too deep to be sent"
    for name, part in _parts(value):
        found = _first_obstacle(part, f"{path}{name}", depth + 1)
        if found is not None:
            return found
    if isinstance(value, dict | list | tuple):
        return None
    try:
        _packer.pack(value)
    except (TypeError, ValueError, OverflowError) as error:
        return f"{path or 'the value'}: {error}"
    return None


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield f"[{key!r}]", part
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield f"[{index}]", part


# ------------------------------------------------------------------------------------------ decoding

_FIXED_BYTES = bytearray(256)  # whole size of a token without length field; 0 for all others
_LENGTH_BYTES = bytearray(256)  # size of the length field that follows the token's first byte
_CONTAINER_FACTOR = bytearray(256)  # items for each unit of length: 1 for lists, 2 for maps, 0 for strings


def _fill_tables() -> None:
    for code in (*range(0x80), *range(0xE0, 0x100), 0xC0, 0xC2, 0xC3):
        _FIXED_BYTES[code] = 1
    for code in range(0xA0, 0xC0):
        _FIXED_BYTES[code] = 1 + (code & 0x1F)
    scalars = {0xCA: 5, 0xCB: 9, 0xCC: 2, 0xCD: 3, 0xCE: 5, 0xCF: 9, 0xD0: 2, 0xD1: 3, 0xD2: 5, 0xD3: 9}
    for code, size in scalars.items():
        _FIXED_BYTES[code] = size
    for code, size in {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}.items():
        _LENGTH_BYTES[code] = size
    for code, size, factor in ((0xDC, 2, 1), (0xDD, 4, 1), (0xDE, 2, 2), (0xDF, 4, 2)):
        _LENGTH_BYTES[code], _CONTAINER_FACTOR[code] = size, factor


_fill_tables()


def _check_structure(data: Buffer, limits: WireLimits) -> None:
    """Walk the tokens without building anything, so that no count in them makes the decoder allocate."""
    end = len(data)
    position, items, text_bytes = 0, 0, 0
    left = 1
    open_containers: list[int] = []
    while True:
        if left == 0:
            if not open_containers:
                break
            left = open_containers.pop()
            continue
        left -= 1
        if position >= end:
            raise WireError("the message is cut short")
        code = data[position]
        size = _FIXED_BYTES[code]
        if size:
            position += size
            continue
        if 0x80 <= code < 0xA0:
            length, factor = code & 0x0F, 2 if code < 0x90 else 1
            position += 1
        else:
            length_bytes = _LENGTH_BYTES[code]
            if not length_bytes:
                raise WireError(f"a token of kind 0x{code:02x} is not part of the wire")
            length = int.from_bytes(data[position + 1 : position + 1 + length_bytes], "big")
            factor = _CONTAINER_FACTOR[code]
            position += 1 + length_bytes
        if not factor:
            position += length
            if code >= 0xD9:  # a text; binaries stand below
                text_bytes += length
                if text_bytes > limits.text_bytes:
                    raise WireError(f"more than {limits.text_bytes} bytes of text")
            continue
        items += length * factor
        if items > limits.items:
            raise WireError(f"more than {limits.items} items")
        open_containers.append(left)
        if len(open_containers) > limits.depth:
            raise WireError(f"nested deeper than {limits.depth}")
        left = length * factor
    if position != end:
        raise WireError("the message is cut short" if position > end else "bytes after the message")


class _NumpyDecoder:
    """Builds the arrays of one message."""

    __slots__ = ("arrays_left", "writable")

    def __init__(self, arrays: int, writable: bool) -> None:
        self.arrays_left = arrays
        self.writable = writable

    def __call__(self, mapping: dict[Any, Any]) -> Any:
        if b"__ndarray__" in mapping:
            self.arrays_left -= 1
            if self.arrays_left < 0:
                raise WireError("too many arrays")
            return self._array(mapping)
        if b"__npgeneric__" in mapping:
            return _scalar(mapping)
        return mapping

    def _array(self, mapping: dict[Any, Any]) -> np.ndarray[Any, Any]:
        dtype = _dtype(mapping)
        data, shape = mapping.get(b"data"), mapping.get(b"shape")
        if type(data) is not bytes:
            raise WireError("an array's data is not binary")
        if type(shape) is not list or len(shape) > MAX_DIMENSIONS:
            raise WireError("an array's shape is not a short list")
        for size in shape:
            if type(size) is not int or not 0 <= size <= MAX_DIMENSION:
                raise WireError("an array's shape is not made of sizes")
        if math.prod(shape) * dtype.itemsize != len(data):
            raise WireError(f"{len(data)} bytes are not an array of {dtype} {shape[:8]}")
        flat = np.frombuffer(data, dtype)
        if dtype.kind == "b" and data.strip(b"\0\1"):
            raise WireError("a boolean array holds other bytes than 0 and 1")
        if self.writable:
            flat = flat.copy()
        try:
            return flat.reshape(shape)
        except ValueError as error:
            raise WireError(f"an array's shape is impossible: {error}") from None


def _dtype(mapping: dict[Any, Any]) -> np.dtype[Any]:
    name = mapping.get(b"dtype")
    dtype = _DTYPES.get(name) if type(name) is str else None
    if dtype is None:
        # Anything but text would have to be written out whole before it could be cut.
        shown = repr(name[:32]) if type(name) is str else f"of type {type(name).__name__}"
        raise WireError(f"dtype {shown} is not allowed")
    return dtype


_SCALAR_TYPES: dict[str, tuple[type, ...]] = {"b": (bool,), "i": (int,), "u": (int,), "f": (float, int)}


def _scalar(mapping: dict[Any, Any]) -> Any:
    dtype, value = _dtype(mapping), mapping.get(b"data")
    if type(value) not in _SCALAR_TYPES[dtype.kind]:
        raise WireError(f"a scalar of dtype {dtype} holds a {type(value).__name__}")
    try:
        with np.errstate(over="ignore"):
            return dtype.type(value)
    except (OverflowError, ValueError):
        raise WireError(f"a scalar does not fit dtype {dtype}") from None


def unpackb(data: Buffer, *, limits: WireLimits = DEFAULT_LIMITS, writable: bool = False) -> Any:
    """The value of one whole message.

    Arrays are read-only views of the decoded bytes; `writable` copies each of them once more, for code
    that may change what it is given.

    Raises:
        WireError: not one whole message of the wire, or above a limit; nothing large was allocated.
    """
    if len(data) > limits.frame_bytes:
        raise WireError(f"a message of {len(data)} bytes, above the limit of {limits.frame_bytes}")
    _check_structure(data, limits)
    try:
        return msgpack.unpackb(
            data, raw=False, strict_map_key=True, object_hook=_NumpyDecoder(limits.arrays, writable)
        )
    except WireError:
        raise
    except (ValueError, TypeError) as error:
        raise WireError(f"not a message of the wire: {error}") from None
