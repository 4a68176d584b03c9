"""One plain action (of a Box, Discrete, MultiDiscrete, MultiBinary or Text space) from what a policy replied.

The reply comes from a submission: whatever it holds, the outcome is an action of the space or an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from orchestrator.domain.errors import OrchestratorError, UsageError

AnySpace = spaces.Space[Any]
AnyArray = npt.NDArray[Any]

MAX_NUMBERS = 2**22


class InvalidAction(OrchestratorError):
    """A policy's reply that is no action of the space: misshapen, of a wrong type, or out of its range."""


class NonFiniteAction(OrchestratorError):
    """A policy's reply that holds NaN or an infinity."""


class UnsupportedSpace(UsageError):
    """A space that has no form on the policy wire."""


class CheckedAction(NamedTuple):
    """What `env.step` expects, and how many of its numbers had to be clipped to the bounds."""

    action: Any
    clipped: int


def leaf_action(space: AnySpace, value: Any, name: str, *, clip: bool = True) -> CheckedAction:
    """The action of a plain space; `name` is its wire name, for the words of an error ("" for none).

    Without `clip`, numbers of a Box out of its bounds are refused.

    Raises:
        InvalidAction, NonFiniteAction: see `spaces.from_wire`.
    """
    if isinstance(space, spaces.Text):
        if not isinstance(value, str) or not space.contains(value):
            raise InvalidAction(f"{where(name)}expected a text of {space}, got {seen(value)}")
        return CheckedAction(value, 0)
    array = _numbers(space, value, name)
    if isinstance(space, spaces.Box):
        return _box_action(space, array, name, clip)
    if isinstance(space, spaces.Discrete):
        return CheckedAction(int(_in_range(space, array, space.start, space.n, name)), 0)
    if isinstance(space, spaces.MultiDiscrete):
        return CheckedAction(_in_range(space, array, space.start, space.nvec, name).astype(space.dtype), 0)
    if isinstance(space, spaces.MultiBinary):
        return CheckedAction(_in_range(space, array, 0, 2, name).astype(space.dtype), 0)
    raise UnsupportedSpace(f"a {type(space).__name__} space has no form on the policy wire")


def _numbers(space: AnySpace, value: Any, name: str) -> AnyArray:
    """The reply as a finite array of numbers of the space's shape, in its own dtype."""
    try:
        array = number_array(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidAction(f"{where(name)}expected {_expected(space)}, got no array: {error}") from None
    kinds = "iuf" if isinstance(space, spaces.Box) else "biuf"
    if array.dtype.kind not in kinds or array.shape != (space.shape or ()):
        raise InvalidAction(f"{where(name)}expected {_expected(space)}, got {seen(value)}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = ~np.isfinite(array)
        index = _first(bad)
        shown = _shown(bad, index, array[index], "not finite")
        raise NonFiniteAction(f"{where(name)}{shown} is not finite")
    return array


def number_array(value: Any) -> AnyArray:
    """The reply, or a part of it, as an array.

    Raises:
        ValueError, TypeError, OverflowError: it is ragged, holds too many numbers, or something else.
    """
    count = _count_numbers(value)
    if count > MAX_NUMBERS:
        raise ValueError(f"{count} numbers, above the limit of {MAX_NUMBERS}")
    return np.asarray(value)


def _count_numbers(value: Any) -> int:
    if isinstance(value, np.ndarray | np.generic):
        return value.size
    if isinstance(value, list | tuple):
        return sum(map(_count_numbers, value))
    if value is None or isinstance(value, bool | int | float):
        return 1
    # numpy would give every text of a list the room of the longest one: gigabytes for a small reply.
    raise TypeError(f"it holds a {type(value).__name__}")


def _box_action(space: spaces.Box, array: AnyArray, name: str, clip: bool) -> CheckedAction:
    action: AnyArray
    if space.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what overflows is clipped below, or refused
            action = array.astype(space.dtype, order="C")
    else:
        action = _integral(space, array, name)
    outside = np.asarray((action < space.low) | (action > space.high), bool)
    clipped = int(np.count_nonzero(outside))
    if clipped and not clip:
        raise InvalidAction(f"{where(name)}{_out_of_bounds(space, array, outside)}")
    if clipped:
        # Without dimensions, numpy gives a number back for the array.
        action = np.asarray(np.clip(action, space.low, space.high), dtype=action.dtype)
    action = action.astype(space.dtype, copy=False)
    if space.dtype.kind == "f" and not np.isfinite(action).all():
        raise NonFiniteAction(f"{where(name)}numbers too large for {space.dtype}")
    return CheckedAction(action, clipped)


def _out_of_bounds(space: spaces.Box, array: AnyArray, outside: npt.NDArray[np.bool_]) -> str:
    index = _first(outside)
    value, low, high = array[index], space.low[index], space.high[index]
    side = f"below its lower bound {low!s}" if value < low else f"above its upper bound {high!s}"
    return f"{_shown(outside, index, value, 'out of bounds')} is {side}"


def _first(bad: npt.NDArray[np.bool_]) -> tuple[int, ...]:
    """The index of the first number that is marked."""
    return tuple(int(part) for part in np.argwhere(bad)[0])


def _shown(bad: npt.NDArray[np.bool_], index: tuple[int, ...], value: Any, adjective: str) -> str:
    """The first bad number with its place in the action, and how many there are if it is not the only one."""
    shown = str(value)  # not an f-string: that makes a Python float of it, with digits that nobody sent
    number = f"{list(index)} = {shown}" if index else shown
    count = np.count_nonzero(bad)
    return number if count == 1 else f"{count} of {bad.size} numbers are {adjective}: {number}"


def _integral(space: AnySpace, array: AnyArray, name: str) -> npt.NDArray[np.object_]:
    """The numbers as Python's, which no cast can wrap round before they are compared with the bounds."""
    if array.dtype.kind == "f" and (array != np.trunc(array)).any():
        raise InvalidAction(f"{where(name)}expected {_expected(space)}, got a fraction")
    return array.astype(np.object_)


def _in_range(space: AnySpace, array: AnyArray, start: Any, count: Any, name: str) -> npt.NDArray[np.object_]:
    integers = _integral(space, array, name)
    if ((integers < start) | (integers >= start + count)).any():
        raise InvalidAction(f"{where(name)}expected {_expected(space)}, got {seen(array)}")
    return integers


def where(name: str) -> str:
    """The beginning of a reason: which part of a composite action it is about."""
    return f"{name}: " if name else ""


def _expected(space: AnySpace) -> str:
    if isinstance(space, spaces.Discrete):
        return f"an integer in [{space.start}, {space.start + space.n})"
    words = f"shape {space.shape} {space.dtype}"
    if isinstance(space, spaces.MultiDiscrete):
        return f"{words} of integers below {space.nvec.tolist()} from {space.start.tolist()}"
    return f"{words} of zeros and ones" if isinstance(space, spaces.MultiBinary) else words


def seen(value: Any) -> str:
    """What came, in few words: it is shown to people and may be huge."""
    if value is None or isinstance(value, str | bytes | Mapping):
        return "None" if value is None else f"a {type(value).__name__} of length {len(value)}"
    try:
        array = value if isinstance(value, np.ndarray) else number_array(value)
    except (ValueError, TypeError, OverflowError):
        return f"a {type(value).__name__} that is no array of numbers"
    if array.shape == () and array.dtype.kind in "biuf":
        return f"{array.item()!r} ({array.dtype})"
    return f"shape {array.shape} {array.dtype}"
