"""Which episode runs next, and which must run alone: pure bookkeeping of one job, held in memory only."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

from orchestrator.domain.episodes import EpisodeKey


class EpisodeBoard:
    """The episodes of a job that have no outcome.

    A crash with several episodes in flight charges none of them: each becomes a suspect, which only ever runs
    with nothing else in flight, and only such a lone run is charged. Otherwise scores would depend on the
    number of workers. The episodes that one worker holds together are played one after the other: they are
    alone, too, as long as no other worker holds any.

    `healthy_losses` counts, for whoever judges, the lone runs that lost their connection to a container that
    kept running.
    """

    def __init__(self, missing: Iterable[EpisodeKey]) -> None:
        self._waiting = deque(missing)
        self._alone: deque[EpisodeKey] = deque()
        self._suspects: set[EpisodeKey] = set()
        self._in_flight: dict[int, list[EpisodeKey]] = {}
        self._overlapped: set[EpisodeKey] = set()
        self._one_worker_at_a_time = False
        self.healthy_losses: Counter[EpisodeKey] = Counter()

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
        if self._in_flight and (self._alone or self._one_worker_at_a_time or self._suspect_in_flight()):
            return []
        if self._alone:
            keys = [self._alone.popleft()]
        else:
            keys = [self._waiting.popleft() for _ in range(min(limit, len(self._waiting)))]
        if keys:
            self._overlapped.difference_update(keys)
            if self._in_flight:
                self._overlapped.update(keys, *self._in_flight.values())
            self._in_flight[worker] = keys
        return keys

    def ran_alone(self, key: EpisodeKey) -> bool:
        """Whether nothing else was in flight at any time of the episode's latest run."""
        return key not in self._overlapped

    def landed(
        self, worker: int, *, again: Iterable[EpisodeKey] = (), alone: Iterable[EpisodeKey] = ()
    ) -> None:
        """The worker has none in flight now.

        `again` wait once more, suspects among them by themselves; `alone` are suspects from now on. Both come
        before all others: a lone run is repeated at once. What is in neither has its outcome.
        """
        again, alone = list(again), list(alone)
        flown = self._in_flight.pop(worker)
        back = [*again, *alone]
        assert len(back) == len(set(back)), "an episode waits in one place"
        assert set(back) <= set(flown), "only what was handed out comes back"
        for key in reversed(again):
            (self._alone if key in self._suspects else self._waiting).appendleft(key)
        self._alone.extendleft(reversed(alone))
        self._suspects.update(alone)

    def one_worker_at_a_time(self) -> None:
        """From now on every run is a lone one: nothing is handed out while another worker holds episodes."""
        self._one_worker_at_a_time = True

    def _suspect_in_flight(self) -> bool:
        return any(not self._suspects.isdisjoint(keys) for keys in self._in_flight.values())
