"""Writes a first submission: one that plays well where we know how, else one that acts by chance."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from orchestrator.adapters.benchmarks.registry import load_benchmark
from orchestrator.adapters.benchmarks.spaces import leaves
from orchestrator.authoring.measurements import space_in_words
from orchestrator.domain.errors import UsageError
from orchestrator.ports import Environment

CARTPOLE = "gymnasium/CartPole-v1"
ENTRY_POINT = "agent.py"
MOST_BOUNDS = 16

RANDOM_AGENT = '''\
"""A submission for {benchmark} that acts by chance. Make it better.

A submission is this file. What it may import, read and keep in mind: docs/submissions.md of Orchestrator.

{observation}

{action}
"""

import numpy as np


class Agent:
    """What the evaluation calls. It makes several instances in one process, one for each of its workers."""

    def __init__(self):
        """Called once for each instance: read weights here, from files beside this one."""
        self.random = np.random.default_rng(0)

    def reset(self, episode, seed):
        """An episode begins. Forget the last one, and draw random numbers from `seed` alone."""
        self.random = np.random.default_rng(seed)

    def act(self, observation):
        """The action for one observation."""
        return {expression}
'''


@dataclass(frozen=True, slots=True)
class FirstSubmission:
    """The source of an `agent.py`, what it does in few words, and the config that its benchmark needs."""

    source: str
    does: str
    config: str = ""


def first_submission(benchmark: str) -> FirstSubmission:
    """A first agent for the benchmark, given as PROVIDER/NAME.

    Raises:
        UsageError: there is no such benchmark, or its spaces have no form on the policy wire.
    """
    if benchmark == CARTPOLE:
        template = resources.files("orchestrator.authoring") / "templates" / "cartpole_agent.txt"
        return FirstSubmission(template.read_text(), "keeps the pole of CartPole-v1 up")
    provider, _, name = benchmark.partition("/")
    if not name:
        raise UsageError(f"{benchmark!r} names no benchmark: write PROVIDER/NAME, like {CARTPOLE}")
    # Also what has no rule of success can be played for its returns.
    loaded = load_benchmark(provider, name, {"score": "avg_reward"}, None)
    environment = loaded.make(loaded.task_ids[0])
    try:
        source = _random_agent(benchmark, environment)
    finally:
        environment.close()
    return FirstSubmission(source, f"acts by chance on {benchmark}", _needed_config(provider, name))


def _needed_config(provider: str, name: str) -> str:
    try:
        load_benchmark(provider, name, {}, None)
    except UsageError:
        return "score=avg_reward"
    return ""


def write_submission(directory: Path, submission: FirstSubmission) -> Path:
    """Write it into a new or empty directory; the path of the file.

    Raises:
        UsageError: something is there already, or it cannot be written.
    """
    path = directory / ENTRY_POINT
    try:
        directory.mkdir(parents=True, exist_ok=True)
        there = sorted((entry.name for entry in directory.iterdir()), key=_telling_first)
        if there:
            raise UsageError(
                f"{directory} is not empty, it holds {there[0]}: name a new directory, or an empty one"
            )
        path.write_text(submission.source, encoding="utf-8")
    except FileExistsError:
        raise UsageError(f"{directory} is a file: name a new directory, or an empty one") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error
    return path


def _random_agent(benchmark: str, environment: Environment) -> str:
    return RANDOM_AGENT.format(
        benchmark=benchmark,
        observation=_observation_in_words(environment.observation_space),
        action=f"An action is {_parts_in_words(environment.action_space)}",
        expression=_random_action(environment.action_space),
    )


def _observation_in_words(space: Any) -> str:
    names = list(leaves(space))
    if names in ([""], ["observation"]):
        return f"An observation is {space_in_words(leaves(space)[names[0]])}."
    return f"An observation is {_parts_in_words(space)}"


def _parts_in_words(space: Any) -> str:
    parts = leaves(space)
    if list(parts) == [""]:
        return f"{space_in_words(space)}."
    lines = [f"    {name!r}: {space_in_words(leaf)}" for name, leaf in parts.items()]
    return "\n".join(["a dict of", *lines])


def _random_action(space: Any) -> str:
    parts = leaves(space)
    if list(parts) == [""]:
        return _random_part(space)
    lines = [f"            {name!r}: {_random_part(leaf)}," for name, leaf in parts.items()]
    return "\n".join(["{", *lines, "        }"])


def _random_part(leaf: Any) -> str:
    """An expression that draws from a plain space with `self.random`."""
    if isinstance(leaf, spaces.Discrete):
        return f"int(self.random.integers({leaf.start}, {leaf.start + leaf.n}))"
    if isinstance(leaf, spaces.MultiDiscrete):
        return f"self.random.integers({leaf.start.tolist()}, {(leaf.start + leaf.nvec).tolist()})"
    if isinstance(leaf, spaces.MultiBinary):
        return f"self.random.integers(0, 2, {tuple(leaf.shape)})"
    if isinstance(leaf, spaces.Text):
        return repr(sorted(leaf.character_list)[0] * max(1, leaf.min_length))
    low, high, shape = _bounds(leaf)
    if leaf.dtype.kind in "iu":
        return f"self.random.integers({low}, {high}, {shape}, endpoint=True)"
    return f'self.random.uniform({low}, {high}, {shape}).astype("{leaf.dtype}")'


def _bounds(box: spaces.Box) -> tuple[Any, Any, tuple[int, ...]]:
    """Lower and upper bounds to draw between: numbers, or lists where they differ; none becomes ±1."""
    low, high, plain = box.low, box.high, int if box.dtype.kind in "iu" else float
    if plain is float:
        low = np.where(np.isfinite(low), low, np.minimum(-1, high))
        high = np.where(np.isfinite(high), high, np.maximum(1, low))
    if low.size <= MOST_BOUNDS and not (np.ptp(low) == 0 and np.ptp(high) == 0):
        return low.astype(plain).tolist(), high.astype(plain).tolist(), tuple(box.shape)
    return plain(low.max()), plain(high.min()), tuple(box.shape)


def _telling_first(name: str) -> tuple[bool, str]:
    # What a machine left (.git, __pycache__) last: a person looks for what a person wrote.
    return name.startswith((".", "_")), name
