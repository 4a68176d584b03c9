"""Meta-World's benchmarks (MT1 to MT50, ML1 to ML45, and single tasks by name): a robot arm moves things.

Goals. A task has 50. For MT benchmarks and single tasks they are the train tasks of
`metaworld.MT1(task, seed=task_seed)`; for ML benchmarks the test tasks of
`metaworld.ML1(task, seed=task_seed)`, and ML10, ML25 and ML45 are evaluated on their test classes.
So a task has the same goals in every benchmark of its family. An episode with seed s takes goal s modulo 50
and depends on nothing else: any worker, in any order, plays the same episode.

Observations on the wire. MT: `{"observation": float64 [39], "task": "reach-v3"}`. ML:
`{"observation": float64 [39]}`, with zeros in the place of the goal, as Meta-World hides it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
from gymnasium import spaces

from orchestrator.adapters.benchmarks.names import unknown_name
from orchestrator.adapters.benchmarks.plain_actions import AnySpace
from orchestrator.adapters.benchmarks.provider_config import (
    DEFAULT_EPISODES_PER_TASK,
    read_job_config,
    read_option,
)
from orchestrator.adapters.benchmarks.spaces import describe, to_wire
from orchestrator.adapters.benchmarks.versions import versions_of
from orchestrator.domain.errors import UsageError
from orchestrator.ports import EpisodeSummary, Observation, StepResult

DEFAULT_TASK_SEED = 42
_MAX_TASK_SEED = 2**32 - 2  # NumPy's legacy seed has 32 bits, and test tasks use task_seed + 1

_OPTIONS = ("task", "task_seed", "terminate_on_success")  # read of a job's config besides what all share
_MULTI_TASK = ("MT10", "MT25", "MT50")
_META_LEARNING = ("ML10", "ML25", "ML45")
_ONE_TASK = ("MT1", "ML1")

_goals: dict[tuple[str, bool, int], tuple[Any, ...]] = {}
_goals_lock = Lock()


@dataclass(frozen=True, slots=True)
class _Settings:
    """What decides an episode besides its task and seed."""

    goal_hidden: bool
    task_seed: int
    max_episode_steps: int
    terminate_on_success: bool


class MetaWorldEnvironment:
    """One task. The environment object is kept between episodes: building one takes up to half a second.

    An episode does not depend on those before it: `set_task` and Meta-World's reset leave nothing of them (it
    runs `reset_model`, clears the simulator's data, and runs `reset_model` again). A test compares used and
    fresh environments bit for bit.
    """

    def __init__(self, task_id: str, settings: _Settings) -> None:
        self._task_id = task_id
        self._settings = settings
        self._goals = _goals_of(task_id, settings)
        self._env = _environment_class(task_id)()
        self._env.max_path_length = settings.max_episode_steps
        self._env.set_task(self._goals[0])
        self._observation_space = _wire_space(self._env.sawyer_observation_space, task_id, settings)

    @property
    def action_space(self) -> AnySpace:
        space: AnySpace = self._env.action_space
        return space

    @property
    def observation_space(self) -> AnySpace:
        return self._observation_space

    def reset(self, seed: int) -> Observation:
        self._env.set_task(self._goals[seed % len(self._goals)])
        self._env.seed(seed)
        observation, _ = self._env.reset(seed=seed)
        return self._on_the_wire(observation)

    def step(self, action: Any) -> StepResult:
        observation, reward, terminated, truncated, info = self._env.step(action)
        succeeded = self._settings.terminate_on_success and info["success"] >= 1
        return StepResult(
            observation=self._on_the_wire(observation),
            reward=float(reward),
            terminated=bool(terminated or succeeded),
            truncated=bool(truncated),
            info=info,
        )

    def close(self) -> None:
        self._env.close()

    def _on_the_wire(self, observation: Any) -> Observation:
        return to_wire(self._observation_space, {"observation": observation, "task": self._task_id})


class MetaWorldBenchmark:
    """Some tasks under one set of settings."""

    def __init__(self, task_ids: Sequence[str], settings: _Settings, episodes_per_task: int) -> None:
        self.task_ids: Sequence[str] = tuple(task_ids)
        self.default_episodes_per_task = episodes_per_task
        self._settings = settings

    @property
    def success_rule(self) -> str:
        goals = "test tasks, their goals hidden" if self._settings.goal_hidden else "goals in view"
        end = "the episode ends there" if self._settings.terminate_on_success else "the episode goes on"
        return f'info["success"] of any step, {end}; {goals}; episodes stand alone, without adaptation'

    def succeeded(self, task_id: str, episode: EpisodeSummary) -> bool:
        return bool(episode.info_success)

    def make(self, task_id: str) -> MetaWorldEnvironment:
        if task_id not in self.task_ids:
            raise unknown_name("task", task_id, self.task_ids)
        return MetaWorldEnvironment(task_id, self._settings)

    def env_name(self, task_id: str) -> str:
        return f"Meta-World/{task_id}"

    def env_specs(self) -> list[dict[str, Any]]:
        """The tasks' interfaces. Builds no simulator, so it gives no bounds of observations: tasks differ."""
        action_space = spaces.Box(-1.0, 1.0, (4,), np.float32)
        observation_space = _wire_space(spaces.Box(-np.inf, np.inf, (39,), np.float64), "", self._settings)
        source = "ML1 test" if self._settings.goal_hidden else "MT1 train"
        return [
            {
                "task_id": task_id,
                "env_name": self.env_name(task_id),
                "observation_space": describe(observation_space),
                "action_space": describe(action_space),
                "max_episode_steps": self._settings.max_episode_steps,
                "terminate_on_success": self._settings.terminate_on_success,
                "goals": f"{source} tasks, seed {self._settings.task_seed}; an episode takes seed modulo 50",
                "goal_hidden": self._settings.goal_hidden,
            }
            for task_id in self.task_ids
        ]

    def versions(self) -> dict[str, str]:
        return versions_of("numpy", "scipy", "gymnasium", "mujoco", "metaworld")


