"""Balances CartPole-v1 without looking at the velocities: it remembers the last positions and works them out.

An example of a policy with a memory. The memory belongs to one episode, so `reset` clears it; an evaluation
that forgot to call `reset`, or let episodes share an instance, would give other returns.
"""

# Seconds between two observations of CartPole-v1.
STEP_SECONDS = 0.02

# The weights of the cartpole example: cart position, cart velocity, pole angle, pole angular velocity.
WEIGHTS = (0.1, 0.35, 3.0, 1.0)

PUSH_LEFT, PUSH_RIGHT = 0, 1


class Agent:
    """What the evaluation calls: one instance for each connection."""

    def __init__(self):
        self._last_positions = None

    def reset(self, episode, seed):
        """An episode begins: nothing is known of the past."""
        self._last_positions = None

    def act(self, observation):
        """The push for one observation: float32 [4], of which only position and angle are used."""
        position, angle = float(observation[0]), float(observation[2])
        velocity, angular_velocity = self._velocities(position, angle)
        terms = (position, velocity, angle, angular_velocity)
        lean = sum(weight * term for weight, term in zip(WEIGHTS, terms, strict=True))
        return PUSH_RIGHT if lean > 0 else PUSH_LEFT

    def _velocities(self, position, angle):
        last = self._last_positions or (position, angle)
        self._last_positions = (position, angle)
        return (position - last[0]) / STEP_SECONDS, (angle - last[1]) / STEP_SECONDS
