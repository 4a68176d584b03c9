"""Solves Meta-World's MT benchmarks with the scripted policies that Meta-World brings, one for each task.

Needs the observation's goal and the task's name, so it is for MT1, MT10, MT25, MT50 and single tasks, not for
the ML benchmarks, which hide both. Needs the package `metaworld`, but none of its environments.
"""

import warnings

import numpy as np
from metaworld.policies import ENV_POLICY_MAP

# The scripts warn at most steps that the environment will clip what they ask for; here it is clipped anyway.
warnings.filterwarnings("ignore", message="Constant\\(s\\) may be too high")


class Agent:
    """What the evaluation calls: one instance for each connection."""

    def __init__(self):
        self._experts = {}

    def reset(self, episode, seed):
        """An episode begins: start with fresh experts, in case one keeps something in mind."""
        self._experts.clear()

    def act(self, observation):
        """The action for one observation.

        observation: a dict of "observation" (float64 [39]) and "task" ("reach-v3").
        returns: float32 [4]: the hand's move along x, y and z, and the gripper's effort, all in [-1, 1].
        """
        if not isinstance(observation, dict):
            raise ValueError("the experts need the task's name in the observation: evaluate an MT benchmark")
        task = observation["task"]
        if task not in self._experts:
            self._experts[task] = ENV_POLICY_MAP[task]()
        # Some scripts write into the array that they are given.
        action = self._experts[task].get_action(np.array(observation["observation"]))
        return np.clip(action, -1.0, 1.0).astype(np.float32)
