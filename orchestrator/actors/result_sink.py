"""The ResultSink: commits finished episodes in batches, and makes their workers wait when it is full."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import structlog

from orchestrator.actors.episode_publisher import size_bytes
from orchestrator.adapters.postgres.pool import retrying
from orchestrator.domain.episodes import CommitOutcome, EpisodeRun, FinishedEpisode
from orchestrator.domain.errors import InfrastructureError, OrchestratorError
from orchestrator.ports import Ledger

log = structlog.get_logger(__name__)


class SinkIsFull(InfrastructureError):
    """No room came free in time: send again."""


class SinkRefused(OrchestratorError):
    """The database will never take these episodes: a bug, so sending again is no use."""


@dataclass(slots=True)
class _Delivery:
    episodes: Sequence[FinishedEpisode]
    size: int
    outcome: asyncio.Future[list[CommitOutcome]]


@dataclass
class ResultSink:
    """Group commit: all deliveries that wait go into the next transaction, within the caps.

    `max_bytes` bounds what is held here; `batch_episodes` what one transaction commits.
    """

    ledger: Ledger
    max_bytes: int
    batch_episodes: int
    database_patience_seconds: float
    committed: int = field(default=0, init=False)
    _waiting: list[_Delivery] = field(default_factory=list, init=False)
    _held_bytes: int = field(default=0, init=False)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition, init=False)

    async def commit(self, finished: Sequence[FinishedEpisode]) -> list[CommitOutcome]:
        """What the ledger did with each, after the commit.

        Raises:
            SinkIsFull: there was no room within `database_patience_seconds`.
            InfrastructureError: the database did not answer in that time; nothing, or all, was committed.
        """
        if not finished:
            return []
        size = sum(map(size_bytes, finished))
        delivery = _Delivery(finished, size, asyncio.get_running_loop().create_future())
        try:
            async with asyncio.timeout(self.database_patience_seconds), self._changed:
                await self._changed.wait_for(lambda: not self._held_bytes or self._fits(size))
                self._waiting.append(delivery)
                self._held_bytes += size
                self._changed.notify_all()
        except TimeoutError as error:
            raise SinkIsFull(f"the result sink holds {self._held_bytes} bytes") from error
        return await delivery.outcome

    async def stage(self, run: EpisodeRun, part: int, messages: Sequence[bytes]) -> bool:
        """Store a part of a long episode; False where its run is void."""
        return await retrying(
            lambda: self.ledger.stage_part(run, part, messages),
            deadline_seconds=self.database_patience_seconds,
            what="staging a part of an episode",
        )

    async def work(self) -> None:
        """Commit until cancelled."""
        while True:
            batch = await self._next_batch()
            try:
                await self._commit(batch)
            finally:
                async with self._changed:
                    self._held_bytes -= sum(delivery.size for delivery in batch)
                    self._changed.notify_all()

    def _fits(self, size: int) -> bool:
        return self._held_bytes + size <= self.max_bytes

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
        except InfrastructureError as error:
            log.warning("episodes_not_committed", episodes=len(episodes), why=str(error))
            for delivery in batch:
                self._answer(delivery, error)
            return
        except Exception as error:
            if len(batch) > 1:
                # One bad episode must not hold up the others.
                for delivery in batch:
                    await self._commit([delivery])
                return
            log.exception("episodes_refused", episodes=len(episodes))
            self._answer(batch[0], SinkRefused(f"{type(error).__name__}: {error}"))
            return
        self.committed += outcomes.count(CommitOutcome.COMMITTED)
        position = 0
        for delivery in batch:
            answers = outcomes[position : position + len(delivery.episodes)]
            position += len(delivery.episodes)
            self._answer(delivery, answers)

    @staticmethod
    def _answer(delivery: _Delivery, answer: list[CommitOutcome] | Exception) -> None:
        with contextlib.suppress(asyncio.InvalidStateError):  # the caller gave up: it will send again
            if isinstance(answer, Exception):
                delivery.outcome.set_exception(answer)
            else:
                delivery.outcome.set_result(answer)
