"""How a client waits for a job: polls the tables, at a pace that a large job's answers allow."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

from orchestrator.domain.episodes import EpisodeOutcome
from orchestrator.domain.errors import JobNotFinished
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.reports import StatusChange

POLL_SECONDS = 0.25
MAX_POLL_SECONDS = 5.0

Progress = StatusChange | EpisodeOutcome


class Pace:
    """The pauses of one waiter: a fifth of the time at most is spent on asking."""

    def __init__(self, job_id: int, timeout_seconds: float | None) -> None:
        self._job_id = job_id
        self._timeout_seconds = timeout_seconds
        self._began_at = self._asked_at = time.monotonic()

    async def pause(self, status: JobStatus) -> None:
        """Return when it is time to ask again.

        Raises:
            JobNotFinished: the time to wait is over.
        """
        now = time.monotonic()
        seconds = min(max(POLL_SECONDS, 4 * (now - self._asked_at)), MAX_POLL_SECONDS)
        if self._timeout_seconds is not None:
            left = self._began_at + self._timeout_seconds - now
            if left <= 0:
                raise JobNotFinished(self._job_id, status.value, self._timeout_seconds)
            seconds = min(seconds, left)
        await asyncio.sleep(seconds)
        self._asked_at = time.monotonic()


class JobStream:
    """The progress of one job, each change and each outcome once."""

    def __init__(
        self,
        changes_after: Callable[[int], Awaitable[list[StatusChange]]],
        finished_from: Callable[[int], Awaitable[list[tuple[int, EpisodeOutcome]]]],
        pace: Pace,
    ) -> None:
        self._changes_after = changes_after
        self._finished_from = finished_from
        self._pace = pace
        self._number = 0
        self._seen = SeenEpisodes()

    async def events(self) -> AsyncGenerator[Progress, None]:
        """Yield what is committed, from the job's beginning, until its final status, which comes last."""
        status = JobStatus.QUEUED
        while True:
            # In this order: outcomes that are read after the final status are all there will be.
            changes = await self._changes_after(self._number)
            for change in changes:
                self._number, status = change.number, change.status
                if not status.is_final:
                    yield change
            async with aclosing(self._outcomes()) as outcomes:
                async for outcome in outcomes:
                    yield outcome
            if status.is_final:
                yield changes[-1]
                return
            await self._pace.pause(status)

    async def _outcomes(self) -> AsyncGenerator[EpisodeOutcome, None]:
        start = self._seen.first_unseen
        while page := await self._finished_from(start):
            for ordinal, outcome in page:
                if self._seen.add(ordinal):
                    yield outcome
            start = page[-1][0] + 1


class SeenEpisodes:
    """Places in a plan that were seen; they come nearly in order, so few are remembered one by one."""

    def __init__(self) -> None:
        self.first_unseen = 0
        self._beyond: set[int] = set()

    def add(self, ordinal: int) -> bool:
        """Whether it is seen for the first time."""
        if ordinal < self.first_unseen or ordinal in self._beyond:
            return False
        self._beyond.add(ordinal)
        while self.first_unseen in self._beyond:
            self._beyond.remove(self.first_unseen)
            self.first_unseen += 1
        return True
