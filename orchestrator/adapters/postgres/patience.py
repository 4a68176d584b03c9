"""Calls of a store or ledger that outlast a restart of Postgres."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

from orchestrator.adapters.postgres.pool import retrying

T = TypeVar("T")


def patient(adapter: T, seconds: float) -> T:
    """`adapter`, each of whose calls is tried again for up to `seconds` while Postgres is away.

    An answer can be lost after its commit, so every method must bear to be repeated; those of our stores do.
    """
    return cast(T, _Patient(adapter, seconds))


class _Patient:
    def __init__(self, adapter: Any, seconds: float) -> None:
        self._adapter = adapter
        self._seconds = seconds

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        method = getattr(self._adapter, name)

        async def call(*arguments: Any, **named: Any) -> Any:
            return await retrying(
                lambda: method(*arguments, **named),
                deadline_seconds=self._seconds,
                what=name.replace("_", " "),
            )

        return call
