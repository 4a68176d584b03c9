"""Balances CartPole-v1 by chance: the more the pole leans to a side, the likelier it pushes to that side.

An example of a policy with random numbers that can be repeated: they come from a generator of its own, seeded
by the `seed` of `reset`. The same episode gives the same pushes on any worker; Python's or NumPy's global
generators would not.
"""

import math

import numpy as np

# The weights of the cartpole example: cart position, cart velocity, pole angle, pole angular velocity.
WEIGHTS = (0.1, 0.35, 3.0, 1.0)

# How sure it is: 0 would be a coin, infinity the cartpole example.
SHARPNESS = 3.0

PUSH_LEFT, PUSH_RIGHT = 0, 1


class Agent:
    """What the evaluation calls: one instance for each connection."""

    def __init__(self):
        self._random = np.random.default_rng(0)

    def reset(self, episode, seed):
        """An episode begins: its chances depend on `seed` alone."""
        self._random = np.random.default_rng(seed)

    def act(self, observation):
        """The push for one observation: float32 [4]."""
        lean = sum(weight * float(value) for weight, value in zip(WEIGHTS, observation, strict=True))
        chance_of_right = 1.0 / (1.0 + math.exp(-SHARPNESS * lean))
        return PUSH_RIGHT if self._random.random() < chance_of_right else PUSH_LEFT
