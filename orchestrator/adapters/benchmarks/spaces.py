"""Between an environment's spaces and the policy wire: pure conversions, used once a step by a worker.

On the wire an observation is a flat dict. A plain space is `{"observation": value}`; the parts of `Dict` and
`Tuple` spaces stand under their names, nested ones joined by "/" ("arm/joints", "0"). Replies for such action
spaces use the same names, flat or nested.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from orchestrator.adapters.benchmarks.plain_actions import (
    AnySpace,
    CheckedAction,
    InvalidAction,
    NonFiniteAction,
    UnsupportedSpace,
    leaf_action,
    number_array,
    seen,
    where,
)

__all__ = [
    "CheckedAction",
    "InvalidAction",
    "NonFiniteAction",
    "UnsupportedSpace",
    "action_record",
    "describe",
    "from_wire",
    "leaves",
    "split_chunk",
    "to_wire",
]

PLAIN_KEY = "observation"
MAX_CHUNK_ACTIONS = 10_000
AnyArray = npt.NDArray[Any]

# Bounds longer than this are described by their extremes: env_specs travel in every result.
_MAX_DESCRIBED_BOUNDS = 256


def leaves(space: AnySpace) -> dict[str, AnySpace]:
    """The plain spaces that make up `space`, by wire name; `{"": space}` if it is plain itself.

    Raises:
        UnsupportedSpace: it holds a space other than Box, Discrete, MultiDiscrete, MultiBinary, Text, Dict or
            Tuple, or two of its parts have one wire name.
    """
    found: dict[str, AnySpace] = {}
    for name, leaf in _walk(space, ""):
        if name in found:
            raise UnsupportedSpace(f"two parts of the space have the wire name {name!r}")
        found[name] = leaf
    return found


def to_wire(space: AnySpace, observation: Any) -> dict[str, Any]:
    """The observation as the flat dict that is sent. Arrays keep their dtype and bits and are not copied."""
    if not _children(space):
        return {PLAIN_KEY: _plain(space, observation)}
    return dict(_flat_observation(space, observation, ""))


def from_wire(space: AnySpace, actions: Any, *, clip: bool = True) -> CheckedAction:
    """One action of `space` from the `actions` of a reply, as the environment expects it.

    Box: a fresh array of the space's shape and dtype; integers and floats of any width are cast, numbers out
    of bounds are clipped and counted, or refused without `clip`. Discrete: an int in [start, start + n); 2.0
    and True count as integers.
    MultiDiscrete and MultiBinary: an array of the space's shape and dtype. Dict and Tuple: from a dict by
    wire name, flat or nested (a Tuple also from a list), to a dict or tuple.

    Raises:
        InvalidAction: wrong shape or type, a fraction where an integer belongs, out of a discrete range, or
            (without `clip`) out of a Box's bounds.
        NonFiniteAction: NaN or an infinity, also one that only appears in the cast to the space's dtype.
    """
    if not _children(space):
        return leaf_action(space, actions, "", clip=clip)
    checked = {
        name: leaf_action(leaf, value, name, clip=clip) for name, leaf, value in _parts(space, actions, "")
    }
    action = _assembled(space, {name: part.action for name, part in checked.items()}, "")
    return CheckedAction(action, sum(part.clipped for part in checked.values()))


def split_chunk(space: AnySpace, actions: Any) -> list[Any]:
    """The single actions of a reply: its rows if it has one leading dimension more than `space`, else itself.

    For Dict and Tuple spaces every part must have that dimension, all of one length; a list is a chunk for a
    Dict. The rows are not checked: `from_wire` does that.

    Raises:
        InvalidAction: the chunk is empty or longer than `MAX_CHUNK_ACTIONS`, its parts disagree on the
            length, or parts are missing or unknown.
    """
    if not _children(space):
        rows = _rows(space, actions)
        return [actions] if rows is None else _not_empty(rows)
    if isinstance(space, spaces.Dict) and isinstance(actions, list | tuple):
        return _not_empty(_listed(actions))
    parts = {name: _rows(leaf, value) for name, leaf, value in _parts(space, actions, "")}
    lengths = {name: None if rows is None else len(rows) for name, rows in parts.items()}
    if set(lengths.values()) == {None}:
        return [actions]
    if len(set(lengths.values())) > 1:
        raise InvalidAction(f"the parts of a chunk must have one length, got {lengths}")
    columns = [rows for rows in parts.values() if rows is not None]
    return _not_empty([dict(zip(parts, row, strict=True)) for row in zip(*columns, strict=True)])


def describe(space: AnySpace) -> dict[str, Any]:
    """The space as JSON for `env_specs`. A bound of null is no bound.

    Raises:
        UnsupportedSpace: as `leaves` does.
    """
    leaves(space)
    children = _children(space)
    if children:
        kind = "Dict" if isinstance(space, spaces.Dict) else "Tuple"
        return {"type": kind, "spaces": {name: describe(child) for name, child in children}}
    if isinstance(space, spaces.Text):
        return {"type": "Text", "min_length": space.min_length, "max_length": space.max_length}
    described: dict[str, Any] = {
        "type": _kind(space),
        "shape": list(space.shape or ()),
        "dtype": str(space.dtype),
    }
    if isinstance(space, spaces.Box):
        described |= {"low": _described_bound(space.low), "high": _described_bound(space.high)}
    elif isinstance(space, spaces.Discrete):
        described |= {"n": int(space.n), "start": int(space.start)}
    elif isinstance(space, spaces.MultiDiscrete):
        described |= {"nvec": space.nvec.tolist(), "start": space.start.tolist()}
    return described


def action_record(action: Any) -> dict[str, Any]:
    """An action as telemetry has it: `{"type", "value", "shape"}` in JSON; numbers not finite become null.

    `type` is the dtype of an array ("float32"), or "int", "float", "str", "dict", "list". A dict or tuple has
    the records of its parts as value.
    """
    if isinstance(action, Mapping):
        parts = {str(key): action_record(part) for key, part in action.items()}
        return {"type": "dict", "value": parts, "shape": [len(parts)]}
    if isinstance(action, tuple | list):
        items = [action_record(item) for item in action]
        return {"type": "list", "value": items, "shape": [len(items)]}
    if isinstance(action, str):
        return {"type": "str", "value": action, "shape": []}
    kind = type(action).__name__ if isinstance(action, bool | int | float) else str(np.asarray(action).dtype)
    array = np.asarray(action)
    return {"type": kind, "value": _json_numbers(array), "shape": list(array.shape)}


# ------------------------------------------------------------------------------------------- structure


def _children(space: AnySpace) -> list[tuple[str, AnySpace]]:
    """Name and space of each part, in the space's own order; none for a plain space."""
    if isinstance(space, spaces.Dict):
        return [(str(key), child) for key, child in space.spaces.items()]
    if isinstance(space, spaces.Tuple):
        return [(str(index), child) for index, child in enumerate(space.spaces)]
    return []


