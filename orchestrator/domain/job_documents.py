"""Job messages as strangers send them: their bounds, and what is wrong with one, in words."""

from __future__ import annotations

import json
import math
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

MAX_JOB_ID = 2**63 - 1
MAX_MESSAGE_BYTES = 2**20
MAX_DEPTH = 64  # the libraries that a message passes through give up at 200 and more

# Above this a message is not even searched for its job_id.
MAX_SEARCHED_BYTES = 16 * 2**20
SHOWN_PROBLEMS = 5
SHOWN_VALUE_CHARS = 80
SHOWN_TEXT_CHARS = 240
PLAINER_WORDS = (
    ("Value error, ", ""),
    ("Input should", "must"),
    ("String should", "must"),
    ("Dictionary should", "must"),
    (" after validation, not more", ""),
    ("recursion limit exceeded", "nested too deeply"),
    ("number out of range", "a number of too many digits"),
    ("timezone info", "a time zone, like 2026-01-02T03:04:05Z"),
)


def lenient_document(payload: bytes | str) -> dict[str, Any]:
    """What can be read of a message that is refused, so that its sender can be answered; {} if nothing."""
    if len(payload) > MAX_SEARCHED_BYTES:
        return {}
    try:
        document = json.loads(payload, parse_int=_bounded_int)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def readable_job_id(payload: bytes | str) -> int | None:
    """The job_id that a refused message names; None where it names none that a job can have."""
    job_id = lenient_document(payload).get("job_id")
    # A bool is an int to Python, and no job_id.
    return job_id if type(job_id) is int and 0 <= job_id <= MAX_JOB_ID else None


def _bounded_int(digits: str) -> int | None:
    return int(digits) if len(digits) <= 40 else None  # Python refuses to read more than 4300


def excess_of(payload: bytes | str) -> str | None:
    """What no message may be, whatever its fields: empty, or too long. None if it is fine."""
    if not payload.strip():
        return "it is empty"
    size = len(payload) if isinstance(payload, bytes) else len(payload.encode("utf-8", "replace"))
    if size <= MAX_MESSAGE_BYTES:
        return None
    return f"it has {size} bytes, and {MAX_MESSAGE_BYTES} are allowed"


def absurdity_of(payload: bytes | str) -> str | None:
    """What not every JSON library can carry: too deep a nesting, numbers that are not finite; else None."""
    waiting: list[tuple[str, int, Any]] = [("", 0, from_json(payload))]
    while waiting:
        place, depth, value = waiting.pop()
        if depth > MAX_DEPTH:
            return f"{place}: nested more than {MAX_DEPTH} levels deep"
        if isinstance(value, float) and not math.isfinite(value):
            return f"{place}: not a finite number (got {value})"
        if isinstance(value, dict):
            waiting += [(_below(place, key), depth + 1, item) for key, item in value.items()]
        elif isinstance(value, list):
            waiting += [(place, depth + 1, item) for item in value]
    return None


def _below(place: str, key: str) -> str:
    """Bounded: of one long key with many fields below it, the places would together fill the memory."""
    return _shortened(f"{place}.{key[:SHOWN_VALUE_CHARS]}" if place else key, SHOWN_VALUE_CHARS)


def in_words(error: ValidationError, within: str = "") -> str:
    """What is wrong, in printable characters and bounded: names and values come from strangers.

    `within` is the field that was validated by itself, if it was.
    """
    problems = _problems(error, (within,) if within else ())
    shown = problems[:SHOWN_PROBLEMS]
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    return printable("; ".join(shown))


def _problems(error: ValidationError, within: tuple[str, ...]) -> list[str]:
    problems: list[str] = []
    for item in error.errors(include_url=False, include_input=True):
        place = (*within, *map(str, item["loc"]))
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, ValidationError):  # a validator that validated a part of its own
            problems += _problems(cause, place)
        else:
            problems.append(_problem(".".join(place), item["type"], item["msg"], item.get("input")))
    return problems


def _problem(place: str, kind: str, text: str, value: Any) -> str:
    if not place and kind == "json_invalid":
        return (
            f"it is not JSON: {_shortened(_plainer(text.removeprefix('Invalid JSON: ')), SHOWN_TEXT_CHARS)}"
        )
    if not place and kind == "model_type":
        return "it is JSON, but not an object with fields"
    place = _shortened(place, SHOWN_VALUE_CHARS)
    if kind == "missing":
        return f"{place} is missing"
    text = _shortened(_plainer(text), SHOWN_TEXT_CHARS)
    return f"{place}{' ' if text.startswith('must') else ': '}{text}{_shown(value)}"


def _plainer(text: str) -> str:
    """The words of the parser in ours."""
    for theirs, ours in PLAINER_WORDS:
        text = text.replace(theirs, ours, 1)
    return text.partition(", unable to parse")[0]


def _shown(value: Any) -> str:
    """A value as its sender wrote it, if it is short."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):  # no JSON, or an integer of more than 4300 digits
        return ""
    return "" if len(text) > SHOWN_VALUE_CHARS else f" (got {text})"


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def printable(text: str) -> str:
    """`text` with its control characters and lone surrogates escaped: no JSONB column takes a NUL."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text
    )
