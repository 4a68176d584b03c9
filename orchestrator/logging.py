"""Structured logging on stderr: JSON lines where a machine reads, text on a terminal, never a secret."""

from __future__ import annotations

import logging
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TextIO, cast

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

LogFormat = Literal["auto", "json", "console"]

MAX_TEXT_CHARS = 1_000
MAX_TRACEBACK_CHARS = 16_000
MAX_ITEMS = 50
MAX_DEPTH = 6

MASK = "***"

_SECRET_KEYS = re.compile(
    r"(^|_)(password|passwd|secret|token|session_key|api_key|authorization|credentials?)$", re.IGNORECASE
)
# The password is matched up to the last @ of the word: it may hold @ and / that nobody escaped.
_URL_PASSWORD = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s:/@]*:)[^\s\"'<>]+(?=@)", re.IGNORECASE)
_SECRET_PARAMETERS = re.compile(
    r"((?:\b|_)(?:password|passwd|secret|token|signature|x-amz-signature|x-amz-credential|x-amz-security-token"
    r"|x-goog-signature|x-goog-credential|awsaccesskeyid|sig)[\"']?\s*[=:]\s*)('[^']*'|\"[^\"]*\"|[^\s&;,'\"]+)",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(\bbearer\s+)[a-z0-9._~+/=-]+", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")

_LEADING = ("timestamp", "level", "event", "job_id")

_process_fields: dict[str, Any] = {}


def configure_logging(format: LogFormat = "auto", level: str = "INFO") -> None:  # noqa: A002
    """Set up structlog and the standard library's root logger for this process. May be called again.

    `auto` is `console` where stderr is a terminal and `json` elsewhere. Other packages log from WARNING on,
    from `level` on if that is DEBUG.
    """
    number = logging.getLevelNamesMapping()[level]
    as_json = format == "json" or (format == "auto" and not sys.stderr.isatty())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        _merge_process_fields,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
        clean_event,
    ]
    renderer: Processor = (
        structlog.processors.JSONRenderer(default=str)
        if as_json
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    )
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(file=cast(TextIO, _STDERR)),
        cache_logger_on_first_use=False,
    )
    _configure_standard_library(shared, renderer, number)


def get_logger(**fields: Any) -> FilteringBoundLogger:
    """A logger with `fields` bound; good to make at import, before `configure_logging`."""
    return cast(FilteringBoundLogger, structlog.get_logger(**fields))


def bind_process(**fields: Any) -> None:
    """Add `fields` to every line of this process: for actors that serve one job.

    Context variables would not do there: each call of an async actor runs in a context of its own.
    """
    _process_fields.update(fields)


@contextmanager
def job_context(job_id: int) -> Iterator[None]:
    """Add `job_id` to every line of the block, in this task and in tasks that it starts."""
    with structlog.contextvars.bound_contextvars(job_id=job_id):
        yield


def mask_secrets(text: str) -> str:
    """`text` without passwords of URLs and DSNs, signatures of signed URLs and bearer tokens."""
    if "@" in text:
        text = _URL_PASSWORD.sub(rf"\g<1>{MASK}", text)
    text = _SECRET_PARAMETERS.sub(rf"\g<1>{MASK}", text)
    return _BEARER.sub(rf"\g<1>{MASK}", text)


def escape_control_characters(text: str) -> str:
    """`text` with everything that could drive a terminal shown as an escape; newlines and tabs stay."""
    return _CONTROL.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


def clean_event(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """The event with secrets masked, payloads cut and control characters escaped; a structlog processor."""
    cleaned: EventDict = {}
    for key in (*_LEADING, *(key for key in event if key not in _LEADING)):
        if key == "exception" and isinstance(event.get(key), str):
            cleaned[key] = _clean_text(event[key], MAX_TRACEBACK_CHARS)
        elif key in event:
            cleaned[key] = _clean(key, event[key], MAX_DEPTH)
    return cleaned


def _clean(key: str, value: Any, depth: int) -> Any:
    if key and _SECRET_KEYS.search(key):
        return MASK
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if key.startswith("_"):  # structlog's own, such as the standard library's record
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        return _clean_text(bytes(value[: MAX_TEXT_CHARS + 1]).decode("utf-8", "backslashreplace"))
    if depth and isinstance(value, Mapping):
        return _clean_mapping(value, depth)
    if depth and isinstance(value, list | tuple | set | frozenset):
        return _clean_items(list(value), depth)
    return _clean_text(value if isinstance(value, str) else str(value))


def _clean_mapping(value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
    cleaned = {}
    for name, item in list(value.items())[:MAX_ITEMS]:
        cleaned[_clean_text(str(name))] = _clean(str(name), item, depth - 1)
    if len(value) > MAX_ITEMS:
        cleaned["..."] = f"{len(value) - MAX_ITEMS} more"
    return cleaned


def _clean_items(value: Sequence[Any], depth: int) -> list[Any]:
    cleaned = [_clean("", item, depth - 1) for item in value[:MAX_ITEMS]]
    if len(value) > MAX_ITEMS:
        cleaned.append(f"... {len(value) - MAX_ITEMS} more")
    return cleaned


def _clean_text(text: str, limit: int = MAX_TEXT_CHARS) -> str:
    # Masked before it is cut: half of a secret has no @ behind it that would give it away.
    text = mask_secrets(text)
    if len(text) > limit:
        # The end of a traceback says what happened, its beginning who called.
        keep = limit // 2
        text = f"{text[:keep]} ... {len(text) - 2 * keep} characters ... {text[-keep:]}"
    return escape_control_characters(text)


def _merge_process_fields(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    for name, value in _process_fields.items():
        event.setdefault(name, value)
    return event


def _configure_standard_library(shared: list[Processor], renderer: Processor, level: int) -> None:
    handler = logging.StreamHandler(cast(TextIO, _STDERR))
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    for old in list(root.handlers):
        if isinstance(old.formatter, structlog.stdlib.ProcessorFormatter):
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level if level <= logging.DEBUG else max(level, logging.WARNING))


class _CurrentStderr:
    """Whatever `sys.stderr` is when a line is written: a live display replaces it while it draws."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


_STDERR = _CurrentStderr()
