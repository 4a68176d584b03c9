"""Tells from several runs of one episode whether its actions depend on something that they must not.

The runs: in one instance before and after other episodes, in another instance of the same process, and in
another process. Who differs from whom says where the policy keeps what it should not keep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.authoring.findings import Finding, Mark
from orchestrator.authoring.measurements import in_words
from orchestrator.authoring.playing import Played
from orchestrator.submission.wire import unpackb

FORGETS = "forgets"
REPEATS = "repeats"

# What rounding does when sums are taken in another order, as GPUs and threaded libraries do.
_ROUNDING_RELATIVE = 1e-4
_ROUNDING_ABSOLUTE = 1e-6


@dataclass(frozen=True, slots=True)
class Words:
    """How to speak of instances, and what to tell whom to do."""

    fresh: str
    reset: str
    shared: str
    seed: str


OF_AN_AGENT = Words(
    fresh="a fresh instance",
    reset="set back everything that act() remembers in reset(self, episode, seed): "
    "it is called before each episode",
    shared="keep state in self, not in variables of a module or a class, and draw random numbers from a "
    "generator made in reset: self.random = numpy.random.default_rng(seed)",
    seed="draw random numbers only from a generator made in reset(self, episode, seed): "
    "self.random = numpy.random.default_rng(seed)",
)
OF_A_SERVER = Words(
    fresh="a fresh connection",
    reset="forget all of an episode when the next begins: at a reset, or with the connection",
    shared="keep what belongs to an episode apart for each connection",
    seed="seed the random numbers of each connection with the seed of the reset",
)
_PROCESS_ADVICE = (
    "look for what is random when the code is loaded: weights that are drawn instead of read from a file, "
    "the order of a set, the clock"
)


@dataclass(frozen=True, slots=True)
class Repetitions:
    """Runs of one episode; `other_process` is None where there is but one, which somebody else runs.

    `orders` are runs of further episodes: each one twice, by two instances, after different episodes.
    `steps` is how many steps of the first episode the later runs played; None: all.
    """

    first: Played
    same_instance: Played
    other_instance: Played
    other_process: Played | None
    orders: tuple[tuple[Played, Played], ...] = ()
    steps: int | None = None
    words: Words = OF_AN_AGENT


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two runs part. `by_the_benchmark`: the observations differ first, though no action did."""

    step: int
    first: Any
    second: Any
    by_the_benchmark: bool = False

    @property
    def is_rounding(self) -> bool:
        """Whether the actions differ in their last digits only."""
        try:
            one, other = np.asarray(self.first), np.asarray(self.second)
        except (ValueError, TypeError):
            return False
        if one.dtype.kind != "f" or other.dtype.kind != "f" or one.shape != other.shape:
            return False
        return bool(np.allclose(one, other, rtol=_ROUNDING_RELATIVE, atol=_ROUNDING_ABSOLUTE))

    def __str__(self) -> str:
        return f"step {self.step}: first {in_words(self.first)}, then {in_words(self.second)}"


def first_difference(one: Played, other: Played) -> Difference | None:
    """Where the second run leaves the first; None where it does not, as far as both go."""
    for left, right in zip(one.exchanges, other.exchanges, strict=False):
        if left.observation_sha256 != right.observation_sha256:
            return Difference(left.step, None, None, by_the_benchmark=True)
        if left.actions != right.actions:
            return Difference(left.step, unpackb(left.actions), unpackb(right.actions))
    return None


def judge_repetitions(runs: Repetitions) -> list[Finding]:
    """Whether the policy forgets an episode when the next begins, and repeats itself for the same seed."""
    after_others = first_difference(runs.first, runs.same_instance)
    in_other_instance = first_difference(runs.first, runs.other_instance)
    in_other_process = (
        None if runs.other_process is None else first_difference(runs.first, runs.other_process)
    )
    by_order = _first_by_order(runs)
    differences = [each for each in (after_others, in_other_instance, in_other_process, by_order) if each]
    if any(each.by_the_benchmark for each in differences):
        why = "the benchmark itself does not repeat: the same actions led to other observations"
        return [Finding(Mark.SKIPPED, FORGETS, why), Finding(Mark.SKIPPED, REPEATS, why)]
    if differences and all(each.is_rounding for each in differences):
        return _rounding(differences[0])
    if after_others and in_other_instance is None:
        return [_keeps_state(runs, after_others), _across_processes(runs, in_other_process)]
    is_shared = runs.other_process is not None and in_other_process is None
    if after_others and is_shared:
        return [_keeps_state_in_the_process(runs, after_others)]
    if by_order and not in_other_instance and not in_other_process:
        return [_depends_on_the_order(runs, by_order), _across_processes(runs, None)]
    forgets = _cannot_tell() if after_others else _forgets(runs)
    if in_other_instance:
        judge = _instances_share if is_shared else _is_random
        return [forgets, judge(runs, in_other_instance)]
    return [forgets, _across_processes(runs, in_other_process)]


