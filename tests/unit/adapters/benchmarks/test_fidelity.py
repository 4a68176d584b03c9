"""Providers and wire conversions against the plain loop of `tests/end_to_end/reference.py`, bit for bit."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from orchestrator.adapters.benchmarks.registry import load_benchmark
from orchestrator.adapters.benchmarks.spaces import from_wire, split_chunk
from orchestrator.ports import Benchmark, Environment, EpisodeSummary
from orchestrator.submission.wire import packb, unpackb

ROOT = Path(__file__).parents[4]
QUICK_TASKS = ("reach-v3", "door-open-v3", "peg-insert-side-v3")
OTHER_TASKS = (
    "push-v3",
    "pick-place-v3",
    "drawer-open-v3",
    "drawer-close-v3",
    "button-press-topdown-v3",
    "window-open-v3",
    "window-close-v3",
)
MT10 = (*QUICK_TASKS, *(pytest.param(task_id, marks=pytest.mark.slow) for task_id in OTHER_TASKS))


def load_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"loaded_{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up while they are made
    spec.loader.exec_module(module)
    return module


reference = load_file(ROOT / "tests" / "end_to_end" / "reference.py")


def agent_file(example: str) -> Path:
    return ROOT / "examples" / example / "agent.py"


def over_the_wire(value: Any) -> Any:
    """As both ends unpack it."""
    return unpackb(packb(value), writable=True)


def play(benchmark: Benchmark, environment: Environment, task_id: str, episode: Any, agent: Any) -> Any:
    """One episode as a worker plays it, with every observation and reply packed and unpacked."""
    observation = environment.reset(episode.seed)
    if hasattr(agent, "reset"):
        agent.reset(episode.episode_id, episode.policy_seed)
    total, steps, info_success, over = 0.0, 0, None, False
    while not over:
        received = over_the_wire(observation)
        reply = over_the_wire(agent.act(received["observation"] if len(received) == 1 else received))
        action, _ = from_wire(environment.action_space, split_chunk(environment.action_space, reply)[0])
        result = environment.step(action)
        observation, over = result.observation, result.terminated or result.truncated
        total, steps = total + result.reward, steps + 1
        if "success" in result.info:
            info_success = bool(info_success or result.info["success"])
    summary = EpisodeSummary(total, steps, result.terminated, result.truncated, info_success)
    return reference.Played(episode.episode_id, total, steps, benchmark.succeeded(task_id, summary))


@pytest.mark.parametrize("example", ["cartpole", "stateful_cartpole", "stochastic_cartpole"])
def test_cartpole_equals_the_plain_loop(example: str) -> None:
    episodes = [reference.Episode(number, 1000 + number, 77 * number) for number in range(5)]
    benchmark = load_benchmark("gymnasium", "CartPole-v1", {}, None)
    environment = benchmark.make("CartPole-v1")
    agent = load_file(agent_file(example)).Agent()

    played = [play(benchmark, environment, "CartPole-v1", episode, agent) for episode in reversed(episodes)]

    assert played[::-1] == reference.play(
        "gymnasium/CartPole-v1", "CartPole-v1", episodes, agent_file(example)
    )


def test_the_cartpole_example_balances_every_episode_to_its_end() -> None:
    episodes = [reference.Episode(number, 7919 * number, 0) for number in range(50)]

    played = reference.play("gymnasium/CartPole-v1", "CartPole-v1", episodes, agent_file("cartpole"))

    assert {(episode.episode_return, episode.success) for episode in played} == {(500.0, True)}


@pytest.mark.parametrize("task_id", MT10)
def test_a_metaworld_episode_on_a_used_environment_equals_the_plain_loop_on_a_new_one(task_id: str) -> None:
    benchmark = load_benchmark("metaworld", "MT10", {}, None)
    environment = benchmark.make(task_id)
    agent = load_file(agent_file("metaworld_experts")).Agent()
    episode = reference.Episode(3, 123_456_789, 5)
    wreak_havoc(environment, seed=8)
    play(benchmark, environment, task_id, reference.Episode(0, 31, 0), agent)

    played = play(benchmark, environment, task_id, episode, agent)

    environment.close()
    assert [played] == reference.play("metaworld/MT10", task_id, [episode], agent_file("metaworld_experts"))


def wreak_havoc(environment: Environment, seed: int) -> None:
    """An episode of random moves, left in the middle."""
    generator = np.random.default_rng(seed)
    environment.reset(seed)
    for _ in range(60):
        environment.step(generator.uniform(-1, 1, 4).astype(np.float32))
