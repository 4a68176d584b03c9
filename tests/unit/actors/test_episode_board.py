from __future__ import annotations

import pytest

from orchestrator.actors.episode_board import EpisodeBoard
from orchestrator.domain.episodes import EpisodeKey

A, B, C, D, E = (EpisodeKey("task", number) for number in range(5))


def test_episodes_are_handed_out_in_order_and_what_lands_with_an_outcome_is_gone() -> None:
    board = EpisodeBoard([A, B, C])

    assert board.take(0, 2) == [A, B]
    assert board.take(1, 2) == [C]
    assert (board.unfinished, board.is_done) == (3, False)
    board.landed(0)
    board.landed(1)

    assert (board.unfinished, board.is_done) == (0, True)


def test_what_is_to_run_again_comes_first() -> None:
    board = EpisodeBoard([A, B, C, D])
    board.take(0, 2)

    board.landed(0, again=[A, B])

    assert board.take(0, 4) == [A, B, C, D]


def test_only_a_run_beside_another_workers_is_in_company() -> None:
    board = EpisodeBoard([A, B, C, D])

    board.take(0, 2)
    assert board.ran_alone(A)
    assert board.ran_alone(B)
    board.take(1, 1)

    assert not board.ran_alone(A)
    assert not board.ran_alone(B)
    assert not board.ran_alone(C)


def test_the_company_of_an_earlier_run_is_forgotten() -> None:
    board = EpisodeBoard([A, B])
    board.take(0, 1)
    board.take(1, 1)
    board.landed(1)
    assert not board.ran_alone(A)
    board.landed(0, again=[A])

    board.take(0, 1)

    assert board.ran_alone(A)


def test_a_suspect_waits_until_nothing_is_in_flight_and_then_keeps_others_off() -> None:
    board = EpisodeBoard([A, B, C])
    board.take(0, 1)
    board.take(1, 1)

    board.landed(0, alone=[A])
    assert board.take(0, 1) == []
    board.landed(1)
    assert board.take(0, 8) == [A]

    assert board.take(1, 1) == []
    board.landed(0)
    assert board.take(1, 1) == [C]


def test_a_suspect_stays_one_whatever_its_lone_run_gives() -> None:
    board = EpisodeBoard([A, B, C, D])
    board.take(0, 1)
    board.landed(0, alone=[A])
    board.take(0, 1)

    board.landed(0, again=[A])

    assert board.take(1, 8) == [A]
    assert board.take(0, 8) == []


def test_several_suspects_run_one_by_one() -> None:
    board = EpisodeBoard([A, B, C])
    board.take(0, 1)
    board.take(1, 1)
    board.landed(0, alone=[A])
    board.landed(1, alone=[B])

    assert board.take(0, 8) == [B]
    assert board.take(1, 8) == []
    board.landed(0)
    assert board.take(1, 8) == [A]
    board.landed(1)
    assert board.take(0, 8) == [C]


def test_a_suspect_that_is_to_run_alone_once_more_comes_before_the_other_suspects() -> None:
    board = EpisodeBoard([A, B])
    board.take(0, 1)
    board.take(1, 1)
    board.landed(0, alone=[A])
    board.landed(1, alone=[B])

    [first] = board.take(0, 8)
    board.landed(0, alone=[first])

    assert board.take(1, 8) == [first]


def test_one_worker_at_a_time_gets_its_whole_share() -> None:
    board = EpisodeBoard([A, B, C, D, E])
    board.one_worker_at_a_time()

    assert board.take(0, 3) == [A, B, C]
    assert board.take(1, 3) == []
    board.landed(0, again=[C])

    assert board.take(1, 3) == [C, D, E]
    assert board.ran_alone(C)


@pytest.mark.parametrize(
    ("again", "alone"), [([A], [A]), ([A, A], []), ([C], []), ([], [C])], ids=["both", "twice", "new", "odd"]
)
def test_an_episode_is_never_in_two_places(again: list[EpisodeKey], alone: list[EpisodeKey]) -> None:
    board = EpisodeBoard([A, B])
    board.take(0, 2)

    with pytest.raises(AssertionError):
        board.landed(0, again=again, alone=alone)
