"""Conversions between spaces and the policy wire."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_st

from orchestrator.adapters.benchmarks.spaces import (
    InvalidAction,
    NonFiniteAction,
    UnsupportedSpace,
    action_record,
    describe,
    from_wire,
    leaves,
    split_chunk,
    to_wire,
)

ARM = spaces.Box(-1.0, 1.0, (4,), np.float32)
GRIPPER = spaces.Discrete(3, start=-1)
NESTED = spaces.Dict(
    {"arm": spaces.Dict({"joints": ARM, "gripper": GRIPPER}), "lamps": spaces.MultiBinary(2)}
)
PAIR = spaces.Tuple((GRIPPER, ARM))


# --------------------------------------------------------------------------------------- observations


def test_a_plain_observation_is_sent_under_one_key_with_its_own_bits() -> None:
    observation = np.array([0.1, np.nan, -0.0, 1e300])

    sent = to_wire(spaces.Box(-1, 1, (4,), np.float32), observation)

    assert list(sent) == ["observation"]
    assert sent["observation"].dtype == np.float64
    assert sent["observation"].tobytes() == observation.tobytes()


def test_a_discrete_observation_is_sent_as_an_integer() -> None:
    sent = to_wire(spaces.Discrete(5), np.int64(3))

    assert sent == {"observation": 3}
    assert type(sent["observation"]) is int


def test_an_image_keeps_shape_and_dtype() -> None:
    image = np.arange(96 * 96 * 3, dtype=np.uint8).reshape(96, 96, 3)

    sent = to_wire(spaces.Box(0, 255, (96, 96, 3), np.uint8), image)

    assert sent["observation"].dtype == np.uint8
    assert (sent["observation"] == image).all()


def test_parts_of_nested_observations_are_flat_on_the_wire() -> None:
    space = spaces.Dict({"task": spaces.Text(8), "arm": spaces.Dict({"q": ARM}), "cards": PAIR})
    joints = np.zeros(4, np.float32)

    sent = to_wire(space, {"task": "lift", "arm": {"q": joints}, "cards": (np.int64(1), joints)})

    assert set(sent) == {"task", "arm/q", "cards/0", "cards/1"}
    assert sent["task"] == "lift"
    assert sent["arm/q"] is joints
    assert sent["cards/0"] == 1


def test_a_space_without_a_form_on_the_wire_is_refused() -> None:
    with pytest.raises(UnsupportedSpace, match="Sequence"):
        describe(spaces.Dict({"trail": spaces.Sequence(spaces.Discrete(2))}))


def test_two_parts_with_one_wire_name_are_refused() -> None:
    space = spaces.Dict({"a": spaces.Dict({"b": GRIPPER}), "a/b": GRIPPER})

    with pytest.raises(UnsupportedSpace, match="'a/b'"):
        leaves(space)


# -------------------------------------------------------------------------------------------- boxes


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int8, np.int64, np.uint8])
def test_numbers_of_any_width_become_the_dtype_of_the_box(dtype: type) -> None:
    action, clipped = from_wire(ARM, np.array([0, 1, 0, 1], dtype))

    assert action.dtype == np.float32
    assert action.tolist() == [0.0, 1.0, 0.0, 1.0]
    assert clipped == 0


def test_a_list_of_numbers_is_an_action() -> None:
    assert from_wire(ARM, [0, 0.5, -0.5, 1]).action.tolist() == [0.0, 0.5, -0.5, 1.0]


def test_an_action_within_bounds_keeps_its_bits() -> None:
    reply = np.array([-1.0, -0.0, 1e-40, 0.1], np.float32)

    assert from_wire(ARM, reply).action.tobytes() == reply.tobytes()


def test_numbers_out_of_bounds_are_clipped_and_counted() -> None:
    action, clipped = from_wire(ARM, np.array([1.5, -7.0, 0.25, 1e300]))

    assert action.tolist() == [1.0, -1.0, 0.25, 1.0]
    assert clipped == 3


@pytest.mark.parametrize(
    ("space", "reply", "words"),
    [
        (ARM, [0.0, 1.5, 0.0, 0.0], "[1] = 1.5 is above its upper bound 1.0"),
        (ARM, np.float32([0.1, 0, 0, -1.1]), "[3] = -1.1 is below its lower bound -1.0"),
        (ARM, [9, 0, -2, 0], "2 of 4 numbers are out of bounds: [0] = 9 is above its upper bound 1.0"),
        (ARM, [0.0, 0.0, 0.0, 1e300], "[3] = 1e+300 is above its upper bound 1.0"),
        (
            spaces.Box(0, 255, (2, 2), np.uint8),
            [[0, 1], [2, 256.0]],
            "[1, 1] = 256.0 is above its upper bound 255",
        ),
        (spaces.Box(-2, 2, (), np.float32), -3.5, "-3.5 is below its lower bound -2.0"),
        (
            spaces.Dict(arm=ARM, grip=GRIPPER),
            {"arm": [0, 0, 0, 7], "grip": 0},
            "arm: [3] = 7 is above its upper bound 1.0",
        ),
    ],
)
def test_without_clipping_a_number_out_of_bounds_is_refused_with_its_place_and_bound(
    space: spaces.Space[Any], reply: Any, words: str
) -> None:
    with pytest.raises(InvalidAction) as caught:
        from_wire(space, reply, clip=False)

    assert str(caught.value) == words


def test_without_clipping_an_action_at_the_bounds_is_taken() -> None:
    action, clipped = from_wire(ARM, [1.0, -1.0, 0.0, 1.0], clip=False)

    assert (action.tolist(), clipped) == ([1.0, -1.0, 0.0, 1.0], 0)


def test_the_action_is_a_copy_that_the_environment_may_write_to() -> None:
    reply = np.frombuffer(np.zeros(4, np.float32).tobytes(), np.float32)

    action = from_wire(ARM, reply).action
    action[0] = 1.0

    assert reply[0] == 0.0


def test_a_wrong_shape_is_refused_with_both_shapes_in_words() -> None:
    with pytest.raises(InvalidAction, match=r"expected shape \(4,\) float32, got shape \(3,\) float64"):
        from_wire(ARM, np.zeros(3))


@pytest.mark.parametrize(
    "reply",
    [
        None,
        "left",
        b"left",
        {"x": 1},
        [1, [2, 3]],
        [None] * 4,
        [True] * 4,
        np.zeros(4, complex),
        1.0,
        [2**80] * 4,
    ],
    ids=repr,
)
def test_what_is_no_array_of_numbers_is_refused(reply: Any) -> None:
    with pytest.raises(InvalidAction, match=r"expected shape \(4,\) float32"):
        from_wire(ARM, reply)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(NonFiniteAction, match=rf"^\[1\] = {bad} is not finite$"):
        from_wire(ARM, [0.0, bad, 0.0, 0.0])
    with pytest.raises(
        NonFiniteAction, match=rf"^2 of 4 numbers are not finite: \[2\] = {bad} is not finite$"
    ):
        from_wire(ARM, [0.0, 0.0, bad, bad])


def test_a_number_that_becomes_infinite_in_the_dtype_of_an_unbounded_box_is_refused() -> None:
    with pytest.raises(NonFiniteAction, match="too large for float32"):
        from_wire(spaces.Box(-np.inf, np.inf, (1,), np.float32), [1e300])


def test_integers_are_clipped_before_they_could_wrap_round() -> None:
    pixels = spaces.Box(0, 255, (3,), np.uint8)

    action, clipped = from_wire(pixels, [256, -1, 7.0])

    assert action.dtype == np.uint8
    assert action.tolist() == [255, 0, 7]
    assert clipped == 2


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
@pytest.mark.parametrize("number", [3, 9])
def test_a_box_without_dimensions_gives_an_array_whether_clipped_or_not(dtype: Any, number: int) -> None:
    action, clipped = from_wire(spaces.Box(0, 5, (), dtype), number)

    assert isinstance(action, np.ndarray)
    assert (action.dtype, action.shape, action.item()) == (dtype, (), min(number, 5))
    assert clipped == (number > 5)


def test_a_fraction_for_a_box_of_integers_is_refused() -> None:
    with pytest.raises(InvalidAction, match="fraction"):
        from_wire(spaces.Box(0, 255, (1,), np.uint8), [0.5])


# ----------------------------------------------------------------------------------- discrete spaces


@pytest.mark.parametrize(
    "reply", [1, 1.0, True, np.int8(1), np.float32(1), np.array(1), np.bool_(True)], ids=repr
)
def test_an_integral_number_is_a_discrete_action(reply: Any) -> None:
    action, clipped = from_wire(GRIPPER, reply)

    assert type(action) is int
    assert action == 1
    assert clipped == 0


@pytest.mark.parametrize("reply", [-2, 2, 1e300, 2**80], ids=repr)
def test_a_number_out_of_a_discrete_range_is_refused_not_clipped(reply: Any) -> None:
    with pytest.raises(InvalidAction, match=r"expected an integer in \[-1, 2\)"):
        from_wire(GRIPPER, reply)


@pytest.mark.parametrize("reply", [0.5, [1], np.zeros((1, 1)), "1", None], ids=repr)
def test_what_is_no_single_integer_is_no_discrete_action(reply: Any) -> None:
    with pytest.raises(InvalidAction):
        from_wire(GRIPPER, reply)


def test_nan_for_a_discrete_action_is_not_finite() -> None:
    with pytest.raises(NonFiniteAction):
        from_wire(GRIPPER, float("nan"))


def test_multi_discrete_honours_the_start_of_each_number() -> None:
    space = spaces.MultiDiscrete([3, 2], start=[10, -1])

    assert from_wire(space, [12.0, -1]).action.tolist() == [12, -1]
    assert from_wire(space, [12, -1]).action.dtype == space.dtype
    with pytest.raises(InvalidAction, match="got shape"):
        from_wire(space, [9, 0])


def test_multi_binary_takes_zeros_and_ones_of_any_type() -> None:
    space = spaces.MultiBinary(3)

    assert from_wire(space, [True, False, 1.0]).action.tolist() == [1, 0, 1]
    with pytest.raises(InvalidAction, match="zeros and ones"):
        from_wire(space, [0, 1, 2])


# ------------------------------------------------------------------------------------ composite spaces


@pytest.mark.parametrize(
    "reply",
    [
        {"arm": {"joints": [0, 0, 0, 2], "gripper": 1}, "lamps": [0, 1]},
        {"arm/joints": [0, 0, 0, 2], "arm/gripper": 1, "lamps": [0, 1]},
    ],
    ids=["nested", "flat"],
)
def test_a_dict_action_may_come_nested_or_flat(reply: Any) -> None:
    action, clipped = from_wire(NESTED, reply)

    assert NESTED.contains(action)
    assert action["arm"]["joints"].tolist() == [0, 0, 0, 1]
    assert clipped == 1


@pytest.mark.parametrize("reply", [(1, [0, 0, 0, 0]), {"0": 1, "1": [0, 0, 0, 0]}], ids=["list", "dict"])
def test_a_tuple_action_may_come_as_a_list_or_by_position(reply: Any) -> None:
    assert PAIR.contains(from_wire(PAIR, reply).action)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ({"arm": {"joints": [0] * 4}, "lamps": [0, 1]}, "arm: missing parts ['gripper']"),
        ({"arm": {}, "lamps": [0, 1], "legs": 1}, "unknown part 'legs'"),
        ({"arm": [0] * 4, "lamps": [0, 1]}, "arm: expected a dict with"),
        ([0, 1], "expected a dict with"),
        ({"arm/joints": [0] * 3, "arm/gripper": 0, "lamps": [0, 1]}, "arm/joints: expected shape (4,)"),
    ],
)
def test_what_is_wrong_with_a_dict_action_is_named(reply: Any, reason: str) -> None:
    with pytest.raises(InvalidAction) as caught:
        from_wire(NESTED, reply)

    assert reason in str(caught.value)


# -------------------------------------------------------------------------------------------- chunks


def test_one_leading_dimension_more_is_a_chunk() -> None:
    rows = split_chunk(ARM, np.arange(8.0).reshape(2, 4))

    assert [row.tolist() for row in rows] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_single_action_is_a_chunk_of_one() -> None:
    assert split_chunk(GRIPPER, 1) == [1]
    assert split_chunk(NESTED, {"arm/joints": [0] * 4, "arm/gripper": 1, "lamps": [0, 1]}) == [
        {"arm/joints": [0] * 4, "arm/gripper": 1, "lamps": [0, 1]}
    ]


def test_a_row_of_integers_is_a_chunk_of_discrete_actions() -> None:
    assert [from_wire(GRIPPER, row).action for row in split_chunk(GRIPPER, [1, -1, 0])] == [1, -1, 0]


def test_a_chunk_of_dict_actions_is_cut_along_every_part() -> None:
    reply = {"arm": {"joints": np.zeros((2, 4)), "gripper": [1, 0]}, "lamps": np.array([[0, 1], [1, 1]])}

    actions = [from_wire(NESTED, row).action for row in split_chunk(NESTED, reply)]

    assert [action["arm"]["gripper"] for action in actions] == [1, 0]
    assert [action["lamps"].tolist() for action in actions] == [[0, 1], [1, 1]]


def test_parts_of_a_chunk_that_disagree_on_its_length_are_refused() -> None:
    reply = {"arm": {"joints": np.zeros((2, 4)), "gripper": [1, 0, 0]}, "lamps": [0, 1]}

    with pytest.raises(InvalidAction, match="one length"):
        split_chunk(NESTED, reply)


@pytest.mark.parametrize(("space", "reply"), [(ARM, np.zeros((0, 4))), (GRIPPER, []), (NESTED, [])])
def test_an_empty_chunk_is_refused(space: spaces.Space[Any], reply: Any) -> None:
    with pytest.raises(InvalidAction, match="at least one"):
        split_chunk(space, reply)


@pytest.mark.parametrize(
    ("space", "reply"),
    [
        (GRIPPER, np.zeros(2**20, np.uint8)),
        (ARM, np.zeros((10_001, 4), np.uint8)),
        (spaces.Box(-1, 1, (0,)), np.zeros((2**40, 0), np.float32)),
        (NESTED, [{}] * 10_001),
        (NESTED, {"arm/joints": np.zeros((2**20, 4), np.int8), "arm/gripper": 0, "lamps": [0, 1]}),
        (spaces.Text(4), ["a"] * 10_001),
    ],
)
def test_a_chunk_of_very_many_actions_is_refused_before_it_is_cut(
    space: spaces.Space[Any], reply: Any
) -> None:
    with pytest.raises(InvalidAction, match="above the limit of 10000"):
        split_chunk(space, reply)


@pytest.mark.parametrize(
    ("space", "reply"),
    [
        (ARM, ["x" * 100_000] + ["a"] * 20_000),
        (ARM, [b"x" * 100_000] + [b"a"] * 20_000),
        (ARM, [["x" * 100_000]] + [[1]] * 20_000),
        (ARM, [np.zeros(2**20, np.uint8)] * 7 + [np.zeros(2**20)]),
        (PAIR, {b"\xff" * 2**20: 1}),
        (PAIR, {"x" * 2**20: 1}),
    ],
    ids=["texts", "bytes", "nested texts", "arrays", "key of bytes", "key"],
)
def test_a_small_reply_never_becomes_a_large_array(space: spaces.Space[Any], reply: Any) -> None:
    """numpy gives every text of a list the room of the longest one: gigabytes for some kilobytes."""
    tracemalloc.start()
    try:
        for read in (split_chunk, from_wire):
            with suppress(InvalidAction):
                read(space, reply)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 8 * 2**20


# ---------------------------------------------------------------------------------------- any reply

ANY_SPACE = st.sampled_from(
    [
        ARM,
        GRIPPER,
        NESTED,
        PAIR,
        spaces.MultiDiscrete([2, 3]),
        spaces.Box(0, 255, (2, 2), np.uint8),
        spaces.Text(4),
    ]
)
ANY_ARRAY = numpy_st.arrays(
    dtype=st.sampled_from(["?", "i1", "u8", "i8", "f2", "f4", "f8", ">f4"]),
    shape=numpy_st.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)
ANY_REPLY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | ANY_ARRAY,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["arm", "lamps", "arm/joints", "0", "1", ""]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(space=ANY_SPACE, reply=ANY_REPLY)
def test_any_reply_gives_actions_of_the_space_or_one_of_two_errors(
    space: spaces.Space[Any], reply: Any
) -> None:
    try:
        actions = [from_wire(space, row).action for row in split_chunk(space, reply)]
    except (InvalidAction, NonFiniteAction):
        return

    for action in actions:
        assert space.contains(action)
        json.dumps(action_record(action), allow_nan=False)


@pytest.mark.parametrize(
    "space", [ARM, GRIPPER, NESTED, PAIR, spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(4)]
)
def test_an_action_of_the_space_passes_unchanged(space: spaces.Space[Any]) -> None:
    space.seed(1)
    for _ in range(20):
        action = space.sample()

        checked, clipped = from_wire(space, action)

        assert clipped == 0
        assert space.contains(checked)
        assert to_wire(space, checked).keys() == to_wire(space, action).keys()
        assert all(
            np.array_equal(mine, theirs)
            for mine, theirs in zip(
                to_wire(space, checked).values(), to_wire(space, action).values(), strict=True
            )
        )


# ----------------------------------------------------------------------------- descriptions and records


def test_a_description_is_json_and_says_null_for_no_bound() -> None:
    box = spaces.Box(np.array([-1.0, -np.inf]), np.array([2.0, np.inf]), dtype=np.float64)

    described = json.loads(json.dumps(describe(spaces.Dict({"q": box, "mode": GRIPPER})), allow_nan=False))

    assert described == {
        "type": "Dict",
        "spaces": {
            "mode": {"type": "Discrete", "shape": [], "dtype": "int64", "n": 3, "start": -1},
            "q": {"type": "Box", "shape": [2], "dtype": "float64", "low": [-1.0, None], "high": [2.0, None]},
        },
    }


def test_equal_bounds_are_described_once_and_many_different_ones_by_their_extremes() -> None:
    gradient = np.arange(1000.0).reshape(10, 100)

    assert describe(ARM)["low"] == -1.0
    assert describe(spaces.Box(-gradient, gradient, dtype=np.float64))["high"] == {"min": 0.0, "max": 999.0}


@pytest.mark.parametrize(
    ("action", "record"),
    [
        (1, {"type": "int", "value": 1, "shape": []}),
        (np.array([0.5, 1.0], np.float32), {"type": "float32", "value": [0.5, 1.0], "shape": [2]}),
        (np.zeros((1, 2), np.int64), {"type": "int64", "value": [[0, 0]], "shape": [1, 2]}),
        (np.array([np.nan, 1.0]), {"type": "float64", "value": [None, 1.0], "shape": [2]}),
        ("go", {"type": "str", "value": "go", "shape": []}),
        (
            {"a": 1},
            {"type": "dict", "value": {"a": {"type": "int", "value": 1, "shape": []}}, "shape": [1]},
        ),
    ],
)
def test_an_action_is_recorded_as_json(action: Any, record: dict[str, Any]) -> None:
    assert json.loads(json.dumps(action_record(action), allow_nan=False)) == record


@pytest.mark.parametrize("error", [InvalidAction("why"), NonFiniteAction("why"), UnsupportedSpace("why")])
def test_errors_survive_pickling(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))

    assert type(copy) is type(error)
    assert str(copy) == "why"
