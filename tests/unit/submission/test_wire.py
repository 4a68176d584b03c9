"""The codec: what is sent arrives, and no bytes whatever do more than raise WireError."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from orchestrator.submission.wire import WireError, WireLimits, packb, unpackb

DTYPES = st.one_of(
    npst.boolean_dtypes(),
    npst.integer_dtypes(endianness="?"),
    npst.unsigned_integer_dtypes(endianness="?"),
    npst.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
)
ARRAYS = npst.arrays(DTYPES, npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.binary(),
    ARRAYS,
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abcdef"), inner, max_size=4),
    max_leaves=12,
)


def same(left: Any, right: Any) -> bool:
    if isinstance(left, np.ndarray):
        return (
            isinstance(right, np.ndarray)
            and left.dtype == right.dtype
            and left.shape == right.shape
            and left.tobytes() == right.tobytes()
        )
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


def array_map(**fields: Any) -> bytes:
    whole: dict[str, Any] = {"__ndarray__": True, "data": bytes(8), "dtype": "<f8", "shape": [1], **fields}
    packed: bytes = msgpack.packb({key.encode(): value for key, value in whole.items()})
    return packed


@given(VALUES, st.booleans())
def test_what_is_packed_arrives_with_its_types_and_bits(value: Any, writable: bool) -> None:
    assert same(value, unpackb(packb(value), writable=writable))


@given(st.binary(max_size=200))
@settings(max_examples=300)
def test_random_bytes_raise_nothing_but_wire_errors(data: bytes) -> None:
    try:
        unpackb(data)
    except WireError:
        return


@given(VALUES, st.data())
@settings(max_examples=150)
def test_damaged_messages_raise_nothing_but_wire_errors(value: Any, data: st.DataObject) -> None:
    message = bytearray(packb({"actions": value}))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(message) - 1))
        message[position] = data.draw(st.integers(0, 255))
    message = message[: data.draw(st.integers(0, len(message)))]

    try:
        unpackb(message)
    except WireError:
        return


@given(
    st.recursive(st.none() | st.integers(0, 99) | st.text("ab"), lambda inner: st.lists(inner, max_size=20))
)
def test_a_plain_message_reads_as_msgpack_itself_reads_it(value: Any) -> None:
    packed = msgpack.packb(value)

    assert unpackb(packed) == msgpack.unpackb(packed)


@pytest.mark.parametrize(
    "scalar", [np.float32(1.5), np.float16(-0.1), np.int8(-3), np.uint64(2**64 - 1), np.bool_(True)]
)
def test_a_numpy_scalar_keeps_its_dtype(scalar: Any) -> None:
    arrived = unpackb(packb(scalar))

    assert arrived.dtype == scalar.dtype
    assert arrived == scalar


def test_a_fortran_ordered_or_strided_array_arrives_with_the_same_values() -> None:
    array = np.arange(24, dtype=np.int16).reshape(4, 6)

    assert np.array_equal(unpackb(packb(np.asfortranarray(array))), array)
    assert np.array_equal(unpackb(packb(array[::2, ::-1])), array[::2, ::-1])


def test_arrays_can_be_changed_only_where_that_was_asked_for() -> None:
    message = packb(np.zeros(3))

    assert not unpackb(message).flags.writeable
    assert unpackb(message, writable=True).flags.writeable


@pytest.mark.parametrize(
    "dtype", ["|O", "|V8", "<U4", "|S8", "<c16", "<M8[s]", "<f16", "f8,i4", "", "nonsense", 7, None, ["<f8"]]
)
def test_any_other_dtype_is_refused(dtype: Any) -> None:
    with pytest.raises(WireError, match="dtype"):
        unpackb(array_map(dtype=dtype))


@pytest.mark.parametrize(
    "shape",
    [[2], [0], [-1], [1.0], [True], "1", None, [1, 1, 8], [2**62, 2**62], [0, 2**63 - 1], [1] * 33, [[1]]],
)
def test_a_shape_that_does_not_match_the_bytes_is_refused(shape: Any) -> None:
    with pytest.raises(WireError):
        unpackb(array_map(shape=shape))


@pytest.mark.parametrize("data", ["text", None, 5, [1, 2], {}])
def test_array_data_that_is_not_binary_is_refused(data: Any) -> None:
    with pytest.raises(WireError):
        unpackb(array_map(data=data))


def test_a_boolean_array_of_other_bytes_than_0_and_1_is_refused() -> None:
    with pytest.raises(WireError, match="boolean"):
        unpackb(array_map(dtype="|b1", data=b"\0\1\2", shape=[3]))


@pytest.mark.parametrize(
    ("dtype", "data"), [("|i1", 300), ("<f4", "1"), ("|b1", 1), ("<i8", 1.5), ("<f4", b"....")]
)
def test_a_scalar_that_does_not_fit_its_dtype_is_refused(dtype: str, data: Any) -> None:
    with pytest.raises(WireError, match="scalar"):
        unpackb(msgpack.packb({b"__npgeneric__": True, b"data": data, b"dtype": dtype}))


def test_a_list_that_claims_four_billion_items_is_refused_before_it_is_built() -> None:
    with pytest.raises(WireError, match="items"):
        unpackb(b"\xdd\xff\xff\xff\xff")


def test_many_small_claims_add_up() -> None:
    limits = WireLimits(items=1000)
    message = msgpack.packb([[0] * 100 for _ in range(10)])

    with pytest.raises(WireError, match="items"):
        unpackb(message, limits=limits)


def test_nesting_is_capped() -> None:
    with pytest.raises(WireError, match="deep"):
        unpackb(b"\x91" * 40 + b"\xc0")
    assert unpackb(b"\x91" * 32 + b"\xc0") is not None


def test_the_number_of_arrays_is_capped() -> None:
    limits = WireLimits(arrays=3)

    assert len(unpackb(packb([np.zeros(1)] * 3), limits=limits)) == 3
    with pytest.raises(WireError, match="arrays"):
        unpackb(packb([np.zeros(1)] * 4), limits=limits)


def test_a_message_above_the_size_limit_is_refused() -> None:
    with pytest.raises(WireError, match="limit"):
        unpackb(packb(bytes(1000)), limits=WireLimits(frame_bytes=999))


MIB = 2**20
LONG = b"\xff" * 16 * MIB
MANY = 2**18


def bare_list(count: int, item: bytes) -> bytes:
    return b"\xdd" + count.to_bytes(4, "big") + item * count


@pytest.mark.parametrize(
    "data",
    [
        array_map(data=bytes(16 * MIB), dtype="|u1", shape=[16 * MIB]),
        array_map(data=b"\0" + LONG, dtype="|b1", shape=[16 * MIB + 1]),
        array_map(dtype=LONG),
        array_map(dtype=[LONG]),
        array_map(shape=LONG),
        msgpack.packb({b"__npgeneric__": True, b"data": LONG, b"dtype": "<f8"}),
        msgpack.packb("\U0001f916" + "x" * 16 * MIB),
        msgpack.packb("\U0001f916" + "x" * (4 * MIB - 4)),
        msgpack.packb({"\U0001f916" + "x" * (4 * MIB - 4): 1}),
        bare_list(MANY, b"\x80"),
        bare_list(MANY, b"\x90"),
        bare_list(MANY, b"\xa2\xc3\xbf"),
        bare_list(MANY // 3, b"\x81\xa1a\xc0"),
        bare_list(4096, msgpack.packb(dict.fromkeys("abcde"))),
    ],
    ids=[
        *("array", "boolean array", "dtype of bytes", "dtype of a list", "shape of bytes", "scalar of bytes"),
        *("too long text", "text", "key", "maps", "lists", "texts", "maps of one", "maps of five"),
    ],
)
def test_no_message_takes_more_than_twice_its_bytes_and_40_mib(data: bytes) -> None:
    tracemalloc.start()
    try:
        with contextlib.suppress(WireError):
            unpackb(data, writable=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 2 * len(data) + 40 * MIB


def test_the_bytes_of_texts_are_capped_together() -> None:
    limits = WireLimits(text_bytes=100)

    assert unpackb(packb(["x" * 50, "y" * 50, "short"]), limits=limits)[1] == "y" * 50
    with pytest.raises(WireError, match="100 bytes of text"):
        unpackb(packb(["x" * 50, "y" * 51]), limits=limits)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc0\xc0",
        b"\xc1",
        b"\xd4\x01\x00",
        b"\xc7\x00\x05",
        b"\xd6\xff\0\0\0\0",
        b"\x81\x01\x02",
        b"\xa1\xff",
        b"\xc4\x05abc",
        b"\xc6" + struct.pack(">I", 2**32 - 1),
    ],
    ids=["empty", "two", "unused", "ext", "ext8", "timestamp", "int key", "utf-8", "short", "long binary"],
)
def test_bytes_that_are_not_one_message_of_the_wire_are_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        unpackb(data)


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"camera": {"left": np.array([object()])}}, "['camera']['left']"),
        ({"goal": [1, 2 + 3j]}, "['goal'][1]"),
        ({"name": np.array(["text"])}, "['name']"),
        ({"count": 2**64}, "['count']"),
        ({"text": "\ud800"}, "['text']"),
        ({"members": {1, 2}}, "set"),
        ({"when": np.datetime64("2020-01-01")}, "datetime64"),
        ({"wide": np.longdouble(1)}, "['wide']"),
    ],
)
def test_what_cannot_be_sent_is_named_by_its_key(value: Any, place: str) -> None:
    with pytest.raises(TypeError) as caught:
        packb(value)

    assert place in str(caught.value)


def test_endless_nesting_cannot_be_sent() -> None:
    endless: list[Any] = []
    endless.append(endless)

    with pytest.raises(TypeError, match="deep"):
        packb(endless)


def test_a_failed_pack_leaves_nothing_for_the_next() -> None:
    with pytest.raises(TypeError):
        packb({"good": 1, "bad": object()})

    assert unpackb(packb({"good": 2})) == {"good": 2}
