"""A replay: what was recorded of an episode, what its actions give now, and how the two differ."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from orchestrator.domain.episodes import EpisodeKey, FaultClass


@dataclass(frozen=True, slots=True)
class RecordedEpisode:
    """An outcome of the ledger with the actions that led to it, unless these were too large to be kept."""

    key: EpisodeKey
    seed: int
    episode_return: float
    steps: int
    success: bool
    terminated: bool
    truncated: bool
    fault: FaultClass | None
    action_trace_sha256: str
    action_trace: bytes | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class Playback:
    """What came of playing recorded actions. `stopped_by` says why not all of them could be played.

    `stored_sha256` is the hash of the actions as they are stored, `played_sha256` that of those played.
    """

    episode_return: float
    steps: int
    success: bool
    terminated: bool
    truncated: bool
    stored_sha256: str
    played_sha256: str
    stopped_by: str | None = None


class Aspect(StrEnum):
    """What is compared."""

    STORED_ACTIONS = "sha256 of the stored actions"
    PLAYED_ACTIONS = "sha256 of the played actions"
    RETURN = "return"
    STEPS = "steps"
    SUCCESS = "success"
    TERMINATED = "terminated"
    TRUNCATED = "truncated"


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as it was recorded; in words, numbers with all their digits."""

    what: Aspect
    recorded: str
    now: str


class Verdict(StrEnum):
    """What a replay shows."""

    EQUAL = "equal"  # bit for bit
    DIFFERS = "differs"
    IMPOSSIBLE = "impossible"


@dataclass(frozen=True, slots=True)
class EpisodeReplay:
    """What a replay showed. `remark` says why it is IMPOSSIBLE, or what a second replay of DIFFERS showed."""

    recorded: RecordedEpisode
    verdict: Verdict
    playback: Playback | None = None
    differences: tuple[Difference, ...] = ()
    remark: str = ""


def differences(recorded: RecordedEpisode, playback: Playback) -> tuple[Difference, ...]:
    """Everything in which they differ, the most telling first; empty where they are equal bit for bit.

    A fault makes an episode a failure whatever its steps were: the success of a faulted one is not compared.
    """
    return tuple(_differences(recorded, playback))


def _differences(recorded: RecordedEpisode, playback: Playback) -> Iterator[Difference]:
    if playback.stored_sha256 != recorded.action_trace_sha256:
        yield Difference(Aspect.STORED_ACTIONS, recorded.action_trace_sha256, playback.stored_sha256)
    elif playback.played_sha256 != recorded.action_trace_sha256 and playback.steps == recorded.steps:
        yield Difference(Aspect.PLAYED_ACTIONS, recorded.action_trace_sha256, playback.played_sha256)
    if not same_number(recorded.episode_return, playback.episode_return):
        yield Difference(Aspect.RETURN, repr(recorded.episode_return), repr(playback.episode_return))
    if recorded.steps != playback.steps:
        yield Difference(Aspect.STEPS, str(recorded.steps), str(playback.steps))
    if recorded.fault is None and recorded.success != playback.success:
        yield Difference(Aspect.SUCCESS, _yes(recorded.success), _yes(playback.success))
    for what in (Aspect.TERMINATED, Aspect.TRUNCATED):
        before, now = getattr(recorded, what), getattr(playback, what)
        if before != now:
            yield Difference(what, _yes(before), _yes(now))


def playbacks_differ(one: Playback, other: Playback) -> bool:
    """Whether the same actions led to something else."""
    same_steps = (one.steps, one.success, one.terminated, one.truncated, one.played_sha256) == (
        other.steps,
        other.success,
        other.terminated,
        other.truncated,
        other.played_sha256,
    )
    return not (same_steps and same_number(one.episode_return, other.episode_return))


def same_number(one: float, other: float) -> bool:
    """Whether two numbers have the same bits: a NaN equals itself, and 0.0 is not -0.0."""
    return struct.pack("<d", one) == struct.pack("<d", other)


def _yes(value: bool) -> str:
    return "yes" if value else "no"
