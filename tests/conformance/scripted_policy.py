"""The policy that every server of the conformance suite runs; also a submission's `agent.py`."""

import time


class Agent:
    def __init__(self):
        self.steps = 0

    def act(self, observation):
        self.steps += 1
        if observation["do"] == "raise":
            raise ValueError("the policy cannot go on")
        if observation["do"] == "stall":
            time.sleep(1.0)
        if observation["do"] == "count":
            return self.steps
        return observation["value"]
