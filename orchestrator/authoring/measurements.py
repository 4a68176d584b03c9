"""What can be said of a policy that plays: its actions against their bounds, and its speed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces

from orchestrator.actors.episode_runner import EpisodeLimits
from orchestrator.adapters.benchmarks.spaces import from_wire, leaves, split_chunk
from orchestrator.authoring.findings import Finding, Mark
from orchestrator.authoring.playing import Played
from orchestrator.submission.wire import unpackb

ACTIONS = "actions"
SPEED = "speed"
_SHOWN_CHARACTERS = 80
WARN_ABOVE = 0.5  # of a deadline: other machines are slower, and several episodes share one


def space_in_words(space: Any) -> str:
    """An action space in few words, a part of a composite one after the other."""
    named = {name: _leaf_in_words(leaf) for name, leaf in leaves(space).items()}
    return "; ".join(f"{name}: {words}" if name else words for name, words in named.items())


def _leaf_in_words(leaf: Any) -> str:
    if isinstance(leaf, spaces.Discrete):
        return f"an integer from {leaf.start} to {leaf.start + leaf.n - 1}"
    if isinstance(leaf, spaces.Box):
        low, high = leaf.low.min(), leaf.high.max()
        bounds = "without bounds" if np.isinf(low) and np.isinf(high) else f"from {low:g} to {high:g}"
        return f"{leaf.dtype} {list(leaf.shape)} {bounds}"
    return f"a text of up to {leaf.max_length} characters" if isinstance(leaf, spaces.Text) else str(leaf)


@dataclass(frozen=True, slots=True)
class TaskActions:
    """The actions of a task: how many were played, how many of them clipped, and which was the first.

    `chunk` is the largest number of actions in one answer.
    """

    space: str
    count: int
    clipped: int
    first_clipped: str
    chunk: int


def count_actions(episodes: Sequence[Played], space: Any, horizon: int) -> TaskActions:
    """The actions of these episodes; each was one of the space, or its episode had failed."""
    count, clipped, first, chunk = 0, 0, "", 1
    for played in episodes:
        for step, action, of in _played_actions(played, space, horizon):
            count += 1
            chunk = max(chunk, of)
            if from_wire(space, action).clipped:
                clipped += 1
                episode = f"episode {played.episode.episode_id} of {played.episode.task_id}"
                first = first or f"{episode}, step {step}: {in_words(action)}"
    return TaskActions(space_in_words(space), count, clipped, first, chunk)


def judge_actions(tasks: Sequence[TaskActions], horizon: int) -> Finding:
    """Whether the actions of tasks with one action space stayed within its bounds, and were all played."""
    count, clipped = sum(task.count for task in tasks), sum(task.clipped for task in tasks)
    chunk = max(task.chunk for task in tasks)
    if not clipped and chunk <= horizon:
        return Finding(Mark.OK, ACTIONS, f"{count}, each {tasks[0].space}")
    if not clipped:
        text = f"an answer holds {chunk} actions, of which {horizon} is played before the next observation"
        advice = "return one action; of a chunk, config.action_horizon says how many are played"
        return Finding(Mark.WARNING, ACTIONS, text, advice=advice)
    first = next(task.first_clipped for task in tasks if task.clipped)
    text = f"{clipped} of {count} are out of bounds and were clipped; the first: {first}"
    advice = f"the bounds are {tasks[0].space}: what is clipped is not what the policy meant"
    return Finding(Mark.WARNING, ACTIONS, text, advice=advice)


def _played_actions(played: Played, space: Any, horizon: int) -> Iterator[tuple[int, Any, int]]:
    """Step, action, and the number of actions in the answer that brought it."""
    steps = played.report.finished.steps if played.report.finished else 0
    for exchange in played.exchanges:
        actions = split_chunk(space, unpackb(exchange.actions))
        for index, action in enumerate(actions[:horizon]):
            if exchange.step + index < steps:  # the rest of a chunk that the episode's end cut off
                yield exchange.step + index, action, len(actions)


def in_words(action: Any) -> str:
    """An action in few words: plain numbers, cut where there are many."""
    text = " ".join(str(_plain(action)).split())
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."


def _plain(action: Any) -> Any:
    if isinstance(action, dict):
        return {key: _plain(part) for key, part in action.items()}
    if isinstance(action, list | tuple):
        return [_plain(part) for part in action]
    return action.tolist() if isinstance(action, np.ndarray | np.generic) else action


def judge_speed(episodes: Sequence[Played], limits: EpisodeLimits) -> Finding:
    """How long answers took, against the deadlines. Seconds of this machine, with nothing else to do."""
    seconds = np.array([exchange.seconds for played in episodes for exchange in played.exchanges])
    worst = float(seconds.max())
    slowest = max(played.policy_seconds for played in episodes)
    reset = max(played.reset_seconds for played in episodes)
    text = (
        f"{_time(np.percentile(seconds, 50))} a step (median), {_time(np.percentile(seconds, 99))} (99 %), "
        f"{_time(worst)} at worst; reset {_time(reset)}"
    )
    deadlines = (
        ("a step", worst, limits.step_timeout_seconds),
        ("a reset", reset, limits.reset_timeout_seconds),
        ("an episode", slowest, limits.episode_timeout_seconds),
    )
    for what, taken, limit in deadlines:
        if taken > WARN_ABOVE * limit:
            near = f"; the slowest took {_time(taken)} of the {limit:g} s that {what} may take"
            advice = "other machines are slower, and one process may serve several workers at once"
            return Finding(Mark.WARNING, SPEED, text + near, advice=advice)
    return Finding(Mark.OK, SPEED, f"{text}; a step may take {limits.step_timeout_seconds:g} s")


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{seconds * 1000:.2f} ms" if seconds < 0.01 else f"{seconds * 1000:.0f} ms"