class MetaWorldProvider:
    """Meta-World, which is an optional dependency and is imported only here."""

    name = "metaworld"

    def benchmark_names(self) -> Sequence[str]:
        return (*_ONE_TASK, *_MULTI_TASK, *_META_LEARNING, *_metaworld().ALL_V3_ENVIRONMENTS)

    def load(
        self, benchmark_name: str, config: Mapping[str, Any], spec: Mapping[str, Any] | None
    ) -> MetaWorldBenchmark:
        """A benchmark by name; "MT1" and "ML1" need `config.task` or the form "MT1/reach-v3".

        Config: `task`, `task_seed` (default 42), `max_episode_steps` (default 500), `terminate_on_success`
        (default true), `episodes_per_task` (default 10). Nothing renders, whatever `spec` says.

        Raises:
            UsageError: Meta-World is not installed, unknown benchmark or task, or unusable config.
        """
        metaworld = _metaworld()
        job_config = read_job_config(config, options=_OPTIONS)
        task_ids = self._task_ids(benchmark_name, config)
        task_seed = read_option(config, "task_seed", int, DEFAULT_TASK_SEED, "an integer")
        if not 0 <= task_seed <= _MAX_TASK_SEED:
            raise UsageError(f"config.task_seed must be in 0..{_MAX_TASK_SEED}, got {task_seed}")
        settings = _Settings(
            goal_hidden=benchmark_name.startswith("ML"),
            task_seed=task_seed,
            max_episode_steps=job_config.max_episode_steps
            or int(metaworld.sawyer_xyz_env.SawyerXYZEnv.max_path_length),
            terminate_on_success=read_option(config, "terminate_on_success", bool, True, "true or false"),
        )
        return MetaWorldBenchmark(
            task_ids, settings, job_config.episodes_per_task or DEFAULT_EPISODES_PER_TASK
        )

    def _task_ids(self, benchmark_name: str, config: Mapping[str, Any]) -> list[str]:
        env_dict = _metaworld().env_dict
        known = env_dict.ALL_V3_ENVIRONMENTS
        if benchmark_name in _MULTI_TASK:
            return list(getattr(env_dict, f"{benchmark_name}_V3"))
        if benchmark_name in _META_LEARNING:
            return list(getattr(env_dict, f"{benchmark_name}_V3")["test"])
        if benchmark_name in known:
            return [benchmark_name]
        family, _, task = benchmark_name.partition("/")
        if family not in _ONE_TASK:
            raise unknown_name(
                "metaworld benchmark",
                benchmark_name,
                self.benchmark_names(),
                note="MT1 and ML1 take config.task.",
            )
        task = task or read_option(config, "task", str, "", "the name of a task")
        if not task:
            raise UsageError(f'{family} needs a task: set config.task, or ask for "{family}/reach-v3"')
        if task not in known:
            raise unknown_name("metaworld task", task, known)
        return [task]


def _metaworld() -> Any:
    try:
        import metaworld
    except ImportError as error:
        raise UsageError(
            f"Meta-World cannot be imported ({error}): pip install 'orchestrator[metaworld]'"
        ) from error
    return metaworld


def _environment_class(task_id: str) -> Any:
    return _metaworld().ALL_V3_ENVIRONMENTS[task_id]


def _goals_of(task_id: str, settings: _Settings) -> tuple[Any, ...]:
    """The task's 50 goals, as Meta-World's own benchmark classes draw them: about a second, once a process.

    Only the class of this task is built, not its whole benchmark: that takes up to a minute for MT50.
    """
    metaworld = _metaworld()
    # `ML1` draws its test tasks with seed + 1; `CustomML` gives those alone.
    seed = settings.task_seed + 1 if settings.goal_hidden else settings.task_seed
    with _goals_lock:  # Meta-World seeds NumPy's global generator while it draws
        key = (task_id, settings.goal_hidden, seed)
        if key not in _goals:
            drawn = (
                metaworld.CustomML([], [task_id], seed=seed).test_tasks
                if settings.goal_hidden
                else metaworld.MT1(task_id, seed=seed).train_tasks
            )
            _goals[key] = tuple(drawn)
        return _goals[key]


def _wire_space(observation_space: AnySpace, task_id: str, settings: _Settings) -> spaces.Dict:
    parts: dict[str, AnySpace] = {"observation": observation_space}
    if not settings.goal_hidden:
        letters = "abcdefghijklmnopqrstuvwxyz0123456789-"
        parts["task"] = spaces.Text(max_length=64, min_length=1, charset=letters)
    return spaces.Dict(parts)
