"""Benchmarks of one task each: the environments that Gymnasium itself brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium

from orchestrator.adapters.benchmarks.names import unknown_name
from orchestrator.adapters.benchmarks.plain_actions import AnySpace
from orchestrator.adapters.benchmarks.provider_config import (
    DEFAULT_EPISODES_PER_TASK,
    read_job_config,
    read_option,
    shown,
)
from orchestrator.adapters.benchmarks.spaces import describe, to_wire
from orchestrator.adapters.benchmarks.versions import versions_of
from orchestrator.domain.errors import UsageError
from orchestrator.ports import EpisodeSummary, Observation, StepResult

_OWN_PREFIX = "gymnasium."
_OPTIONS = ("make_kwargs",)  # what is read of a job's config besides what all benchmarks share
# Arguments of `gymnasium.make` itself: they would collide with ours, or load wrappers.
_RESERVED_KWARGS = {"id", "max_episode_steps", "disable_env_checker"}


@dataclass(frozen=True, slots=True)
class _Recipe:
    """Everything that makes an environment; the same recipe makes the same environment."""

    env_id: str
    kwargs: Mapping[str, Any]
    max_episode_steps: int | None

    def make(self) -> gymnasium.Env[Any, Any]:
        return gymnasium.make(
            self.env_id,
            max_episode_steps=self.max_episode_steps,
            disable_env_checker=True,  # it steps and samples at the first reset, which costs and only warns
            **self.kwargs,
        )


class GymnasiumEnvironment:
    """An environment of one recipe, built anew for every episode.

    Some environments carry state over a reset (Box2D keeps its world), so an episode would depend on those
    that the same worker ran before. Building takes 0.2 ms (CartPole) to 5 ms (Humanoid).
    """

    def __init__(self, recipe: _Recipe) -> None:
        self._recipe = recipe
        self._env = recipe.make()

    @property
    def action_space(self) -> AnySpace:
        return self._env.action_space

    @property
    def observation_space(self) -> AnySpace:
        return self._env.observation_space

    def reset(self, seed: int) -> Observation:
        self._env.close()
        self._env = self._recipe.make()
        observation, _ = self._env.reset(seed=seed)
        return to_wire(self._env.observation_space, observation)

    def step(self, action: Any) -> StepResult:
        observation, reward, terminated, truncated, info = self._env.step(action)
        return StepResult(
            observation=to_wire(self._env.observation_space, observation),
            reward=float(reward),
            terminated=bool(terminated),
            truncated=bool(truncated),
            info=info,
        )

    def close(self) -> None:
        self._env.close()


class GymnasiumBenchmark:
    """One environment id as a benchmark; its only task has the id as name."""

    def __init__(self, recipe: _Recipe, episodes_per_task: int, success_threshold: float | None) -> None:
        self._recipe = recipe
        self._success_threshold = success_threshold
        self.default_episodes_per_task = episodes_per_task
        self.task_ids: Sequence[str] = (recipe.env_id,)

    @property
    def _reward_threshold(self) -> float | None:
        return gymnasium.registry[self._recipe.env_id].reward_threshold

    @property
    def has_success_rule(self) -> bool:
        return self._success_threshold is not None or self._reward_threshold is not None

    @property
    def success_rule(self) -> str:
        given = 'info["success"] of any step, where the environment gives one; else '
        if self._success_threshold is not None:
            return f"{given}return >= {self._success_threshold} (config.success_threshold)"
        if self._reward_threshold is not None:
            return f"{given}return >= {self._reward_threshold} (reward_threshold of {self._recipe.env_id})"
        return (
            f"{given}never: {self._recipe.env_id} has no rule of success, so success_rate says nothing; "
            'score by config.score = "avg_reward" or set config.success_threshold'
        )

    def succeeded(self, task_id: str, episode: EpisodeSummary) -> bool:
        if episode.info_success is not None:
            return episode.info_success
        threshold = self._success_threshold
        if threshold is None:
            threshold = self._reward_threshold
        return threshold is not None and episode.episode_return >= threshold

    def make(self, task_id: str) -> GymnasiumEnvironment:
        if task_id not in self.task_ids:
            raise unknown_name("task", task_id, self.task_ids)
        return GymnasiumEnvironment(self._recipe)

    def env_name(self, task_id: str) -> str:
        return self._recipe.env_id

    def env_specs(self) -> list[dict[str, Any]]:
        env = self._recipe.make()
        try:
            return [
                {
                    "task_id": self._recipe.env_id,
                    "env_name": self._recipe.env_id,
                    "observation_space": describe(env.observation_space),
                    "action_space": describe(env.action_space),
                    "max_episode_steps": env.spec.max_episode_steps if env.spec else None,
                    "reward_threshold": self._reward_threshold,
                    "make_kwargs": dict(self._recipe.kwargs),
                }
            ]
        finally:
            env.close()

    def versions(self) -> dict[str, str]:
        entry_point = str(gymnasium.registry[self._recipe.env_id].entry_point)
        simulators = {"mujoco": ["mujoco"], "box2d": ["box2d"], "phys2d": ["jax"], "tabular": ["jax"]}
        return versions_of("numpy", "gymnasium", *simulators.get(entry_point.split(".")[2], []))


class GymnasiumProvider:
    """Gymnasium's own ids. Those of other packages need a provider of their own (see `registry`)."""

    name = "gymnasium"

    def benchmark_names(self) -> Sequence[str]:
        return tuple(
            sorted(
                env_id
                for env_id, spec in gymnasium.registry.items()
                if isinstance(spec.entry_point, str) and spec.entry_point.startswith(_OWN_PREFIX)
            )
        )

    def load(
        self, benchmark_name: str, config: Mapping[str, Any], spec: Mapping[str, Any] | None
    ) -> GymnasiumBenchmark:
        """The benchmark of a Gymnasium id.

        Config: `make_kwargs` (dict, for the environment's constructor), `max_episode_steps` (replaces the
        id's own), `success_threshold` (a return), `episodes_per_task`. `spec["render_mode"]` reaches the
        constructor; nothing here renders.

        Raises:
            UsageError: unknown or refused id, unusable config, a simulator that is not installed, or an id
                without any rule of success while the score is the success rate.
        """
        self._check_name(benchmark_name)
        job_config = read_job_config(config, options=_OPTIONS)
        recipe = _Recipe(benchmark_name, _make_kwargs(config, spec), job_config.max_episode_steps)
        _check_recipe(recipe)
        benchmark = GymnasiumBenchmark(
            recipe, job_config.episodes_per_task or DEFAULT_EPISODES_PER_TASK, job_config.success_threshold
        )
        if job_config.score == "success_rate" and not benchmark.has_success_rule:
            raise UsageError(
                f"{benchmark_name} has no rule of success, so it cannot be scored by success_rate: "
                'set config.score to "avg_reward", or config.success_threshold to the return that counts'
            )
        return benchmark

    def _check_name(self, benchmark_name: str) -> None:
        if ":" in benchmark_name:
            raise UsageError(
                f"{benchmark_name[:200]!r} names a module to import, which a job may not do: "
                "use an id of Gymnasium's own registry, or install a provider for that package"
            )
        known = self.benchmark_names()
        if benchmark_name not in known:
            raise unknown_name("gymnasium benchmark", benchmark_name, known)