def _forgets(runs: Repetitions) -> Finding:
    text = f"an episode that is played again after others has the same actions{_extent(runs)}"
    return Finding(Mark.OK, FORGETS, text)


def _across_processes(runs: Repetitions, difference: Difference | None) -> Finding:
    if difference is None:
        gives = " gives" if runs.other_process is None else " and a fresh process give"
        text = f"{runs.words.fresh}{gives} the same actions for the same seed{_extent(runs)}"
        return Finding(Mark.OK, REPEATS, text)
    text = (
        f"different actions for the same seed in another process: it plays {_episode(runs)} "
        f"otherwise from {difference}"
    )
    return Finding(Mark.WRONG, REPEATS, text, advice=_PROCESS_ADVICE)


def _keeps_state(runs: Repetitions, difference: Difference) -> Finding:
    text = (
        f"state is kept across episodes: played again after other episodes, {_episode(runs)} has other "
        f"actions from {difference}; {runs.words.fresh} gives the first ones"
    )
    return Finding(Mark.WRONG, FORGETS, text, advice=runs.words.reset)


def _keeps_state_in_the_process(runs: Repetitions, difference: Difference) -> Finding:
    text = (
        f"state is kept across episodes, and shared by all instances: played again after other episodes, "
        f"{_episode(runs)} has other actions from {difference}; only a fresh process gives the first ones"
    )
    return Finding(Mark.WRONG, FORGETS, text, advice=runs.words.shared)


def _first_by_order(runs: Repetitions) -> Difference | None:
    found = (first_difference(one, other) for one, other in runs.orders)
    return next((difference for difference in found if difference is not None), None)


def _depends_on_the_order(runs: Repetitions, difference: Difference) -> Finding:
    pairs = (one for one, other in runs.orders if first_difference(one, other))
    episode = next(pairs).episode
    text = (
        f"state is kept across episodes: episode {episode.episode_id} of {episode.task_id} has other actions "
        f"when other episodes were played before it, from {difference}"
    )
    return Finding(Mark.WRONG, FORGETS, text, advice=runs.words.reset)


def _cannot_tell() -> Finding:
    return Finding(Mark.SKIPPED, FORGETS, "cannot be told while the same seed gives different actions")


def _instances_share(runs: Repetitions, difference: Difference) -> Finding:
    text = (
        f"a second instance of the same process has other actions for {_episode(runs)} from {difference}; "
        "a fresh process gives the first ones"
    )
    return Finding(Mark.WRONG, REPEATS, text, advice=runs.words.shared)


def _is_random(runs: Repetitions, difference: Difference) -> Finding:
    text = (
        f"different actions for the same seed: {runs.words.fresh} plays {_episode(runs)} "
        f"otherwise from {difference}"
    )
    return Finding(Mark.WRONG, REPEATS, text, advice=runs.words.seed)


def _rounding(difference: Difference) -> list[Finding]:
    text = f"the last digits of actions vary from run to run, from {difference}"
    advice = "returns may vary a little with them; computing in a fixed order, or on one thread, avoids it"
    why = "cannot be told while the last digits of actions vary"
    return [Finding(Mark.SKIPPED, FORGETS, why), Finding(Mark.WARNING, REPEATS, text, advice=advice)]


def _episode(runs: Repetitions) -> str:
    episode = runs.first.episode
    return f"episode {episode.episode_id} of {episode.task_id}"


def _extent(runs: Repetitions) -> str:
    return "" if runs.steps is None else f" (its first {runs.steps} steps)"
