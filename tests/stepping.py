"""Failpoints in the hands of a test: what was reached, and points at which code waits until the test goes on.

Nothing here waits for time to pass: a held point is reached, or the deadline fails the test.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from orchestrator import failpoints
from orchestrator.fault_plan import Cut

T = TypeVar("T")

DEADLINE_SECONDS = 30.0


@dataclass
class Recorder:
    """Notes every point that is reached."""

    points: list[str] = field(default_factory=list)

    def reach(self, point: str, cut: Cut | None) -> None:
        self.points.append(point)

    async def reach_async(self, point: str, cut: Cut | None) -> None:
        self.points.append(point)


class Held:
    """The next one to reach the point waits there, until it is let go or made to fail."""

    def __init__(self, pattern: str, session: str = "*") -> None:
        self.pattern = pattern
        self.session = session
        self.taken = False
        self._reached = asyncio.Event()
        self._free = asyncio.Event()
        self._error: BaseException | None = None
        self._cuts = False

    async def reached(self) -> None:
        """Returns once somebody waits at the point."""
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                await self._reached.wait()
        except TimeoutError:
            raise AssertionError(f"nobody reached {self.pattern}") from None

    def go_on(self) -> None:
        """Let it go on."""
        self._free.set()

    def fail(self, error: BaseException) -> None:
        """Let the call raise `error`: before its effect, or after it."""
        self._error = error
        self._free.set()

    def cut(self) -> None:
        """Abort the connection, so that the answer is lost."""
        self._cuts = True
        self._free.set()

    async def hold(self, cut: Cut | None) -> None:
        self._reached.set()
        async with asyncio.timeout(2 * DEADLINE_SECONDS):
            await self._free.wait()
        if self._error is not None:
            raise self._error
        if self._cuts:
            assert cut is not None, f"{self.pattern} has no connection"
            cut()


@dataclass
class Stepper(Recorder):
    """Holds at the points that `hold` names, each once, and everything of a frozen session."""

    held: list[Held] = field(default_factory=list)
    reached_by: list[tuple[str, str]] = field(default_factory=list)  # (session, point)
    _frozen: dict[str, asyncio.Event] = field(default_factory=dict)
    _under_way: Counter[str] = field(default_factory=Counter)  # statements of each session

    def hold(self, pattern: str, session: str = "*") -> Held:
        """A point at which the next one to come waits; only one of that session, if it is named."""
        held = Held(pattern, session)
        self.held.append(held)
        return held

    def freeze(self, session: str) -> None:
        """From now on nothing of the session gets past any point, as if its process were stopped."""
        self._frozen[session] = asyncio.Event()

    async def freeze_at(self, held: Held) -> None:
        """Freeze the session of a held point once it has reached it; returns when all of it stands still."""
        await held.reached()
        self.freeze(held.session)
        held.go_on()
        async with asyncio.timeout(DEADLINE_SECONDS):
            while self._under_way[held.session]:
                await asyncio.sleep(0.005)

    def thaw(self, session: str) -> None:
        """The session goes on where it stopped."""
        self._frozen.pop(session).set()

    async def reach_async(self, point: str, cut: Cut | None) -> None:
        session = _session.get()
        is_statement = point.startswith(("postgres.", "queue."))
        if is_statement and point.endswith(".after"):
            self._under_way[session] -= 1
        self.points.append(point)
        self.reached_by.append((session, point))
        for held in self.held:
            if not held.taken and fnmatchcase(point, held.pattern) and fnmatchcase(session, held.session):
                held.taken = True
                await held.hold(cut)
                break
        while (frozen := self._frozen.get(session)) is not None:
            await frozen.wait()
        if is_statement and point.endswith(".before"):
            self._under_way[session] += 1

    def let_go(self, session: str = "*") -> None:
        """Nobody of the session waits any more, also at the end of a test that failed."""
        for held in self.held:
            if fnmatchcase(held.session, session):
                held.taken = True
                held.go_on()
        for frozen in [each for each in self._frozen if fnmatchcase(each, session)]:
            self.thaw(frozen)


_session: ContextVar[str] = ContextVar("session", default="")


def in_session(name: str, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """A task whose points, with those of the tasks that it starts, belong to the named session."""
    context = copy_context()
    context.run(_session.set, name)
    return asyncio.create_task(work, context=context)


@contextmanager
def stepping() -> Iterator[Stepper]:
    """This process stepped by the test for the block; pools have to be opened inside it."""
    stepper = Stepper()
    with failpoints.armed(stepper):
        try:
            yield stepper
        finally:
            stepper.let_go()