def _make_kwargs(config: Mapping[str, Any], spec: Mapping[str, Any] | None) -> dict[str, Any]:
    kwargs = dict(read_option(config, "make_kwargs", dict, {}, "an object of constructor arguments"))
    reserved = sorted(_RESERVED_KWARGS & kwargs.keys())
    if reserved:
        raise UsageError(
            f"config.make_kwargs may not hold {reserved}: use config.max_episode_steps for the limit"
        )
    render_mode = (spec or {}).get("render_mode")
    if kwargs.get("render_mode") not in (None, render_mode):
        raise UsageError(
            "config.make_kwargs.render_mode is refused: ask for it in benchmark_spec.render_mode"
        )
    if render_mode == "human":
        raise UsageError("benchmark_spec.render_mode 'human' opens a window; use 'rgb_array'")
    if render_mode is not None:
        kwargs["render_mode"] = render_mode
    return kwargs


def _check_recipe(recipe: _Recipe) -> None:
    """Makes the environment once, so that what cannot work fails here and not on every worker."""
    try:
        env = recipe.make()
    except Exception as error:  # a constructor with a job's arguments may raise anything
        raise UsageError(
            f"{recipe.env_id} cannot be made with {shown(dict(recipe.kwargs))}: "
            f"{type(error).__name__}: {str(error)[:500]}"
        ) from error
    try:
        describe(env.observation_space)
        describe(env.action_space)
    finally:
        env.close()
