"""The plain loop that an evaluation must equal, bit for bit: no queue, no worker, no wire, no `orchestrator`.

It is written from the documentation of Gymnasium, Meta-World and our benchmarks, not from our code, and makes
a new environment for every episode.
"""

import importlib.util
import json
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import gymnasium
import numpy as np


@dataclass(frozen=True)
class Episode:
    """What to play. `seed` is the environment's, `policy_seed` the one that the agent is told."""

    episode_id: int
    seed: int
    policy_seed: int


@dataclass(frozen=True)
class Played:
    """What came of it. `episode_return` is the sum of the rewards as Python floats, in order, from 0.0."""

    episode_id: int
    episode_return: float
    steps: int
    success: bool


def play(benchmark, task, episodes, agent_file, *, task_seed=42):
    """The episodes of one task, played one after another with a new environment and one agent object.

    benchmark: "gymnasium/CartPole-v1", "metaworld/MT10" and the like; task: "CartPole-v1", "reach-v3".
    """
    agent = _load_agent(Path(agent_file))
    if benchmark.startswith("metaworld/"):
        return [_play_metaworld(task, episode, agent, task_seed) for episode in episodes]
    return [_play_gymnasium(task, episode, agent) for episode in episodes]


def _load_agent(agent_file):
    spec = importlib.util.spec_from_file_location(f"reference_agent_{agent_file.parent.name}", agent_file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Agent()


def _begin(agent, episode):
    if hasattr(agent, "reset"):
        agent.reset(episode.episode_id, episode.policy_seed)


def _play_gymnasium(env_id, episode, agent):
    env = gymnasium.make(env_id)
    observation, _ = env.reset(seed=episode.seed)
    _begin(agent, episode)
    total, steps, over = 0.0, 0, False
    while not over:
        observation, reward, terminated, truncated, _ = env.step(agent.act(observation))
        total += float(reward)
        steps += 1
        over = terminated or truncated
    threshold = env.spec.reward_threshold
    env.close()
    return Played(episode.episode_id, total, steps, threshold is not None and total >= threshold)


@cache
def _metaworld_goals(task, task_seed):
    import metaworld

    return metaworld.MT1(task, seed=task_seed).train_tasks


def _play_metaworld(task, episode, agent, task_seed):
    import metaworld

    goals = _metaworld_goals(task, task_seed)
    env = metaworld.ALL_V3_ENVIRONMENTS[task]()
    env.set_task(goals[episode.seed % len(goals)])
    observation, _ = env.reset()
    _begin(agent, episode)
    total, steps, success = 0.0, 0, False
    while not success and steps < 500:
        action = np.asarray(agent.act({"observation": observation, "task": task}), dtype=np.float32)
        observation, reward, _, _, info = env.step(np.clip(action, -1.0, 1.0))
        total += float(reward)
        steps += 1
        success = bool(info["success"])
    env.close()
    return Played(episode.episode_id, total, steps, success)


def main(arguments):
    """`reference.py BENCHMARK TASK AGENT_FILE EPISODE:SEED:POLICY_SEED...` prints one JSON object a line."""
    benchmark, task, agent_file, *triples = arguments
    episodes = [Episode(*map(int, triple.split(":"))) for triple in triples]
    for played in play(benchmark, task, episodes, agent_file):
        print(json.dumps(asdict(played)))


if __name__ == "__main__":
    main(sys.argv[1:])
