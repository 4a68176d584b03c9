"""What every benchmark promises to the workers; a new provider joins by an entry in `CASES`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from orchestrator.adapters.benchmarks.registry import load_benchmark, load_provider
from orchestrator.adapters.benchmarks.spaces import from_wire
from orchestrator.domain.errors import UsageError
from orchestrator.ports import Benchmark, Environment, EpisodeSummary, StepResult
from orchestrator.submission.wire import packb, unpackb

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vector": ("gymnasium", "CartPole-v1", {}),
    "continuous": ("gymnasium", "Pendulum-v1", {"score": "avg_reward"}),
    "discrete": ("gymnasium", "FrozenLake-v1", {}),
    "tuple": ("gymnasium", "Blackjack-v1", {"score": "avg_reward"}),
    "mujoco": ("gymnasium", "InvertedPendulum-v5", {}),
    "metaworld-mt": ("metaworld", "drawer-close-v3", {}),
    "metaworld-ml": ("metaworld", "ML1/drawer-close-v3", {}),
}
STEPS = 25


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, str, dict[str, Any]]:
    found: tuple[str, str, dict[str, Any]] = request.param
    return found


@pytest.fixture
def benchmark(case: tuple[str, str, dict[str, Any]]) -> Benchmark:
    return load_benchmark(*case, None)


@pytest.fixture
def environment(benchmark: Benchmark) -> Iterator[Environment]:
    environment = benchmark.make(benchmark.task_ids[0])
    yield environment
    environment.close()


def play(environment: Environment, seed: int, actions_seed: int) -> list[Any]:
    """A trace of up to STEPS steps with random actions: everything that a policy or a score could see."""
    observation = environment.reset(seed)
    trace: list[Any] = [packb(observation)]
    environment.action_space.seed(actions_seed)
    for _ in range(STEPS):
        result = step_at_random(environment)
        trace.append((packb(result.observation), result.reward, result.terminated, result.truncated))
        if result.terminated or result.truncated:
            break
    return trace


def step_at_random(environment: Environment) -> StepResult:
    action, clipped = from_wire(environment.action_space, unpackb(packb(environment.action_space.sample())))
    assert clipped == 0
    return environment.step(action)


def test_tasks_have_distinct_names_and_a_number_of_episodes(benchmark: Benchmark) -> None:
    assert len(set(benchmark.task_ids)) == len(benchmark.task_ids) > 0
    assert benchmark.default_episodes_per_task >= 1


def test_what_goes_into_the_result_is_json_in_full(benchmark: Benchmark) -> None:
    specs = json.loads(json.dumps(benchmark.env_specs(), allow_nan=False))

    assert [spec["task_id"] for spec in specs] == list(benchmark.task_ids)
    assert all(spec["env_name"] == benchmark.env_name(spec["task_id"]) for spec in specs)
    assert {"python", "numpy"} <= benchmark.versions().keys()
    assert benchmark.success_rule


def test_an_unknown_task_is_refused(benchmark: Benchmark) -> None:
    with pytest.raises(UsageError, match="unknown task 'no-such-task'"):
        benchmark.make("no-such-task")


def test_an_unknown_benchmark_is_answered_with_names_that_load(case: tuple[str, str, dict[str, Any]]) -> None:
    names = load_provider(case[0]).benchmark_names()

    with pytest.raises(UsageError) as caught:
        load_benchmark(case[0], "no-such-benchmark", {}, None)

    assert all(name in str(caught.value) for name in names)


def test_observations_are_flat_dicts_that_survive_the_wire(environment: Environment) -> None:
    for observation in (environment.reset(1), step_at_random(environment).observation):
        received = unpackb(packb(observation))

        assert received.keys() == observation.keys()
        for name, value in observation.items():
            assert isinstance(value, np.ndarray | int | float | str)
            assert np.array_equal(received[name], value)


def test_a_step_gives_plain_numbers_and_flags(environment: Environment) -> None:
    environment.reset(1)

    result = step_at_random(environment)

    assert type(result.reward) is float
    assert type(result.terminated) is bool
    assert type(result.truncated) is bool
    assert isinstance(result.info, dict)


def test_an_episode_depends_on_its_seed_alone(benchmark: Benchmark, environment: Environment) -> None:
    alone = play(environment, seed=11, actions_seed=1)
    play(environment, seed=12, actions_seed=2)
    play(environment, seed=13, actions_seed=3)
    after_others = play(environment, seed=11, actions_seed=1)
    elsewhere = benchmark.make(benchmark.task_ids[0])
    play(elsewhere, seed=14, actions_seed=4)

    assert after_others == alone
    assert play(elsewhere, seed=11, actions_seed=1) == alone
    elsewhere.close()


def test_seeds_of_31_bits_are_accepted(environment: Environment) -> None:
    environment.reset(2**31 - 1)
    environment.reset(0)


def test_global_random_numbers_do_not_matter(environment: Environment) -> None:
    np.random.seed(1)
    first = play(environment, seed=11, actions_seed=1)
    np.random.seed(2)

    assert play(environment, seed=11, actions_seed=1) == first


def test_what_the_environment_calls_a_success_is_one(benchmark: Benchmark) -> None:
    task_id = benchmark.task_ids[0]
    summary = EpisodeSummary(-1e9, 1, terminated=True, truncated=False, info_success=True)

    assert benchmark.succeeded(task_id, summary) is True


def test_closing_twice_is_harmless(benchmark: Benchmark) -> None:
    environment = benchmark.make(benchmark.task_ids[0])
    environment.reset(1)

    environment.close()
    environment.close()
