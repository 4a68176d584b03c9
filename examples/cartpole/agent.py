"""Balances CartPole-v1 with a linear controller: no learning, no dependency, no state.

The pole is kept up by pushing the cart under it. Which way to push is the sign of a weighted sum of the four
numbers that are observed; the weights on velocities damp the swing.
"""

# For cart position (m), cart velocity (m/s), pole angle (rad) and pole angular velocity (rad/s). The pole
# counts most; the small weights of the cart make it lean back to the middle, so that it never leaves
# the track within the 500 steps of an episode.
WEIGHTS = (0.1, 0.35, 3.0, 1.0)

PUSH_LEFT, PUSH_RIGHT = 0, 1


class Agent:
    """What the evaluation calls: one instance for each connection."""

    def act(self, observation):
        """The push for one observation: float32 [4], in the order of WEIGHTS."""
        lean = sum(weight * float(value) for weight, value in zip(WEIGHTS, observation, strict=True))
        return PUSH_RIGHT if lean > 0 else PUSH_LEFT
