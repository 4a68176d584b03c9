"""In-process stand-ins for what a rollout worker talks to: policies, an environment, a sink."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np

from orchestrator.actors.episode_logger import EpisodeLogger
from orchestrator.actors.episode_runner import EpisodeLimits
from orchestrator.domain.episodes import CommitOutcome, EpisodeKey, EpisodeRun, FinishedEpisode
from orchestrator.domain.messages import EvalJobMessage
from orchestrator.ports import EpisodeSummary, Observation, StepResult

LIMITS = EpisodeLimits(step_timeout_seconds=5.0, episode_timeout_seconds=60.0, reset_timeout_seconds=7.0)
CARTPOLE = "CartPole-v1"


def a_job(**config: Any) -> EvalJobMessage:
    return EvalJobMessage(
        job_id=7,
        submission_id="sübmission",
        env_provider="gymnasium",
        benchmark_name=CARTPOLE,
        config=config,
    )


def a_run(task_id: str = CARTPOLE, episode_id: int = 3, seed: int = 11, run: int = 1) -> EpisodeRun:
    return EpisodeRun(
        job_id=7,
        epoch=2,
        run=run,
        task_id=task_id,
        episode_id=episode_id,
        seed=seed,
        policy_seed=seed + 1000,
    )


def never_stage(run: EpisodeRun, part: int, messages: Sequence[bytes]) -> None:
    raise AssertionError("nothing was to be staged")


def a_logger(run: EpisodeRun | None = None, **options: Any) -> EpisodeLogger:
    settings: dict[str, Any] = {"step_log_interval": 1, "byte_cap": 2**20, "stage": never_stage}
    return EpisodeLogger(a_job(), run or a_run(), "env/name", **settings | options)


def balance(observation: Observation) -> int:
    """A good CartPole policy: push to the side that the pole falls to."""
    position, velocity, angle, spin = observation["observation"]
    return int(angle + spin + 0.1 * velocity + 0.05 * position > 0)


@dataclass
class FakePolicy:
    """A connection to a policy that is a function. An exception in place of a reply is raised."""

    reply: Callable[[Observation], Any] = balance
    supports_reset: bool = True
    metadata: Mapping[str, Any] = field(default_factory=dict)
    resets: list[tuple[int, int, float]] = field(default_factory=list)
    timeouts: list[float] = field(default_factory=list)
    reset_error: Exception | None = None
    closed: bool = False

    def reset(self, episode: int, seed: int, timeout_seconds: float) -> None:
        assert not self.closed
        self.resets.append((episode, seed, timeout_seconds))
        if self.reset_error is not None:
            raise self.reset_error

    def act(self, observation: Observation, timeout_seconds: float) -> Any:
        assert not self.closed
        self.timeouts.append(timeout_seconds)
        reply = self.reply(observation)
        if isinstance(reply, Exception):
            raise reply
        return reply

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeConnector:
    """Opens connections made by `make`; an exception in place of a connection is raised."""

    make: Callable[[], FakePolicy | Exception] = FakePolicy
    opened: list[FakePolicy] = field(default_factory=list)

    def connect(self, timeout_seconds: float) -> FakePolicy:
        policy = self.make()
        if isinstance(policy, Exception):
            raise policy
        self.opened.append(policy)
        return policy


def a_step(reward: float = 1.0, *, over: bool = False, cut: bool = False, **info: Any) -> StepResult:
    observation = {"observation": np.zeros(2, np.float32)}
    return StepResult(observation=observation, reward=reward, terminated=over, truncated=cut, info=info)


@dataclass
class ScriptedEnvironment:
    """Plays the given steps, whatever the actions are; an exception in place of a step is raised."""

    steps: Sequence[StepResult | Exception]
    action_space: gymnasium.Space[Any] = field(default_factory=lambda: gymnasium.spaces.Discrete(100))
    observation_space: gymnasium.Space[Any] = field(
        default_factory=lambda: gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    )
    reset_error: Exception | None = None
    actions: list[Any] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    closed: bool = False
    _next: int = 0

    def reset(self, seed: int) -> Observation:
        self.seeds.append(seed)
        self._next = 0
        if self.reset_error is not None:
            raise self.reset_error
        return {"observation": np.zeros(2, np.float32)}

    def step(self, action: Any) -> StepResult:
        self.actions.append(action)
        step = self.steps[self._next]
        self._next += 1
        if isinstance(step, Exception):
            raise step
        return step

    def close(self) -> None:
        self.closed = True


@dataclass
class ScriptedBenchmark:
    """Tasks whose environments `environment` makes; keeps what it made."""

    environment: Callable[[str], ScriptedEnvironment]
    made: list[tuple[str, ScriptedEnvironment]] = field(default_factory=list)
    task_ids: tuple[str, ...] = ("a", "b")
    default_episodes_per_task: int = 1
    success_rule: str = "always"

    def make(self, task_id: str) -> ScriptedEnvironment:
        environment = self.environment(task_id)
        self.made.append((task_id, environment))
        return environment

    def succeeded(self, task_id: str, episode: EpisodeSummary) -> bool:
        return True

    def env_name(self, task_id: str) -> str:
        return f"scripted/{task_id}"

    def env_specs(self) -> list[dict[str, Any]]:
        return []

    def versions(self) -> dict[str, str]:
        return {}


@dataclass
class MemoryPublisher:
    """A sink and its ledger in memory. `gate` holds up every commit until it is set."""

    gate: threading.Event = field(default_factory=threading.Event)
    committed: dict[EpisodeKey, FinishedEpisode] = field(default_factory=dict)
    staged: list[tuple[EpisodeRun, int, list[bytes]]] = field(default_factory=list)
    stale: bool = False
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.gate.set()

    def publish(self, episodes: Sequence[FinishedEpisode]) -> list[CommitOutcome]:
        assert self.gate.wait(20)
        if self.error is not None:
            raise self.error
        return [self._commit(episode) for episode in episodes]

    def _commit(self, episode: FinishedEpisode) -> CommitOutcome:
        if self.stale:
            return CommitOutcome.STALE
        before = self.committed.setdefault(episode.run.key, episode)
        return CommitOutcome.COMMITTED if before is episode else CommitOutcome.ALREADY

    def stage(self, run: EpisodeRun, part: int, messages: Sequence[bytes]) -> bool:
        if self.error is not None:
            raise self.error
        self.staged.append((run, part, list(messages)))
        return not self.stale
