"""Reads a job's `config` for the built-in providers; what cannot be used is the caller's error, in words."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import ValidationError

from orchestrator.adapters.benchmarks.names import unknown_name
from orchestrator.domain.errors import UsageError
from orchestrator.domain.job_documents import in_words
from orchestrator.domain.messages import JobConfig

DEFAULT_EPISODES_PER_TASK = 10


def read_job_config(config: Mapping[str, Any], *, options: Collection[str] = ()) -> JobConfig:
    """The part of `config` that has types of its own; `options` names what the provider reads besides.

    Raises:
        UsageError: a value is of the wrong type or out of range, or nobody reads a key: names each.
    """
    known = {*JobConfig.model_fields, *options}
    for key in config:
        if key not in known:
            raise unknown_name("key of config", key, known)
    try:
        return JobConfig.model_validate(dict(config))
    except ValidationError as error:
        raise UsageError(in_words(error, within="config")) from None


def read_option(config: Mapping[str, Any], name: str, kind: type, default: Any, words: str) -> Any:
    """`config[name]` if it is there and not null, else `default`.

    Raises:
        UsageError: it is not a `kind`; `words` say what it must be. A bool is no int here.
    """
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UsageError(f"config.{name} must be {words}, got {shown(value)}")
    return value


def shown(value: object, limit: int = 80) -> str:
    """A value of a job for a message: it may be very long."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
