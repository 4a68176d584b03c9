"""Reads a job's `config` for the built-in providers; what cannot be used is the caller's error, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from orchestrator.domain.errors import UsageError
from orchestrator.domain.messages import JobConfig

DEFAULT_EPISODES_PER_TASK = 10


def read_job_config(config: Mapping[str, Any]) -> JobConfig:
    """The part of `config` that has types of its own.

    Raises:
        UsageError: a value is of the wrong type or out of range; names each.
    """
    try:
        return JobConfig.model_validate(dict(config))
    except ValidationError as error:
        reasons = "; ".join(
            f"config.{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()
        )
        raise UsageError(reasons) from None


def read_option(config: Mapping[str, Any], name: str, kind: type, default: Any, words: str) -> Any:
    """`config[name]` if it is there and not null, else `default`.

    Raises:
        UsageError: it is not a `kind`; `words` say what it must be. A bool is no int here.
    """
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UsageError(f"config.{name} must be {words}, got {value!r}")
    return value
