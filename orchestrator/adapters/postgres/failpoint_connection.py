"""A connection with failpoints on both sides of every statement; pools use it only while some are armed.

A point is named by who asks and by the statement: `postgres.<module>.<function>.<statement>.before`, where
the function is the outermost one of this package; `queue.<function>.<statement>.before` where pgqueuer asks
by itself, such as for an acknowledgement.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import asyncpg

from orchestrator.failpoints import is_armed, reach_async

if TYPE_CHECKING:
    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record]

_OURS = str(Path(__file__).parent)
# What all of the others go through says nothing of who asks.
_PASSAGES = frozenset({"failpoint_connection", "pool", "fence", "patience"})
_RESET = "pg_advisory_unlock_all"
_QUEUE_PACKAGE = "/pgqueuer/"
_QUEUE_FILE = "pgqueuer/adapters/persistence/queries.py"
_QUEUE_NAMES = {"log_jobs": "acknowledge", "retry_job": "put_back", "update_heartbeat": "heartbeat"}

_LOCKS = {"pg_advisory_xact_lock_shared": "lock_shared", "pg_advisory_xact_lock": "lock_exclusive"}
# What a statement changes says more of it than what it reads; the first that is found names it.
_EXTRACTED = re.compile(r"extract\s*\(\s*\w+\s+from", re.I)
_STATEMENTS = tuple(
    re.compile(pattern, re.I)
    for pattern in (
        r"\b(insert)\s+into\s+(?:\w+\.)?(\w+)",
        r"\b(update)\s+(?:\w+\.)?(\w+)\s+(?:\w+\s+)?set\b",
        r"\b(delete)\s+from\s+(?:\w+\.)?(\w+)",
        r"\b(select)\b(?s:.*?)\bfrom\s+(?:\w+\.)?(\w+)",
        r"\b(\w+)\b(?:\s+(\w+)\()?",
    )
)


class FailpointConnection(asyncpg.Connection):
    """Has every method by which this package and pgqueuer talk to the server; a test holds that."""

    __slots__ = ()

    async def execute(self, query: str, *arguments: Any, **named: Any) -> Any:
        return await self._between(
            query, lambda: super(FailpointConnection, self).execute(query, *arguments, **named)
        )

    async def executemany(self, command: str, *arguments: Any, **named: Any) -> Any:
        return await self._between(
            command, lambda: super(FailpointConnection, self).executemany(command, *arguments, **named)
        )

    async def fetch(self, query: str, *arguments: Any, **named: Any) -> Any:
        return await self._between(
            query, lambda: super(FailpointConnection, self).fetch(query, *arguments, **named)
        )

    async def fetchval(self, query: str, *arguments: Any, **named: Any) -> Any:
        return await self._between(
            query, lambda: super(FailpointConnection, self).fetchval(query, *arguments, **named)
        )

    async def fetchrow(self, query: str, *arguments: Any, **named: Any) -> Any:
        return await self._between(
            query, lambda: super(FailpointConnection, self).fetchrow(query, *arguments, **named)
        )

    async def copy_records_to_table(self, table_name: str, *arguments: Any, **named: Any) -> Any:
        return await self._between(
            f"INSERT INTO {table_name}",
            lambda: super(FailpointConnection, self).copy_records_to_table(table_name, *arguments, **named),
        )

    async def _between(self, statement: str, run: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        if _RESET in statement:  # a connection that goes back to its pool, whoever had it
            call = "postgres.reset"
        else:
            call = f"{_asked_by(sys._getframe(1))}.{statement_name(statement)}"
        await reach_async(f"{call}.before", self._cut)
        answer = await run()
        await reach_async(f"{call}.after", self._cut)
        return answer

    def _cut(self) -> NoReturn:
        self.terminate()
        raise asyncpg.ConnectionDoesNotExistError("a failpoint cut the connection")


def connecting() -> Callable[..., Coroutine[Any, Any, Connection]]:
    """How to connect: by `asyncpg.connect`, or by ours while failpoints are armed."""
    return _connect if is_armed() else asyncpg.connect


async def _connect(*arguments: Any, **named: Any) -> Connection:
    await reach_async("postgres.connect.before")
    connection: Connection = await asyncpg.connect(
        *arguments, **named | {"connection_class": FailpointConnection}
    )
    await reach_async("postgres.connect.after")
    return connection


def statement_name(statement: str) -> str:
    """`select_jobs`, `commit`, `lock_exclusive`: what a statement does, in a word of a point's name."""
    for function, name in _LOCKS.items():
        if f"{function}(" in statement:
            return name
    plain = _EXTRACTED.sub("", statement)
    for pattern in _STATEMENTS:
        if (found := pattern.search(plain)) is not None:
            return "_".join(filter(None, found.groups())).lower()
    return "statement"


def _asked_by(frame: FrameType | None) -> str:
    """Who asks: the outermost function of this package on the stack, or pgqueuer's."""
    ours = queue = nearest = None
    while frame is not None:
        path, function = frame.f_code.co_filename, frame.f_code.co_name
        module = Path(path).stem
        if path.startswith(_OURS):
            if module not in _PASSAGES:
                ours = f"postgres.{module}.{function}"
        elif path.endswith(_QUEUE_FILE) or (queue is None and _QUEUE_PACKAGE in path):
            queue = f"queue.{_QUEUE_NAMES.get(function, function)}"
        elif nearest is None and "/asyncpg/" not in path and path.endswith(".py"):
            nearest = f"postgres.{module}.{function}"
        frame = frame.f_back
    return ours or queue or nearest or "postgres"
