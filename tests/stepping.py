"""Failpoints in the hands of a test: what was reached, and points at which code waits until the test goes on.

Nothing here waits for time to pass: a held point is reached, or the deadline fails the test.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from orchestrator import failpoints
from orchestrator.failpoints import Cut

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

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
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
    """Holds at the points that `hold` names, each once; everything else passes."""

    held: list[Held] = field(default_factory=list)

    def hold(self, pattern: str) -> Held:
        """A point at which the next one to come waits."""
        held = Held(pattern)
        self.held.append(held)
        return held

    async def reach_async(self, point: str, cut: Cut | None) -> None:
        self.points.append(point)
        for held in self.held:
            if not held.taken and fnmatchcase(point, held.pattern):
                held.taken = True
                await held.hold(cut)
                return

    def let_all_go(self) -> None:
        """Nobody waits any more, at the end of a test that failed too."""
        for held in self.held:
            held.taken = True
            held.go_on()


@contextmanager
def stepping() -> Iterator[Stepper]:
    """This process stepped by the test for the block; pools have to be opened inside it."""
    stepper = Stepper()
    with failpoints.armed(stepper):
        try:
            yield stepper
        finally:
            stepper.let_all_go()
