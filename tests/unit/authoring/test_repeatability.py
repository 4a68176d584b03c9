"""Which run differs from which says where a policy keeps what it should not keep."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from orchestrator.actors.episode_runner import RunKind, RunReport
from orchestrator.authoring.findings import Mark
from orchestrator.authoring.playing import Exchange, Played
from orchestrator.authoring.repeatability import OF_A_SERVER, Repetitions, judge_repetitions
from orchestrator.domain.episodes import EpisodeRun, PlannedEpisode
from orchestrator.submission.wire import packb

EPISODE = PlannedEpisode("CartPole-v1", 0, 1, 2)


def played(*actions: Any, observations: bytes = b"") -> Played:
    seen = observations or bytes(len(actions))
    run = EpisodeRun(0, 1, 1, EPISODE.task_id, EPISODE.episode_id, EPISODE.seed, EPISODE.policy_seed)
    exchanges = [
        Exchange(step, seen[step : step + 1], packb(action), 0.001) for step, action in enumerate(actions)
    ]
    return Played(EPISODE, RunReport(run, RunKind.FINISHED), tuple(exchanges), 0.0)


A, B, C, D = played(0, 0), played(0, 1), played(1, 0), played(1, 1)


@pytest.mark.parametrize(
    ("runs", "marks", "words"),
    [
        ((A, A, A, A), {"forgets": Mark.OK, "repeats": Mark.OK}, "fresh process give"),
        ((A, B, A, A), {"forgets": Mark.WRONG, "repeats": Mark.OK}, "from step 1: first 0, then 1"),
        ((A, B, A, C), {"forgets": Mark.WRONG, "repeats": Mark.WRONG}, "in another process"),
        ((A, B, C, A), {"forgets": Mark.WRONG}, "shared by all instances"),
        ((A, B, C, D), {"forgets": Mark.SKIPPED, "repeats": Mark.WRONG}, "different actions for the same"),
        ((A, A, B, A), {"forgets": Mark.OK, "repeats": Mark.WRONG}, "second instance of the same process"),
        ((A, A, B, C), {"forgets": Mark.OK, "repeats": Mark.WRONG}, "a fresh instance plays"),
        ((A, A, A, B), {"forgets": Mark.OK, "repeats": Mark.WRONG}, "in another process"),
    ],
)
def test_the_runs_tell_where_the_policy_keeps_what(
    runs: tuple[Played, Played, Played, Played], marks: dict[str, Mark], words: str
) -> None:
    findings = judge_repetitions(Repetitions(*runs))

    assert {finding.name: finding.mark for finding in findings} == marks
    assert words in " ".join(finding.text for finding in findings)


@pytest.mark.parametrize(
    ("again", "fresh", "marks"),
    [
        (A, A, [Mark.OK, Mark.OK]),
        (B, A, [Mark.WRONG, Mark.OK]),
        (B, C, [Mark.SKIPPED, Mark.WRONG]),
        (A, B, [Mark.OK, Mark.WRONG]),
    ],
)
def test_of_a_server_only_its_connections_are_compared(
    again: Played, fresh: Played, marks: list[Mark]
) -> None:
    findings = judge_repetitions(Repetitions(A, again, fresh, None, words=OF_A_SERVER))

    assert [finding.mark for finding in findings] == marks
    assert "instance" not in " ".join(finding.text for finding in findings)


def test_state_that_the_first_episode_does_not_show_is_found_by_another_one() -> None:
    findings = judge_repetitions(Repetitions(A, A, A, A, orders=((B, B), (C, D), (A, B))))

    assert [finding.mark for finding in findings] == [Mark.WRONG, Mark.OK]
    assert "when other episodes were played before it, from step 1: first 0, then 1" in findings[0].text


def test_chance_is_not_taken_for_state() -> None:
    findings = judge_repetitions(Repetitions(A, A, B, C, orders=((B, D),)))

    assert [finding.mark for finding in findings] == [Mark.OK, Mark.WRONG]


def test_a_benchmark_that_does_not_repeat_is_not_held_against_the_policy() -> None:
    other = played(0, 1, observations=b"\0\1")

    findings = judge_repetitions(Repetitions(A, other, A, A))

    assert {finding.mark for finding in findings} == {Mark.SKIPPED}


def test_last_digits_are_a_warning_and_larger_differences_are_not() -> None:
    first = played(np.float32([0.5]))
    rounded, other = played(np.float32([0.5000001])), played(np.float32([0.51]))

    close = judge_repetitions(Repetitions(first, rounded, rounded, rounded))
    far = judge_repetitions(Repetitions(first, other, other, other))

    assert [finding.mark for finding in close] == [Mark.SKIPPED, Mark.WARNING]
    assert Mark.WRONG in [finding.mark for finding in far]


def test_runs_that_were_cut_are_compared_as_far_as_they_go() -> None:
    findings = judge_repetitions(Repetitions(A, played(0), played(0), played(0), steps=1))

    assert {finding.mark for finding in findings} == {Mark.OK}
    assert all("(its first 1 steps)" in finding.text for finding in findings)
