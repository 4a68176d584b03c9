"""The ResultSink: commits finished episodes in batches, and makes their workers wait when it is full."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import asyncpg
import structlog

from orchestrator.actors.episode_publisher import size_bytes
from orchestrator.actors.measurements import measure_committed
from orchestrator.adapters.postgres.pool import retrying
from orchestrator.domain.episodes import CommitOutcome, EpisodeRun, FinishedEpisode
from orchestrator.domain.errors import InfrastructureError, OrchestratorError
from orchestrator.domain.metrics import SINK_HELD, Meter, NoMeter
from orchestrator.ports import Ledger

log = structlog.get_logger(__name__)

T = TypeVar("T")

# What no second try changes: the values themselves, or our own code. All else (a lock not given in time, a
# full disk, a pool that closes) may pass, and the episodes are sent again.
_REFUSALS = (
    asyncpg.DataError,
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.SyntaxOrAccessError,
    asyncpg.ProgramLimitExceededError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)


class SinkIsFull(InfrastructureError):
    """No room came free in time: send again."""


class SinkRefused(OrchestratorError):
    """The database will never take these episodes: a bug, so sending again is no use."""


@dataclass(slots=True, eq=False)
class _Delivery:
    episodes: Sequence[FinishedEpisode]
    size: int
    outcome: asyncio.Future[list[CommitOutcome]]


@dataclass
class ResultSink:
    """Group commit: all deliveries that wait go into the next transaction, within the caps.

    `max_bytes` bounds what is held here, whole episodes and parts together; `batch_episodes` what one
    transaction commits. What has no room stays where it is made: it is fetched once it has. Nobody waits
    longer than `answer_seconds`, so that a worker that sends again does not wait here twice.
    """

    ledger: Ledger
    max_bytes: int
    batch_episodes: int
    database_patience_seconds: float
    answer_seconds: float = 25.0
    meter: Meter = field(default_factory=NoMeter, repr=False)
    committed: int = field(default=0, init=False)
    _waiting: list[_Delivery] = field(default_factory=list, init=False)
    held_bytes: int = field(default=0, init=False)
    _closed: bool = field(default=False, init=False)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition, init=False)

    async def commit(self, finished: Sequence[FinishedEpisode]) -> list[CommitOutcome]:
        """As `commit_fetched`, of what is here already."""
        return await self.commit_fetched(sum(map(size_bytes, finished)), _at_hand(finished))

    async def commit_fetched(
        self, size: int, fetch: Callable[[], Awaitable[Sequence[FinishedEpisode]]]
    ) -> list[CommitOutcome]:
        """What the ledger did with each of the episodes that `fetch` brings, after the commit.

        Raises:
            SinkIsFull: there was no room within `database_patience_seconds`; nothing was fetched.
            InfrastructureError: the database did not answer in that time, nobody could in `answer_seconds`,
                or the sink closed; nothing, or all, was committed.
            SinkRefused: the database will never take them.
        """
        async with self._answering(), self._room(size) as room:
            finished = await fetch()
            if not finished:
                return []
            delivery = _Delivery(finished, size, asyncio.get_running_loop().create_future())
            await self._put_in_line(delivery)
            room.pop_all()  # `work` gives it back
            try:
                return await delivery.outcome
            finally:
                if delivery in self._waiting:  # nobody waits for it any more
                    self._waiting.remove(delivery)
                    await self._give_room(size)

    async def stage(self, run: EpisodeRun, part: int, messages: Sequence[bytes]) -> bool:
        """As `stage_fetched`, of what is here already."""
        return await self.stage_fetched(run, part, sum(map(len, messages)), _at_hand(messages))

    async def stage_fetched(
        self, run: EpisodeRun, part: int, size: int, fetch: Callable[[], Awaitable[Sequence[bytes]]]
    ) -> bool:
        """Store a part of a long episode; False where its run is void. Staging it again does no harm.

        Raises:
            SinkIsFull, InfrastructureError, SinkRefused: as `commit_fetched`.
        """
        async with self._answering(), self._room(size):
            messages = await fetch()
            try:
                return await retrying(
                    lambda: self.ledger.stage_part(run, part, messages),
                    deadline_seconds=self.database_patience_seconds,
                    what="staging a part of an episode",
                )
            except InfrastructureError:
                raise
            except Exception as error:
                raise _for_the_caller(error) from error

    async def work(self) -> None:
        """Commit until cancelled. At its end, however it comes, nobody is left waiting."""
        try:
            while True:
                batch = await self._next_batch()
                try:
                    await self._commit(batch)
                finally:
                    for delivery in batch:
                        self._answer(delivery, _closed())  # where no answer was reached
                    await self._give_room(sum(delivery.size for delivery in batch))
        finally:
            self._closed = True
            left, self._waiting = self._waiting, []
            for delivery in left:
                self._answer(delivery, _closed())
            await self._give_room(sum(delivery.size for delivery in left))

    @asynccontextmanager
    async def _answering(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self.answer_seconds):
                yield
        except TimeoutError as error:
            raise InfrastructureError(
                f"not committed within {self.answer_seconds:g} s: send again"
            ) from error

    @asynccontextmanager
    async def _room(self, size: int) -> AsyncIterator[contextlib.AsyncExitStack]:
        """Room for the block; it is kept where what the block is given forgets about it.

        Raises:
            SinkIsFull, InfrastructureError: as `commit_fetched`.
        """
        try:
            async with asyncio.timeout(self.database_patience_seconds), self._changed:
                await self._changed.wait_for(lambda: self._closed or self._fits(size))
                if self._closed:
                    raise _closed()
                self.held_bytes += size
                self.meter.set(SINK_HELD, self.held_bytes)
        except TimeoutError as error:
            raise SinkIsFull(f"the result sink holds {self.held_bytes} bytes") from error
        async with contextlib.AsyncExitStack() as room:
            room.push_async_callback(self._give_room, size)
            yield room

    async def _put_in_line(self, delivery: _Delivery) -> None:
        async with self._changed:
            if self._closed:
                raise _closed()
            self._waiting.append(delivery)
            self._changed.notify_all()

    async def _give_room(self, size: int) -> None:
        self.held_bytes -= size
        self.meter.set(SINK_HELD, self.held_bytes)
        async with self._changed:
            self._changed.notify_all()

    def _fits(self, size: int) -> bool:
        # What is larger than the cap by itself goes alone.
        return not self.held_bytes or self.held_bytes + size <= self.max_bytes

    async def _next_batch(self) -> list[_Delivery]:
        async with self._changed:
            await self._changed.wait_for(lambda: bool(self._waiting))
            batch = [self._waiting.pop(0)]
            episodes = len(batch[0].episodes)
            while self._waiting and episodes + len(self._waiting[0].episodes) <= self.batch_episodes:
                batch.append(self._waiting.pop(0))
                episodes += len(batch[-1].episodes)
            return batch

    async def _commit(self, batch: Sequence[_Delivery]) -> None:
        episodes = [episode for delivery in batch for episode in delivery.episodes]
        try:
            outcomes = await retrying(
                lambda: self.ledger.commit(episodes),
                deadline_seconds=self.database_patience_seconds,
                what="committing finished episodes",
            )
        except Exception as error:  # noqa: BLE001 - every caller gets it, with what to do about it
            await self._not_committed(batch, error)
            return
        taken = [
            episode
            for episode, outcome in zip(episodes, outcomes, strict=True)
            if outcome is CommitOutcome.COMMITTED
        ]
        self.committed += len(taken)
        measure_committed(self.meter, taken)
        position = 0
        for delivery in batch:
            answers = outcomes[position : position + len(delivery.episodes)]
            position += len(delivery.episodes)
            self._answer(delivery, answers)

    async def _not_committed(self, batch: Sequence[_Delivery], error: Exception) -> None:
        answer = _for_the_caller(error)
        if isinstance(answer, SinkRefused) and len(batch) > 1:
            # One bad episode must not hold up the others.
            for delivery in batch:
                await self._commit([delivery])
            return
        log.warning(
            "episodes_not_committed",
            deliveries=len(batch),
            why=str(answer),
            exc_info=error if isinstance(answer, SinkRefused) else None,
        )
        for delivery in batch:
            self._answer(delivery, answer)

    @staticmethod
    def _answer(delivery: _Delivery, answer: list[CommitOutcome] | Exception) -> None:
        with contextlib.suppress(asyncio.InvalidStateError):  # answered, or its caller gave up
            if isinstance(answer, Exception):
                delivery.outcome.set_exception(answer)
            else:
                delivery.outcome.set_result(answer)


def _at_hand(content: T) -> Callable[[], Awaitable[T]]:
    async def fetch() -> T:
        return content

    return fetch


def _for_the_caller(error: Exception) -> OrchestratorError:
    """The error as workers know it: whether to send again. It pickles, whatever `error` holds."""
    if isinstance(error, InfrastructureError):
        return error
    words = f"{type(error).__name__}: {error}"
    if isinstance(error, _REFUSALS):
        return SinkRefused(words)
    return InfrastructureError(words)


def _closed() -> InfrastructureError:
    return InfrastructureError("the result sink has closed: send again")
