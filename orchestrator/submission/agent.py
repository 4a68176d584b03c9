"""What a submission's author writes: a class `Agent` in `agent.py`. Inheriting from this one is optional."""

from __future__ import annotations

from typing import Any


class Agent:
    """A policy. One instance serves one connection, and so one episode at a time.

    Several instances live in one process, each in a thread of its own: keep state in `self`, and draw random
    numbers from a generator made in `reset`, never from a module's global one. Then the same job gives the
    same returns, whatever the number of workers.

    The constructor takes no required arguments. It may take `observation_space` and `action_space`
    (gymnasium spaces, or None where they are not known). Files beside `agent.py` are found by relative paths:
    that directory is the working directory.
    """

    def act(self, observation: Any) -> Any:
        """The action for one observation.

        `observation` is a dict of arrays, scalars and texts, as the benchmark names them; where it has only
        the key "observation", it is that value itself. Returns an array, a scalar, a list, or a dict of
        arrays for a Dict action space. A dict with the key "actions" is taken as the whole reply.

        An exception fails the episode, and its traceback is in the job's result.
        """
        raise NotImplementedError("class Agent needs a method act(self, observation)")

    def reset(self, episode: int, seed: int) -> None:
        """Called before the first observation of every episode: forget the last one, seed the generator.

        `seed` is of 31 bits, the same for every run of this episode, and not the environment's seed.
        """
