"""Episodes: the plan with its seeds, the runs that are handed out, and what came of them."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

SEED_BITS = 31


class FaultClass(StrEnum):
    """Why an episode is a failure through the submission's fault."""

    CRASH = "crash"
    OUT_OF_MEMORY = "out_of_memory"
    OUT_OF_DISK = "out_of_disk"
    CONNECTION_LOST = "connection_lost"
    PROTOCOL_ERROR = "protocol_error"
    POLICY_EXCEPTION = "policy_exception"
    NON_FINITE_ACTION = "non_finite_action"
    INVALID_ACTION = "invalid_action"
    STEP_TIMEOUT = "step_timeout"
    EPISODE_TIMEOUT = "episode_timeout"


@dataclass(frozen=True, slots=True, order=True)
class EpisodeKey:
    """Names one episode of a job."""

    task_id: str
    episode_id: int


@dataclass(frozen=True, slots=True)
class PlannedEpisode:
    """One episode of the plan. Seeds are integers of 31 bits.

    `seed` resets the environment and is never sent to the submission; `policy_seed` is what the submission's
    `reset(episode, seed)` receives.
    """

    task_id: str
    episode_id: int
    seed: int
    policy_seed: int

    @property
    def key(self) -> EpisodeKey:
        return EpisodeKey(self.task_id, self.episode_id)


@dataclass(frozen=True, slots=True)
class EpisodeRun:
    """One hand-out of an episode to a worker. A later `run` or `epoch` makes this one void."""

    job_id: int
    epoch: int
    run: int
    task_id: str
    episode_id: int
    seed: int
    policy_seed: int

    @property
    def key(self) -> EpisodeKey:
        return EpisodeKey(self.task_id, self.episode_id)


@dataclass(frozen=True, slots=True)
class FinishedEpisode:
    """The outcome of an episode run with its telemetry, ready to be committed whole.

    `action_trace` is the zlib-compressed concatenation of the actions as msgpack values on the policy wire;
    `action_trace_sha256` is the hex digest of the uncompressed bytes. `episode_message` and each item of
    `step_messages` are UTF-8 JSON objects. `staged_parts` counts the parts of step messages that were staged
    before (episodes above the byte cap); `step_messages` then holds only the rest.
    """

    run: EpisodeRun
    episode_return: float
    steps: int
    success: bool
    terminated: bool
    truncated: bool
    fault: FaultClass | None
    fault_detail: str | None
    started_at: datetime
    ended_at: datetime
    action_trace: bytes
    action_trace_sha256: str
    episode_message: bytes
    step_messages: tuple[bytes, ...] = field(default=(), repr=False)
    staged_parts: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


class CommitOutcome(StrEnum):
    """What the ledger did with a finished episode."""

    COMMITTED = "committed"
    ALREADY = "already"  # this very run was committed before: a re-send
    STALE = "stale"  # epoch or run is not current, or another run has the outcome: nothing was written


@dataclass(frozen=True, slots=True)
class EpisodeOutcome:
    """A row of the ledger that has an outcome.

    `clipped_actions` counts the actions that were out of bounds and played clipped.
    """

    task_id: str
    episode_id: int
    seed: int
    run: int
    episode_return: float
    steps: int
    success: bool
    terminated: bool
    truncated: bool
    fault: FaultClass | None
    fault_detail: str | None
    started_at: datetime
    ended_at: datetime
    action_trace_sha256: str
    clipped_actions: int = 0


def shortened(text: str, limit: int) -> str:
    """At most `limit` characters: of a fault's words the first say where, and the last what."""
    if len(text) <= limit:
        return text
    gap = "\n[...]\n"
    head = (limit - len(gap)) // 2
    return text[:head] + gap + text[len(text) - (limit - len(gap) - head) :]


def derive_seed(secret: bytes, seed_group: str, purpose: str, task_id: str, episode_id: int) -> int:
    """A seed of 31 bits, HMAC-SHA256 (RFC 2104) of what it is for, keyed with `secret`.

    Equal for all submissions of one seed group, and not to be predicted without the secret. `purpose` keeps
    the seed that a submission is told apart from the one that resets its environment.
    """
    text = "\x1f".join((seed_group, purpose, task_id, str(episode_id)))
    digest = hmac.new(secret, text.encode(), hashlib.sha256).digest()
    return int.from_bytes(digest[:4], "big") & ((1 << SEED_BITS) - 1)


def open_secret(seed: int) -> bytes:
    """The key that `config.seed` stands for: public on purpose, so that anyone can repeat the run."""
    return f"orchestrator-open-seed-{seed}".encode()


def plan_episodes(
    task_ids: Iterable[str], episodes_per_task: int, *, secret: bytes, seed_group: str
) -> list[PlannedEpisode]:
    """Every (task, episode) with its seeds, task by task in the given order."""
    return [
        PlannedEpisode(
            task_id=task_id,
            episode_id=episode_id,
            seed=derive_seed(secret, seed_group, "environment", task_id, episode_id),
            policy_seed=derive_seed(secret, seed_group, "policy", task_id, episode_id),
        )
        for task_id in task_ids
        for episode_id in range(episodes_per_task)
    ]
