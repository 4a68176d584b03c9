"""The checker finds what it is there for: each violation planted, one at a time, in a history without any."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.chaos.checker import CHECKS, violations
from tests.chaos.history import EpisodeRow, History, Play, Received, Write

JOB, TASK, STEPS = 7, "CartPole-v1", 3


def message(queue: str, row: int, position: int = 0, **fields: Any) -> Received:
    return Received("a", queue, row, position, {"job_id": JOB, **fields})


def steps_of(episode: int, row: int) -> list[Received]:
    return [
        message("episode_step_data", row, step, task_id=TASK, episode_id=episode, step=step)
        for step in range(STEPS)
    ]


def sound() -> History:
    """One job of two episodes, all as it should be; one row was delivered twice, which is allowed."""
    result = message("eval_result", 9)
    episodes = [message("episode_data", 1, number, task_id=TASK, episode_id=number) for number in (0, 1)]
    return History(
        acknowledged={JOB},
        received=[*episodes, *steps_of(0, 2), *steps_of(1, 3), result, *steps_of(1, 3), result],
        statuses={JOB: "COMPLETED"},
        results={JOB: result.message},
        episodes=[EpisodeRow(JOB, TASK, number, True, 3.0, STEPS, None, 100.0 + number) for number in (0, 1)],
        writes=[Write("outcome", JOB, TASK, number, 2, 2, False) for number in (0, 1)],
        plays=[Play(JOB, 0, 99.0), Play(JOB, 1, 99.5), Play(JOB, 1, 100.5)],
        expected={(JOB, TASK, number): (3.0, STEPS) for number in (0, 1)},
    )


def test_a_sound_history_has_no_violation() -> None:
    assert violations(sound()) == []


def lose_the_job(history: History) -> None:
    history.statuses.clear()
    history.results.clear()
    history.received[:] = []
    history.episodes.clear()


def lose_the_result(history: History) -> None:
    history.received[:] = [each for each in history.received if each.queue != "eval_result"]


def change_an_episode(history: History, **fields: Any) -> None:
    history.episodes[1] = replace(history.episodes[1], **fields)


PLANTED: dict[str, tuple[Callable[[History], Any], str]] = {
    "a lost job": (lose_the_job, "job 7 was acknowledged and is not in the database"),
    "an unfinished job": (lambda h: h.statuses.update({JOB: "RUNNING"}), "job 7 ended RUNNING"),
    "a failed job": (lambda h: h.statuses.update({JOB: "FAILED"}), "job 7 ended FAILED"),
    "a result that no consumer got": (lose_the_result, "job 7 has 0 results in the queue"),
    "a result that the database lacks": (lambda h: h.results.clear(), "has no result in the database"),
    "a second result": (lambda h: h.received.append(message("eval_result", 10)), "has 2 results"),
    "another result than the database's": (
        lambda h: h.results.update({JOB: {"job_id": JOB, "score": 1}}),
        "not the one in the database",
    ),
    "a result of nobody's job": (
        lambda h: h.received.append(Received("a", "eval_result", 10, 0, {"job_id": 8})),
        "nobody enqueued it",
    ),
    "a lost episode": (lambda h: h.received.pop(0), "episode CartPole-v1/0 came 0 times"),
    "a doubled episode": (
        lambda h: h.received.append(message("episode_data", 4, task_id=TASK, episode_id=1)),
        "came 2 times",
    ),
    "an episode of no plan": (
        lambda h: h.received.append(message("episode_data", 4, task_id=TASK, episode_id=5)),
        "in no plan",
    ),
    "a lost step": (lambda h: h.received.pop(3), "has 3 steps, and 2 came"),
    "a doubled step": (
        lambda h: h.received.append(
            message("episode_step_data", 3, STEPS, task_id=TASK, episode_id=1, step=2)
        ),
        "came 2 times",
    ),
    "a step in two rows": (lambda h: h.received.extend(steps_of(1, 4)), "came 2 times"),
    "a stale write": (
        lambda h: h.writes.append(Write("outcome", JOB, TASK, 1, 1, 2, False)),
        "written with epoch 1 while 2 was current",
    ),
    "a write over an outcome": (
        lambda h: h.writes.append(Write("outcome", JOB, TASK, 1, 2, 2, True)),
        "written over a final one",
    ),
    "an episode without an outcome": (lambda h: change_an_episode(h, finished=False), "has no outcome"),
    "another return in the last bit": (
        lambda h: change_an_episode(h, episode_return=3.0000000000000004),
        "gave (3.0000000000000004, 3), without faults (3.0, 3)",
    ),
    "a fault that nobody injected": (
        lambda h: change_an_episode(h, fault="crash"),
        "1 episodes have a fault of the submission, to which 0 were done",
    ),
    "a finished episode played again": (lambda h: h.plays.append(Play(JOB, 0, 102.0)), "began again 2.00 s"),
    "a leaked pod": (lambda h: h.leftovers.append("pod submission-1 is left"), "pod submission-1 is left"),
}


@pytest.mark.parametrize("plant", PLANTED)
def test_each_planted_violation_is_caught(plant: str) -> None:
    history = sound()
    spoil, expected = PLANTED[plant]

    spoil(history)

    assert any(expected in violation for violation in violations(history)), violations(history)


def test_a_fault_of_a_submission_that_was_killed_is_none_of_ours() -> None:
    history = sound()
    change_an_episode(history, fault="crash", episode_return=1.0)
    history.done_to_submissions[JOB] = 1

    assert violations(history) == []


def test_every_check_can_fail() -> None:
    seen = set()
    for spoil, _ in PLANTED.values():
        history = sound()
        spoil(history)
        seen |= {check for check in CHECKS if list(check(history))}

    assert seen == set(CHECKS)


def test_rows_of_two_databases_are_two_rows() -> None:
    history = sound()

    history.received.append(replace(history.received[0], database="b"))

    assert violations(history) == ["job 7, episode CartPole-v1/0 came 2 times"]
