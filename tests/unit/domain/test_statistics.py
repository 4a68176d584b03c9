import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.domain.episodes import FaultClass
from orchestrator.domain.statistics import overall, scored_returns, summarise, wilson_interval
from tests.episode_outcomes import outcome


# Newcombe 1998 ("Two-sided confidence intervals for the single proportion"), table I, method 3.
@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_wilson_interval_matches_published_values(
    successes: int, trials: int, low: float, high: float
) -> None:
    interval = wilson_interval(successes, trials)

    assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_wilson_interval_holds_the_rate_and_mirrors_for_failures(counts: tuple[int, int]) -> None:
    successes, trials = counts

    interval = wilson_interval(successes, trials)
    mirrored = wilson_interval(trials - successes, trials)

    assert 0.0 <= interval.low <= successes / trials <= interval.high <= 1.0
    assert interval.low < interval.high
    assert math.isclose(interval.low, 1.0 - mirrored.high, abs_tol=1e-12)


def test_all_successes_reach_one_exactly_and_all_failures_zero() -> None:
    for trials in range(1, 2000):
        assert wilson_interval(trials, trials).high == 1.0
        assert wilson_interval(0, trials).low == 0.0


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (2, 1), (-1, 5)])
def test_counts_that_no_experiment_gives_are_refused(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match="successes of"):
        wilson_interval(successes, trials)


def test_a_faulted_episode_is_a_failure_whatever_it_says() -> None:
    (summary,) = summarise([outcome(), outcome(success=True, fault=FaultClass.CRASH)])

    assert (summary.successes, summary.success_rate) == (1, 0.5)


def test_crashing_early_never_beats_playing_on_where_rewards_are_negative() -> None:
    played = [outcome(episode_return=-100.0), outcome(episode_return=-300.0)]
    crashed = outcome(episode_return=-1.0, fault=FaultClass.CRASH)

    assert scored_returns([*played, crashed]) == [-100.0, -300.0, -300.0]


def test_a_faulted_episode_keeps_its_own_return_where_that_is_lower() -> None:
    returns = scored_returns(
        [outcome(episode_return=5.0), outcome(episode_return=2.0, fault=FaultClass.CRASH)]
    )

    assert returns == [5.0, 2.0]


def test_a_fault_counts_with_the_worst_of_its_own_task_only() -> None:
    summaries = summarise(
        [
            outcome("mild", -1.0),
            outcome("mild", 0.0, fault=FaultClass.CRASH),
            outcome("harsh", -1000.0),
        ]
    )

    assert [summary.mean_return for summary in summaries] == [-1.0, -1000.0]


def test_a_task_without_an_unfaulted_episode_has_no_mean_return_and_so_has_the_whole() -> None:
    outcomes = [outcome("fine", 3.0), outcome("broken", 9.0, fault=FaultClass.STEP_TIMEOUT)]

    summaries = summarise(outcomes)
    total = overall(outcomes)

    assert [summary.mean_return for summary in summaries] == [3.0, None]
    assert (total.mean_return, total.std_return, total.success_rate) == (None, None, 0.5)


def test_tasks_stand_in_plan_order_and_their_faults_are_counted_by_class() -> None:
    summaries = summarise(
        [
            outcome("zebra"),
            outcome("ant", fault=FaultClass.CRASH),
            outcome("ant", fault=FaultClass.CRASH),
            outcome("ant", fault=FaultClass.INVALID_ACTION),
        ]
    )

    assert [summary.task_id for summary in summaries] == ["zebra", "ant"]
    assert summaries[0].faults == {}
    assert summaries[1].faults == {FaultClass.CRASH: 2, FaultClass.INVALID_ACTION: 1}


def test_mean_and_sample_deviation_are_those_of_the_returns() -> None:
    (summary,) = summarise(
        [outcome(episode_return=value, steps=steps) for value, steps in [(2, 1), (4, 2), (9, 6)]]
    )

    assert summary.mean_return == 5.0
    assert summary.std_return == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
    assert summary.mean_steps == 3.0


def test_one_return_has_no_deviation() -> None:
    assert summarise([outcome()])[0].std_return is None


def test_no_outcomes_give_an_overall_summary_that_knows_nothing() -> None:
    total = overall([])

    assert total.episodes == 0
    assert (total.success_rate, total.interval, total.mean_return, total.mean_steps) == (
        None,
        None,
        None,
        None,
    )


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1), st.randoms())
def test_the_order_of_episodes_never_shows_in_a_mean(values: list[float], random) -> None:
    shuffled = values.copy()
    random.shuffle(shuffled)

    one, other = (overall([outcome(episode_return=value) for value in order]) for order in (values, shuffled))

    assert (one.mean_return, one.std_return) == (other.mean_return, other.std_return)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_returns_that_are_not_finite_show_in_the_mean_and_raise_nothing(odd: float) -> None:
    values = [odd, 1.0, -odd]

    (summary,) = summarise(
        [*(outcome(episode_return=value) for value in values), outcome(fault=FaultClass.CRASH)]
    )

    assert summary.mean_return is not None
    assert not math.isfinite(summary.mean_return)


def test_huge_returns_do_not_overflow_into_an_error() -> None:
    (summary,) = summarise([outcome(episode_return=1.7e308), outcome(episode_return=1.7e308)])

    assert summary.mean_return is not None
