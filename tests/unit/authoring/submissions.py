"""Submissions that are wrong in one way each: what `orchestrator submission check` has to say clearly."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

CARTPOLE = "gymnasium/CartPole-v1"
PENDULUM = "gymnasium/Pendulum-v1"


@dataclass(frozen=True)
class Case:
    """An `agent.py`, and how it is checked. `varies`: numbers of its report are drawn anew each time."""

    source: str
    benchmark: str = CARTPOLE
    config: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    varies: bool = False


NOT_LOADED = {
    "syntax_error": Case(
        """
class Agent:
    def act(self observation):
        return 0
"""
    ),
    "missing_package": Case(
        """
import torchh


class Agent:
    def act(self, observation):
        return 0
"""
    ),
    "missing_class": Case(
        """
class Policy:
    def act(self, observation):
        return 0
"""
    ),
    "missing_act": Case(
        """
class Agent:
    def step(self, observation):
        return 0
"""
    ),
    "constructor_wants_more": Case(
        """
class Agent:
    def __init__(self, weights):
        self.weights = weights

    def act(self, observation):
        return 0
"""
    ),
    "constructor_raises": Case(
        """
class Agent:
    def __init__(self):
        self.weights = open("weights.npz").read()

    def act(self, observation):
        return 0
"""
    ),
    "exits_when_imported": Case(
        """
import os

print("nothing to do")
os._exit(0)
"""
    ),
    "asks_to_exit_when_imported": Case(
        """
import sys

sys.exit("no GPU")
"""
    ),
    "loads_too_long": Case(
        """
import time

time.sleep(1000)
""",
        settings={"start_up_timeout_seconds": 8.0},
    ),
}

DOES_NOT_PLAY = {
    "breaks_bounds_that_are_kept": Case(
        """
class Agent:
    def act(self, observation):
        return [2.5]
""",
        benchmark=PENDULUM,
        config={"out_of_bounds_actions": "fault"},
    ),
    "raises": Case(
        """
class Agent:
    def __init__(self):
        self.step = 0

    def act(self, observation):
        self.step += 1
        return self.plan[self.step] if self.step > 5 else self.step % 2
"""
    ),
    "reset_takes_too_little": Case(
        """
class Agent:
    def reset(self):
        pass

    def act(self, observation):
        return 0
"""
    ),
    "wrong_shape": Case(
        """
import numpy as np


class Agent:
    def act(self, observation):
        return np.zeros(2)
""",
        benchmark=PENDULUM,
    ),
    "wrong_dtype": Case(
        """
class Agent:
    def act(self, observation):
        return [True]
""",
        benchmark=PENDULUM,
    ),
    "out_of_range": Case(
        """
class Agent:
    def act(self, observation):
        return 2
"""
    ),
    "returns_nothing": Case(
        """
class Agent:
    def act(self, observation):
        print(observation)
"""
    ),
    "returns_what_cannot_be_sent": Case(
        """
class Agent:
    def act(self, observation):
        return {0, 1}
"""
    ),
    "not_a_number": Case(
        """
class Agent:
    def act(self, observation):
        return [float("nan")]
""",
        benchmark=PENDULUM,
    ),
    "infinite": Case(
        """
class Agent:
    def act(self, observation):
        return [float("inf")]
""",
        benchmark=PENDULUM,
    ),
    "crashes": Case(
        """
import os


class Agent:
    def __init__(self):
        self.step = 0

    def act(self, observation):
        self.step += 1
        if self.step > 5:
            os.abort()
        return self.step % 2
"""
    ),
    "exits": Case(
        """
import os


class Agent:
    def act(self, observation):
        print("that is enough", flush=True)
        os._exit(0)
"""
    ),
    "hangs": Case(
        """
import time


class Agent:
    def act(self, observation):
        print("thinks", flush=True)
        time.sleep(1000)
""",
        config={"step_timeout_seconds": 0.5},
    ),
    "hangs_in_reset": Case(
        """
import time


class Agent:
    def reset(self, episode, seed):
        time.sleep(1000)

    def act(self, observation):
        return 0
""",
        settings={"reset_timeout_seconds": 0.5},
    ),
    "cannot_be_made_twice": Case(
        """
class Agent:
    made = 0

    def __init__(self):
        Agent.made += 1
        if Agent.made > 1:
            raise RuntimeError("the GPU is taken")

    def act(self, observation):
        return 0
"""
    ),
}

DOES_NOT_REPEAT = {
    "keeps_state": Case(
        """
class Agent:
    def __init__(self):
        self.step = 0

    def act(self, observation):
        self.step += 1
        return self.step // 7 % 2
"""
    ),
    "keeps_state_in_the_class": Case(
        """
class Agent:
    steps = 0

    def act(self, observation):
        Agent.steps += 1
        return Agent.steps // 7 % 2
"""
    ),
    "draws_from_the_global_generator": Case(
        """
import random

random.seed(1)


class Agent:
    def act(self, observation):
        return random.randrange(2)
"""
    ),
    "counts_instances": Case(
        """
class Agent:
    made = 0

    def __init__(self):
        Agent.made += 1
        self.number = Agent.made

    def act(self, observation):
        return self.number % 2
"""
    ),
    "acts_by_chance": Case(
        """
import random


class Agent:
    def act(self, observation):
        return [random.random()]
""",
        benchmark=PENDULUM,
        varies=True,
    ),
    "draws_weights_in_the_constructor": Case(
        """
import random


class Agent:
    def __init__(self):
        self.weight = random.random()

    def act(self, observation):
        return [self.weight]
""",
        benchmark=PENDULUM,
        varies=True,
    ),
    "draws_weights_when_imported": Case(
        """
import random

WEIGHT = random.random()


class Agent:
    def act(self, observation):
        return [WEIGHT]
""",
        benchmark=PENDULUM,
        varies=True,
    ),
}

HAS_WARNINGS = {
    "out_of_bounds": Case(
        """
class Agent:
    def act(self, observation):
        return [3.0 * observation[2]]
""",
        benchmark=PENDULUM,
    ),
    "slow": Case(
        """
import time


class Agent:
    def act(self, observation):
        time.sleep(1.2)
        return 0
""",
        config={"step_timeout_seconds": 2.0, "max_episode_steps": 1},
        varies=True,
    ),
    "whole_chunks": Case(
        """
class Agent:
    def act(self, observation):
        return [0, 1, 0]
"""
    ),
    "last_digits": Case(
        """
import random


class Agent:
    def act(self, observation):
        return [0.5 + 1e-7 * random.random()]
""",
        benchmark=PENDULUM,
        varies=True,
    ),
}

RIGHT = {
    "right": Case(
        """
import numpy as np


class Agent:
    def __init__(self, observation_space, action_space):
        self.random = np.random.default_rng(0)

    def reset(self, episode, seed):
        self.random = np.random.default_rng(seed)

    def act(self, observation):
        return self.random.integers(2)
"""
    ),
}
