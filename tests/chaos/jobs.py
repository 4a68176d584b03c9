"""The jobs of a chaos run: what they play, and what comes of it where nothing goes wrong."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium

from orchestrator.adapters.artifacts.pack import PackedArchive, pack_directory
from tests.chaos.history import Outcome, Play

EPISODES = 6
MAX_STEPS = 40
STEP_SECONDS = 0.01
# The toy's ice is slippery: where an action leads is decided by the episode's seed.
ENVIRONMENTS = ("CartPole-v1", "FrozenLake-v1")

POLICY = """
import random

import numpy as np


class Policy:
    def begin(self, seed):
        self.random = random.Random(seed)

    def choose(self, observation):
        values = np.asarray(observation, dtype=float).reshape(-1)
        wavers = self.random.random()
        if len(values) == 4:
            return int(values[2] + 0.5 * values[3] > 0) ^ int(wavers < 0.35)
        return int(4 * wavers + values[0]) % 4
"""

# It notes each episode that it begins, and by which process. While its file `slice` is there it sends a few
# bytes at a time: no proxy between the two would do it better.
AGENT = """
import os
import pathlib
import socket
import time

from policy import Policy

DIRECTORY = pathlib.Path({directory!r})
send = socket.socket.send


def send_slices(self, data, *flags):
    return send(self, data[:7] if (DIRECTORY / "slice").exists() else data, *flags)


socket.socket.send = send_slices


class Agent:
    def __init__(self):
        self.policy = Policy()
        (DIRECTORY / "process").write_text(str(os.getpid()))

    def reset(self, episode, seed):
        self.policy.begin(seed)
        with (DIRECTORY / "plays").open("a") as plays:
            plays.write(f"{{episode}} {{time.time()}}\\n")

    def act(self, observation):
        time.sleep({step_seconds})
        return self.policy.choose(observation)
"""


@dataclass(frozen=True)
class ChaosJob:
    """A job, and the directory in which its submission leaves notes."""

    job_id: int
    environment: str
    directory: Path
    packed: PackedArchive

    @classmethod
    def make(cls, job_id: int, parent: Path) -> ChaosJob:
        directory = parent / str(job_id)
        submission = directory / "submission"
        submission.mkdir(parents=True)
        (submission / "policy.py").write_text(POLICY)
        (submission / "agent.py").write_text(
            AGENT.format(directory=str(directory), step_seconds=STEP_SECONDS)
        )
        packed = pack_directory(submission, directory / "archives")
        return cls(job_id, ENVIRONMENTS[job_id % len(ENVIRONMENTS)], directory, packed)

    def message(self, url: str) -> dict[str, Any]:
        """The `add_job` message of a validator."""
        return {
            "message_type": "eval_job",
            "timestamp": "2026-01-01T00:00:00Z",
            "job_id": self.job_id,
            "submission_id": "chaos",
            "env_provider": "gymnasium",
            "benchmark_name": self.environment,
            "artifact_url": url,
            "artifact_sha256": self.packed.sha256,
            "artifact_size_bytes": self.packed.size_bytes,
            "config": {
                "seed": self.job_id,
                "episodes_per_task": EPISODES,
                "max_episode_steps": MAX_STEPS,
                "step_log_interval": 1,
            },
        }

    def plays(self) -> list[Play]:
        """What the submission noted, in order; a line that a killed process left half is none."""
        notes = self.directory / "plays"
        lines = notes.read_text().split("\n")[:-1] if notes.exists() else []
        parts = [line.split() for line in lines]
        return [Play(self.job_id, int(episode), float(at)) for episode, at in parts]

    def process(self) -> int | None:
        """The process that serves, or served last."""
        note = self.directory / "process"
        return int(note.read_text() or 0) or None if note.exists() else None


def play_plainly(environment: str, seeds: Iterable[tuple[int, int]]) -> list[Outcome]:
    """The outcomes of episodes with these seeds (environment's, policy's): no queue, no worker, no wire."""
    module = ModuleType("policy")
    exec(POLICY, module.__dict__)
    policy, outcomes = module.Policy(), []
    for seed, policy_seed in seeds:
        env = gymnasium.make(environment, max_episode_steps=MAX_STEPS)
        observation, _ = env.reset(seed=seed)
        policy.begin(policy_seed)
        total, steps, over = 0.0, 0, False
        while not over:
            observation, reward, terminated, truncated, _ = env.step(policy.choose(observation))
            total, steps, over = total + float(reward), steps + 1, terminated or truncated
        env.close()
        outcomes.append((total, steps))
    return outcomes
