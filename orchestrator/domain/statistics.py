"""What the outcomes of a job amount to: success rates with their intervals, mean returns, faults by class."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

from orchestrator.domain.episodes import EpisodeOutcome, FaultClass

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval of a proportion, both ends in [0, 1]."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class TaskSummary:
    """What one task's episodes, or those of all tasks, came to.

    Rates and means are None where no episode can tell: `success_rate`, `interval` and `mean_steps` without
    any episode, `mean_return` as `scored_returns` says. `std_return` is the sample standard deviation
    (n - 1) of the same returns, None below two of them. `faults` lists only classes that occurred.
    `clipped_actions` of the task were out of bounds, in `clipped_episodes` of its episodes.
    """

    task_id: str
    episodes: int
    successes: int
    success_rate: float | None
    interval: Interval | None
    mean_return: float | None
    std_return: float | None
    mean_steps: float | None
    faults: dict[FaultClass, int] = field(default_factory=dict)
    clipped_episodes: int = 0
    clipped_actions: int = 0


def wilson_interval(successes: int, trials: int, confidence: float = CONFIDENCE) -> Interval:
    """Wilson score interval (Wilson 1927, without continuity correction) of a proportion.

    Raises:
        ValueError: no trials, or counts that no experiment can give.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate = successes / trials
    shrink = 1 + z * z / trials
    centre = (rate + z * z / (2 * trials)) / shrink
    half = z / shrink * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    # At the ends the formula gives 0 and 1 exactly; in floats it may miss them by one rounding.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return Interval(low, high)


def succeeded(outcome: EpisodeOutcome) -> bool:
    """Whether the episode counts as a success: a faulted one never does."""
    return outcome.success and outcome.fault is None


def scored_returns(outcomes: Sequence[EpisodeOutcome]) -> list[float] | None:
    """The return that each episode of ONE task counts with, in order.

    A faulted episode counts with the lower of its own partial return and the lowest unfaulted return of the
    task. Otherwise crashing early would beat playing on wherever rewards are negative. None if no episode is
    unfaulted: then nothing bounds what the faulted ones would have lost.
    """
    unfaulted = [outcome.episode_return for outcome in outcomes if outcome.fault is None]
    if not unfaulted:
        return None
    # min() would let a NaN through or not, depending on its place.
    worst = math.nan if any(map(math.isnan, unfaulted)) else min(unfaulted)
    return [
        outcome.episode_return if outcome.fault is None else _lower(outcome.episode_return, worst)
        for outcome in outcomes
    ]


def summarise(outcomes: Sequence[EpisodeOutcome]) -> list[TaskSummary]:
    """One summary a task, in the order in which the tasks first occur: in a ledger's outcomes, the plan's."""
    return [
        _summary(task_id, episodes, scored_returns(episodes))
        for task_id, episodes in _by_task(outcomes).items()
    ]


def overall(outcomes: Sequence[EpisodeOutcome]) -> TaskSummary:
    """The summary of all episodes together, with an empty `task_id`.

    Every episode weighs the same; a plan has the same number of episodes for each task, so for a finished job
    this is also the mean of the tasks' means. `mean_return` is None as soon as one task has none.
    """
    returns: list[float] | None = []
    for episodes in _by_task(outcomes).values():
        scored = scored_returns(episodes)
        returns = None if returns is None or scored is None else returns + scored
    return _summary("", outcomes, returns)


def _by_task(outcomes: Iterable[EpisodeOutcome]) -> dict[str, list[EpisodeOutcome]]:
    tasks: dict[str, list[EpisodeOutcome]] = {}
    for outcome in outcomes:
        tasks.setdefault(outcome.task_id, []).append(outcome)
    return tasks


def _summary(
    task_id: str, outcomes: Sequence[EpisodeOutcome], returns: Sequence[float] | None
) -> TaskSummary:
    count = len(outcomes)
    successes = sum(1 for outcome in outcomes if succeeded(outcome))
    return TaskSummary(
        task_id=task_id,
        episodes=count,
        successes=successes,
        success_rate=successes / count if count else None,
        interval=wilson_interval(successes, count) if count else None,
        mean_return=_mean(returns) if returns else None,
        std_return=_sample_std(returns) if returns else None,
        mean_steps=_mean([outcome.steps for outcome in outcomes]) if count else None,
        faults=_count_faults(outcomes),
        clipped_episodes=sum(1 for outcome in outcomes if outcome.clipped_actions),
        clipped_actions=sum(outcome.clipped_actions for outcome in outcomes),
    )


def _count_faults(outcomes: Iterable[EpisodeOutcome]) -> dict[FaultClass, int]:
    counts = Counter(outcome.fault for outcome in outcomes if outcome.fault is not None)
    return {fault: counts[fault] for fault in FaultClass if counts[fault]}


def _lower(one: float, other: float) -> float:
    return math.nan if math.isnan(one) or math.isnan(other) else min(one, other)


def _mean(values: Sequence[float]) -> float:
    return _sum(values) / len(values)


def _sample_std(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = _mean(values)
    if not math.isfinite(mean):
        return math.nan
    return math.sqrt(_sum([(value - mean) ** 2 for value in values]) / (len(values) - 1))


def _sum(values: Sequence[float]) -> float:
    """Exactly rounded, so the order in which workers finish never shows in a mean."""
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # beyond the largest float, or +inf and -inf together
        return sum(values)
