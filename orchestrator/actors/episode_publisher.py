"""From a worker to the ResultSink: finished episodes are published while the next one is stepped."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from ray.exceptions import (
    GetTimeoutError,
    ObjectLostError,
    ObjectStoreFullError,
    PendingCallsLimitExceeded,
    RayActorError,
    RpcError,
)

from orchestrator.actors.parcels import Parcel, packed
from orchestrator.actors.ray_calls import ask_blocking
from orchestrator.domain.episodes import CommitOutcome, EpisodeRun, FinishedEpisode
from orchestrator.domain.errors import InfrastructureError
from orchestrator.logging import get_logger

log = get_logger()

FIRST_BACKOFF_SECONDS = 0.1
LAST_BACKOFF_SECONDS = 5.0
# The sink is away, restarting or full, or the cluster is short of something: the next try may succeed.
RETRIED = (
    RayActorError,
    GetTimeoutError,
    ObjectLostError,
    ObjectStoreFullError,
    PendingCallsLimitExceeded,
    RpcError,
    InfrastructureError,
)

Answer = TypeVar("Answer")


class Publisher(Protocol):
    """Where finished episodes go. Blocking, called from two threads; sending twice does no harm."""

    def publish(self, episodes: Sequence[FinishedEpisode]) -> list[CommitOutcome]:
        """What the ledger did with each, once it is committed.

        Raises:
            PublishingStopped: the worker was stopped before that was known.
        """
        ...

    def stage(self, run: EpisodeRun, part: int, messages: Sequence[bytes]) -> bool:
        """Whether the part was stored; False if the run does not count any more.

        Raises:
            PublishingStopped: as `publish`.
        """
        ...


class PublishingStopped(InfrastructureError):
    """The worker was stopped before the sink acknowledged. The ledger knows what came of it."""


class SinkPublisher:
    """Publishes to a ResultSink actor, again and again until it acknowledges or `stop` is set.

    `find_sink` gives its handle; it is asked again after the actor was lost, for another one may have its
    name by then, and the handle of an actor that is dead for good never answers.
    """

    def __init__(
        self, find_sink: Callable[[], Any], stop: threading.Event, *, timeout_seconds: float
    ) -> None:
        self._find_sink = find_sink
        self._sink: Any = None
        self._stop = stop
        self._timeout_seconds = timeout_seconds

    def publish(self, episodes: Sequence[FinishedEpisode]) -> list[CommitOutcome]:
        size = sum(map(size_bytes, episodes))
        outcomes: list[CommitOutcome] = self._until_acknowledged("commit", list(episodes), size)
        return outcomes

    def stage(self, run: EpisodeRun, part: int, messages: Sequence[bytes]) -> bool:
        size = sum(map(len, messages))
        return bool(self._until_acknowledged("stage", list(messages), size, run, part))

    def _until_acknowledged(self, method: str, content: Any, size: int, *arguments: Any) -> Any:
        parcel: Parcel | None = None

        def send() -> Any:
            nonlocal parcel
            if parcel is None:  # once: each further copy would be one more on this node
                parcel = packed(content, size)
            try:
                return self._answer(method, *arguments, parcel)
            except ObjectLostError:
                parcel = None
                raise

        return until_acknowledged(send, self._stop, retried=RETRIED)

    def _answer(self, method: str, *arguments: Any) -> Any:
        sink = self._sink
        if sink is None:
            try:
                sink = self._sink = self._find_sink()
            except ValueError as error:
                raise InfrastructureError(f"there is no result sink now: {error}") from error
        try:
            return ask_blocking(sink, method, *arguments, timeout_seconds=self._timeout_seconds)
        except RayActorError:
            self._sink = None
            raise


def until_acknowledged(
    send: Callable[[], Answer], stop: threading.Event, *, retried: tuple[type[BaseException], ...]
) -> Answer:
    """The answer of the first `send` that gives one. It is tried at least once, also after `stop`.

    Raises:
        PublishingStopped: `stop` is set and the last try failed.
    """
    backoff_seconds = FIRST_BACKOFF_SECONDS
    while True:
        try:
            return send()
        except retried as error:
            # Jitter, or all workers of a restarted sink would come back in the same moment.
            pause_seconds = backoff_seconds * random.uniform(0.5, 1.5)  # noqa: S311 - not for secrets
            log.warning(
                "sink_unavailable", error=type(error).__name__, retry_in_seconds=round(pause_seconds, 2)
            )
            if stop.wait(pause_seconds):
                raise PublishingStopped("stopped before the sink acknowledged") from error
            backoff_seconds = min(2 * backoff_seconds, LAST_BACKOFF_SECONDS)


@dataclass(slots=True)
class _Waiting:
    episode: FinishedEpisode
    size_bytes: int
    outcome: Future[CommitOutcome] = field(default_factory=Future)


class PublishingQueue:
    """A bounded queue in front of a publisher, emptied by a thread of its own, in order and in batches.

    `put` makes the caller wait while `max_episodes` or `max_bytes` are queued or on their way; one episode is
    always let in, however large it is.
    """

    def __init__(self, publisher: Publisher, *, max_episodes: int, max_bytes: int) -> None:
        self._publisher = publisher
        self._max_episodes = max_episodes
        self._max_bytes = max_bytes
        self._changed = threading.Condition()
        self._waiting: deque[_Waiting] = deque()
        self._held_episodes = 0
        self._held_bytes = 0
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="episode-publisher", daemon=True)
        self._thread.start()

    def put(self, episode: FinishedEpisode) -> Future[CommitOutcome]:
        """A future of what the ledger did; it raises what the publisher raised."""
        entry = _Waiting(episode, size_bytes(episode))
        with self._changed:
            self._changed.wait_for(lambda: self._has_room(entry.size_bytes))
            if self._closed:
                raise PublishingStopped("the publishing queue is closed")
            self._waiting.append(entry)
            self._held_episodes += 1
            self._held_bytes += entry.size_bytes
            self._changed.notify_all()
        return entry.outcome

    def close(self) -> None:
        """Publish what is queued, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _has_room(self, more_bytes: int) -> bool:
        if self._closed or self._held_episodes == 0:
            return True
        return self._held_episodes < self._max_episodes and self._held_bytes + more_bytes <= self._max_bytes

    def _work(self) -> None:
        while batch := self._next_batch():
            self._publish(batch)
            with self._changed:
                self._held_episodes -= len(batch)
                self._held_bytes -= sum(entry.size_bytes for entry in batch)
                self._changed.notify_all()

    def _next_batch(self) -> list[_Waiting]:
        """Everything that is queued; empty once the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            batch = list(self._waiting)
            self._waiting.clear()
            return batch

    def _publish(self, batch: list[_Waiting]) -> None:
        try:
            outcomes = self._publisher.publish([entry.episode for entry in batch])
            for entry, outcome in zip(batch, outcomes, strict=True):
                entry.outcome.set_result(outcome)
        except Exception as error:  # noqa: BLE001 - it is raised again where the futures are awaited
            for entry in batch:
                if not entry.outcome.done():
                    entry.outcome.set_exception(error)


def size_bytes(episode: FinishedEpisode) -> int:
    """About how much memory the episode's telemetry holds."""
    steps = sum(map(len, episode.step_messages))
    return steps + len(episode.action_trace) + len(episode.episode_message)
