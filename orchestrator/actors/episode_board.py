"""Which episode runs next, and which must run alone: pure bookkeeping of one job, held in memory only."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

from orchestrator.domain.episodes import EpisodeKey


class EpisodeBoard:
    """The episodes of a job that have no outcome.

    A crash with several episodes in flight charges none of them: each is repeated with nothing else in
    flight, and only such a lone run is charged. Otherwise scores would depend on the number of workers.
    """

    def __init__(self, missing: Iterable[EpisodeKey]) -> None:
        self._waiting = deque(missing)
        self._alone: deque[EpisodeKey] = deque()
        self._in_flight: dict[int, list[EpisodeKey]] = {}
        self._overlapped: set[EpisodeKey] = set()
        self.losses: Counter[EpisodeKey] = Counter()

    @property
    def is_done(self) -> bool:
        return not (self._waiting or self._alone or self._in_flight)

    @property
    def unfinished(self) -> int:
        """How many episodes have no outcome yet."""
        flying = sum(len(keys) for keys in self._in_flight.values())
        return len(self._waiting) + len(self._alone) + flying

    def take(self, worker: int, limit: int) -> list[EpisodeKey]:
        """Up to `limit` episodes for the worker, now in flight; empty when it has to wait."""
        assert worker not in self._in_flight
        if self._alone:
            keys = [] if self._in_flight else [self._alone.popleft()]
        elif self._runs_one_alone():
            keys = []
        else:
            keys = [self._waiting.popleft() for _ in range(min(limit, len(self._waiting)))]
        if keys:
            self._overlapped.difference_update(keys)
            if self._in_flight:
                self._overlapped.update(keys)
                for others in self._in_flight.values():
                    self._overlapped.update(others)
            self._in_flight[worker] = keys
        return keys

    def _runs_one_alone(self) -> bool:
        return any(self.losses[key] for keys in self._in_flight.values() for key in keys)

    def ran_alone(self, key: EpisodeKey) -> bool:
        """Whether nothing else was in flight at any time of the episode's latest run."""
        return key not in self._overlapped

    def landed(
        self, worker: int, *, again: Iterable[EpisodeKey] = (), alone: Iterable[EpisodeKey] = ()
    ) -> None:
        """The worker has none in flight now; `again` wait once more, `alone` are repeated by themselves."""
        self._in_flight.pop(worker, None)
        for key in reversed(list(again)):
            (self._alone if self.losses[key] else self._waiting).appendleft(key)
        for key in alone:
            self.losses[key] += 1
            self._alone.append(key)
