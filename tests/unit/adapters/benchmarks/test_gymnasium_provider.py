"""Gymnasium's environments as benchmarks."""

from __future__ import annotations

import sys
from typing import Any

import gymnasium
import numpy as np
import pytest

from orchestrator.adapters.benchmarks.gymnasium_provider import GymnasiumBenchmark, GymnasiumProvider
from orchestrator.domain.errors import UsageError
from orchestrator.ports import EpisodeSummary


def load(
    env_id: str, config: dict[str, Any] | None = None, spec: dict[str, Any] | None = None
) -> GymnasiumBenchmark:
    return GymnasiumProvider().load(env_id, config or {}, spec)


def summary(episode_return: float, info_success: bool | None = None) -> EpisodeSummary:
    return EpisodeSummary(episode_return, 10, terminated=True, truncated=False, info_success=info_success)


def steps_of_an_episode(benchmark: GymnasiumBenchmark, action: Any) -> int:
    environment = benchmark.make(benchmark.task_ids[0])
    environment.reset(1)
    steps = 0
    while True:
        steps += 1
        result = environment.step(action)
        if result.terminated or result.truncated:
            environment.close()
            return steps


def test_an_unknown_id_is_answered_with_all_and_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        load("cartpole-v1")

    assert "Did you mean 'CartPole-v1'?" in str(caught.value)
    assert "Taxi-v4" in str(caught.value)


def test_an_id_with_a_module_is_refused_before_anything_is_imported() -> None:
    with pytest.raises(UsageError, match="names a module to import"):
        load("antigravity:CartPole-v1")


def test_an_id_that_another_package_registered_is_not_gymnasiums_own() -> None:
    gymnasium.register("Foreign-v0", entry_point="somewhere.else:Env")
    try:
        with pytest.raises(UsageError, match="unknown gymnasium benchmark 'Foreign-v0'"):
            load("Foreign-v0")
    finally:
        del gymnasium.registry["Foreign-v0"]


def test_an_observation_arrives_as_the_environment_gave_it() -> None:
    environment = load("CartPole-v1").make("CartPole-v1")

    observation = environment.reset(3)["observation"]

    expected, _ = gymnasium.make("CartPole-v1").reset(seed=3)
    assert observation.dtype == np.float32
    assert observation.tobytes() == expected.tobytes()


def test_the_registered_time_limit_truncates() -> None:
    assert steps_of_an_episode(load("MountainCar-v0"), 1) == 200


def test_a_configured_time_limit_replaces_the_registered_one() -> None:
    assert steps_of_an_episode(load("MountainCar-v0", {"max_episode_steps": 7}), 1) == 7
    assert steps_of_an_episode(load("MountainCar-v0", {"max_episode_steps": 300}), 1) == 300


def test_make_kwargs_reach_the_constructor() -> None:
    benchmark = load("FrozenLake-v1", {"make_kwargs": {"map_name": "8x8", "is_slippery": False}})

    assert benchmark.env_specs()[0]["observation_space"]["n"] == 64


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"make_kwargs": {"no_such_thing": 1}}, "no_such_thing"),
        ({"make_kwargs": [1]}, "config.make_kwargs must be an object"),
        ({"make_kwargs": {"max_episode_steps": 3}}, "use config.max_episode_steps"),
        ({"make_kwargs": {"render_mode": "rgb_array"}}, "benchmark_spec.render_mode"),
        ({"max_episode_steps": 0}, "config.max_episode_steps"),
        ({"success_threshold": "high"}, "config.success_threshold"),
    ],
)
def test_an_unusable_config_is_named_when_the_benchmark_is_loaded(
    config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        load("CartPole-v1", config)


def test_a_simulator_that_is_not_installed_is_named_when_the_benchmark_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "mujoco", None)
    for module in [name for name in sys.modules if name.startswith("gymnasium.envs.mujoco")]:
        monkeypatch.delitem(sys.modules, module)

    with pytest.raises(UsageError, match=r"Ant-v5 cannot be made.*MuJoCo is not installed"):
        load("Ant-v5")


def test_nothing_renders_unless_the_spec_says_so() -> None:
    assert "render_mode" not in load("CartPole-v1").env_specs()[0]["make_kwargs"]
    asked = load("CartPole-v1", spec={"render_mode": "rgb_array"})
    assert asked.env_specs()[0]["make_kwargs"] == {"render_mode": "rgb_array"}
    with pytest.raises(UsageError, match="window"):
        load("CartPole-v1", spec={"render_mode": "human"})


def test_success_is_the_registered_reward_threshold() -> None:
    benchmark = load("CartPole-v1")

    assert benchmark.succeeded("CartPole-v1", summary(475.0))
    assert not benchmark.succeeded("CartPole-v1", summary(474.0))
    assert "return >= 475.0 (reward_threshold of CartPole-v1)" in benchmark.success_rule


def test_a_configured_threshold_comes_before_the_registered_one() -> None:
    benchmark = load("CartPole-v1", {"success_threshold": 100})

    assert benchmark.succeeded("CartPole-v1", summary(100.0))
    assert "return >= 100.0 (config.success_threshold)" in benchmark.success_rule


def test_what_the_environment_says_of_success_comes_first() -> None:
    benchmark = load("CartPole-v1")

    assert benchmark.succeeded("CartPole-v1", summary(0.0, info_success=True))
    assert not benchmark.succeeded("CartPole-v1", summary(500.0, info_success=False))


def test_an_id_without_any_rule_cannot_be_scored_by_success() -> None:
    with pytest.raises(UsageError, match=r'config\.score to "avg_reward", or config\.success_threshold'):
        load("Pendulum-v1")


def test_an_id_without_any_rule_can_be_scored_by_reward_and_says_so() -> None:
    benchmark = load("Pendulum-v1", {"score": "avg_reward"})

    assert not benchmark.succeeded("Pendulum-v1", summary(0.0))
    assert "no rule of success" in benchmark.success_rule


def test_mujoco_is_among_the_versions_of_its_environments() -> None:
    assert "mujoco" not in load("CartPole-v1").versions()
    assert "mujoco" in load("InvertedPendulum-v5").versions()


def test_the_number_of_episodes_can_be_configured() -> None:
    assert load("CartPole-v1").default_episodes_per_task == 10
    assert load("CartPole-v1", {"episodes_per_task": 3}).default_episodes_per_task == 3
