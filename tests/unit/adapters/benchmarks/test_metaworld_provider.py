"""Meta-World's benchmarks."""

from __future__ import annotations

import pickle
import sys
from typing import Any

import numpy as np
import pytest

from orchestrator.adapters.benchmarks.metaworld_provider import MetaWorldBenchmark, MetaWorldProvider
from orchestrator.domain.errors import UsageError
from orchestrator.ports import EpisodeSummary

NO_MOVE = np.zeros(4, np.float32)
GOAL = slice(36, 39)


pytestmark = pytest.mark.filterwarnings(r"ignore:Constant\(s\) may be too high")


def load(name: str, **config: Any) -> MetaWorldBenchmark:
    return MetaWorldProvider().load(name, config, None)


@pytest.mark.parametrize(
    ("name", "tasks", "first"),
    [
        ("MT10", 10, "reach-v3"),
        ("MT25", 25, "reach-v3"),
        ("MT50", 50, "assembly-v3"),
        ("ML10", 5, "drawer-open-v3"),
        ("ML25", 5, None),
        ("ML45", 5, "bin-picking-v3"),
        ("MT1/push-v3", 1, "push-v3"),
        ("ML1/push-v3", 1, "push-v3"),
        ("push-v3", 1, "push-v3"),
    ],
)
def test_a_benchmark_has_metaworlds_tasks(name: str, tasks: int, first: str | None) -> None:
    task_ids = load(name).task_ids

    assert len(task_ids) == tasks
    assert first in (None, task_ids[0])


def test_ml_benchmarks_are_evaluated_on_their_test_classes() -> None:
    import metaworld

    for name in ("ML10", "ML25", "ML45"):
        assert list(load(name).task_ids) == list(getattr(metaworld.env_dict, f"{name}_V3")["test"])


def test_mt1_takes_its_task_from_the_config() -> None:
    assert load("MT1", task="reach-v3").task_ids == ("reach-v3",)
    with pytest.raises(UsageError, match=r"MT1 needs a task: set config\.task"):
        load("MT1")


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("MT11", {}, r"unknown metaworld benchmark 'MT11'\. Did you mean 'MT1.*MT50.*reach-v3"),
        ("reach", {}, r"Did you mean 'reach-v3'"),
        ("MT1/reach-v2", {}, r"unknown metaworld task 'reach-v2'\. Did you mean 'reach-v3'"),
        ("MT10", {"task_seed": -1}, "config.task_seed must be in"),
        ("MT10", {"task_seed": 2**32 - 1}, "config.task_seed must be in"),
        ("MT10", {"task_seed": True}, "config.task_seed must be an integer"),
        ("MT10", {"terminate_on_success": "yes"}, "config.terminate_on_success must be true or false"),
        ("MT10", {"max_episode_steps": 0}, "config.max_episode_steps"),
    ],
)
def test_what_cannot_be_is_refused_in_words(name: str, config: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        load(name, **config)


def test_without_metaworld_one_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "metaworld", None)

    with pytest.raises(UsageError, match=r"pip install 'orchestrator\[metaworld\]'"):
        load("MT10")


def test_an_mt_observation_names_the_task_and_shows_the_goal() -> None:
    environment = load("MT10").make("reach-v3")

    observation = environment.reset(5)

    environment.close()
    assert observation["task"] == "reach-v3"
    assert observation["observation"].shape == (39,)
    assert observation["observation"].dtype == np.float64
    assert observation["observation"][GOAL].all()
    assert environment.observation_space.contains(observation)


def test_an_ml_observation_hides_task_and_goal() -> None:
    environment = load("ML1/reach-v3").make("reach-v3")

    observation = environment.reset(5)

    environment.close()
    assert list(observation) == ["observation"]
    assert not observation["observation"][GOAL].any()


def test_the_seed_alone_chooses_among_the_goals_of_metaworlds_benchmark() -> None:
    import metaworld

    environment = load("reach-v3").make("reach-v3")
    goals = [
        pickle.loads(task.data)["rand_vec"][3:] for task in metaworld.MT1("reach-v3", seed=42).train_tasks
    ]

    shown = {seed: environment.reset(seed)["observation"][GOAL].tolist() for seed in (0, 49, 50, 2**31 - 1)}

    environment.close()
    assert shown == {seed: goals[seed % 50].tolist() for seed in shown}


def test_held_out_goals_are_those_of_metaworlds_ml1() -> None:
    import metaworld

    environment = load("ML1/reach-v3").make("reach-v3")
    held_out = metaworld.ML1("reach-v3", seed=42).test_tasks

    environment.reset(3)

    # The goal is hidden from the observation, so it is read from the simulator.
    goal = environment._env._target_pos
    environment.close()
    assert goal.tolist() == pickle.loads(held_out[3].data)["rand_vec"][3:].tolist()


def test_another_task_seed_gives_other_goals() -> None:
    shown = []
    for task_seed in (42, 2):
        environment = load("reach-v3", task_seed=task_seed).make("reach-v3")
        shown.append(environment.reset(0)["observation"][GOAL].tolist())
        environment.close()

    assert shown[0] != shown[1]


@pytest.mark.parametrize("limit", [3, 502])
def test_the_configured_limit_of_steps_truncates(limit: int) -> None:
    environment = load("reach-v3", max_episode_steps=limit).make("reach-v3")
    environment.reset(0)

    ends = [environment.step(NO_MOVE) for _ in range(limit)]

    environment.close()
    assert [end.truncated for end in ends] == [False] * (limit - 1) + [True]
    assert not any(end.terminated for end in ends)


@pytest.mark.parametrize("terminate", [True, False])
def test_success_ends_the_episode_unless_the_config_says_otherwise(terminate: bool) -> None:
    from metaworld.policies import ENV_POLICY_MAP

    expert = ENV_POLICY_MAP["reach-v3"]()
    environment = load("reach-v3", terminate_on_success=terminate).make("reach-v3")
    observation = environment.reset(1)["observation"]
    for _ in range(200):
        result = environment.step(np.clip(expert.get_action(observation), -1, 1))
        observation = result.observation["observation"]
        if result.info["success"]:
            break

    environment.close()
    assert result.info["success"]
    assert result.terminated is terminate


def test_success_is_what_the_environment_says() -> None:
    benchmark = load("reach-v3")

    def summary(info_success: bool | None) -> EpisodeSummary:
        return EpisodeSummary(1e6, 500, terminated=False, truncated=True, info_success=info_success)

    assert benchmark.succeeded("reach-v3", summary(True))
    assert not benchmark.succeeded("reach-v3", summary(False))
    assert not benchmark.succeeded("reach-v3", summary(None))


def test_the_specs_of_all_fifty_tasks_need_no_simulator(monkeypatch: pytest.MonkeyPatch) -> None:
    import mujoco

    benchmark = load("MT50")
    monkeypatch.delattr(mujoco, "MjModel")

    specs = benchmark.env_specs()

    assert len(specs) == 50
    assert specs[0]["action_space"] == {
        "type": "Box",
        "shape": [4],
        "dtype": "float32",
        "low": -1.0,
        "high": 1.0,
    }
    assert specs[0]["max_episode_steps"] == 500