def _walk(space: AnySpace, prefix: str) -> Iterator[tuple[str, AnySpace]]:
    children = _children(space)
    if not children:
        if _kind(space) is None:
            raise UnsupportedSpace(f"a {type(space).__name__} space has no form on the policy wire")
        yield prefix, space
    for name, child in children:
        yield from _walk(child, _joined(prefix, name))


def _kind(space: AnySpace) -> str | None:
    for kind in (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary, spaces.Text):
        if isinstance(space, kind):
            return kind.__name__
    return None


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}/{name}" if prefix else name


def _plain(space: AnySpace, value: Any) -> Any:
    if isinstance(space, spaces.Discrete):
        return int(value)
    if isinstance(space, spaces.Text):
        return str(value)
    return np.asarray(value)


def _flat_observation(space: AnySpace, value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    children = _children(space)
    if not children:
        yield prefix, _plain(space, value)
        return
    parts = value.values() if isinstance(value, Mapping) else value
    if isinstance(space, spaces.Dict):
        parts = [value[key] for key in space.spaces]
    for (name, child), part in zip(children, parts, strict=True):
        yield from _flat_observation(child, part, _joined(prefix, name))


# ----------------------------------------------------------------------------------------- replies


def _parts(space: AnySpace, reply: Any, prefix: str) -> Iterator[tuple[str, AnySpace, Any]]:
    """Wire name, space and value of every leaf. Walks the space, not the reply, which nobody should trust."""
    children = _children(space)
    if not children:
        yield prefix, space, reply
        return
    for name, child in children:
        yield from _parts(child, _keyed(space, reply, prefix)[name], _joined(prefix, name))


def _keyed(space: AnySpace, reply: Any, prefix: str) -> dict[str, Any]:
    """The parts of one Dict or Tuple by name; flat names ("arm/joints") are gathered under the first."""
    names = [name for name, _ in _children(space)]
    if isinstance(space, spaces.Tuple) and isinstance(reply, list | tuple):
        reply = {str(index): item for index, item in enumerate(reply)}
    if not isinstance(reply, Mapping):
        raise InvalidAction(f"{where(prefix)}expected a dict with {names}, got {seen(reply)}")
    keyed: dict[str, Any] = {}
    for key, value in reply.items():
        name = _owner(names, key) if isinstance(key, str) else None
        if name is None:
            raise InvalidAction(f"{where(prefix)}unknown part {key[:80]!r}; the space has {names}")
        if name == key:
            keyed[name] = value
        elif isinstance(keyed.setdefault(name, {}), dict):
            keyed[name][key[len(name) + 1 :]] = value
    missing = [name for name in names if name not in keyed]
    if missing:
        raise InvalidAction(f"{where(prefix)}missing parts {missing}")
    return keyed


def _owner(names: list[str], key: str) -> str | None:
    return next((name for name in names if key == name or key.startswith(f"{name}/")), None)


def _assembled(space: AnySpace, leaf_actions: Mapping[str, Any], prefix: str) -> Any:
    if isinstance(space, spaces.Dict):
        return {
            key: _assembled(child, leaf_actions, _joined(prefix, str(key)))
            for key, child in space.spaces.items()
        }
    if isinstance(space, spaces.Tuple):
        return tuple(
            _assembled(child, leaf_actions, _joined(prefix, name)) for name, child in _children(space)
        )
    return leaf_actions[prefix]


def _rows(leaf: AnySpace, value: Any) -> list[Any] | None:
    """The rows of a value that has one dimension more than the leaf; None for any other."""
    if isinstance(leaf, spaces.Text):
        return _listed(value) if isinstance(value, list | tuple) else None
    try:
        array = number_array(value)
    except (ValueError, TypeError, OverflowError):
        return None  # ragged or no numbers: `from_wire` says so
    return _listed(array) if array.ndim == len(leaf.shape or ()) + 1 else None


def _listed(chunk: AnyArray | list[Any] | tuple[Any, ...]) -> list[Any]:
    # Each row becomes an object of its own, and an array of no bytes can have 2**40 of them.
    if len(chunk) > MAX_CHUNK_ACTIONS:
        raise InvalidAction(f"a chunk of {len(chunk)} actions, above the limit of {MAX_CHUNK_ACTIONS}")
    return list(chunk)


def _not_empty(rows: list[Any]) -> list[Any]:
    if not rows:
        raise InvalidAction("expected at least one action in the chunk, got none")
    return rows


# ------------------------------------------------------------------------------------ JSON numbers


def _described_bound(bound: AnyArray) -> Any:
    if bound.size and (bound == bound.flat[0]).all():
        return _json_numbers(bound.flat[0])
    if bound.size > _MAX_DESCRIBED_BOUNDS:
        return {"min": _json_numbers(bound.min()), "max": _json_numbers(bound.max())}
    return _json_numbers(bound)


def _json_numbers(numbers: Any) -> Any:
    array = np.asarray(numbers)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        array = np.where(np.isfinite(array), array.astype(object), np.array(None, dtype=object))
    return array.tolist()
