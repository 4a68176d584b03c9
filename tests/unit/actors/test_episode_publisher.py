from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from orchestrator.actors import episode_publisher
from orchestrator.actors.episode_publisher import (
    PublishingQueue,
    PublishingStopped,
    size_bytes,
    until_acknowledged,
)
from orchestrator.domain.episodes import CommitOutcome, EpisodeRun, FinishedEpisode
from orchestrator.domain.errors import InfrastructureError
from tests.unit.actors.rollout_fakes import MemoryPublisher, a_logger, a_run, a_step


def an_episode(episode_id: int) -> FinishedEpisode:
    logger = a_logger(a_run(episode_id=episode_id))
    logger.step(1, a_step(over=True), truncated=False)
    return logger.finish(success=True, fault=None, fault_detail=None)


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episode_publisher, "FIRST_BACKOFF_SECONDS", 0.0)


class AccountingPublisher:
    """Fails if more was let in than the queue's bounds allow, each time that it is asked to publish."""

    def __init__(self, most_episodes: int) -> None:
        self.most_episodes = most_episodes
        self.let_in = 0
        self.published: list[EpisodeRun] = []
        self.excess = 0

    def publish(self, episodes: Sequence[FinishedEpisode]) -> list[CommitOutcome]:
        self.excess = max(self.excess, self.let_in - len(self.published) - self.most_episodes)
        self.published += [episode.run for episode in episodes]
        return [CommitOutcome.COMMITTED for _ in episodes]

    def stage(self, run: EpisodeRun, part: int, messages: Sequence[bytes]) -> bool:
        return True


def test_episodes_are_published_in_order_and_their_futures_tell() -> None:
    publisher = MemoryPublisher()
    queue = PublishingQueue(publisher, max_episodes=3, max_bytes=2**20)

    futures = [queue.put(an_episode(index)) for index in range(10)]
    queue.close()

    assert [future.result(0) for future in futures] == [CommitOutcome.COMMITTED] * 10
    assert [key.episode_id for key in publisher.committed] == list(range(10))


@pytest.mark.parametrize("bound", ["episodes", "bytes"])
def test_never_more_than_the_bound_is_held(bound: str) -> None:
    size = size_bytes(an_episode(0))
    publisher = AccountingPublisher(most_episodes=2)
    queue = PublishingQueue(
        publisher,
        max_episodes=2 if bound == "episodes" else 1000,
        max_bytes=2**30 if bound == "episodes" else 2 * size + 10,
    )

    for index in range(50):
        queue.put(an_episode(index))
        publisher.let_in += 1
    queue.close()

    assert publisher.excess <= 0
    assert [run.episode_id for run in publisher.published] == list(range(50))


def test_an_episode_larger_than_the_queue_still_passes() -> None:
    publisher = MemoryPublisher()
    queue = PublishingQueue(publisher, max_episodes=10, max_bytes=1)

    futures = [queue.put(an_episode(index)) for index in range(3)]
    queue.close()

    assert [future.result(0) for future in futures] == [CommitOutcome.COMMITTED] * 3


def test_what_the_publisher_raises_is_raised_by_the_future_and_the_queue_lives_on() -> None:
    publisher = MemoryPublisher(error=InfrastructureError("no sink"))
    queue = PublishingQueue(publisher, max_episodes=10, max_bytes=2**20)
    with pytest.raises(InfrastructureError, match="no sink"):
        queue.put(an_episode(0)).result(20)

    publisher.error = None
    outcome = queue.put(an_episode(1)).result(20)
    queue.close()

    assert outcome is CommitOutcome.COMMITTED


def test_a_publisher_that_answers_too_little_is_an_error_and_not_a_hang() -> None:
    class Forgetful(MemoryPublisher):
        def publish(self, episodes: Sequence[FinishedEpisode]) -> list[CommitOutcome]:
            return []

    queue = PublishingQueue(Forgetful(), max_episodes=10, max_bytes=2**20)

    with pytest.raises(ValueError, match="shorter"):
        queue.put(an_episode(0)).result(20)
    queue.close()


def test_a_closed_queue_takes_nothing() -> None:
    queue = PublishingQueue(MemoryPublisher(), max_episodes=1, max_bytes=1)
    queue.close()

    with pytest.raises(PublishingStopped):
        queue.put(an_episode(0))


def test_sending_is_repeated_until_the_sink_acknowledges() -> None:
    answers = iter([InfrastructureError("restarting"), InfrastructureError("full"), "acknowledged"])

    def send() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert until_acknowledged(send, threading.Event(), retried=(InfrastructureError,)) == "acknowledged"


def test_a_stopped_worker_tries_once_and_gives_up() -> None:
    tries: list[int] = []
    stop = threading.Event()
    stop.set()

    def send() -> str:
        tries.append(1)
        raise InfrastructureError("restarting")

    with pytest.raises(PublishingStopped):
        until_acknowledged(send, stop, retried=(InfrastructureError,))
    assert len(tries) == 1


def test_an_error_that_no_second_try_would_change_is_raised_at_once() -> None:
    def send() -> str:
        raise TypeError("a bug")

    with pytest.raises(TypeError):
        until_acknowledged(send, threading.Event(), retried=(InfrastructureError,))
