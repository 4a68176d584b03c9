"""What a worker keeps between episodes: environments by task, and its connection to the policy."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import suppress

from orchestrator.actors.episode_runner import simulated
from orchestrator.domain.errors import PolicyError
from orchestrator.logging import get_logger
from orchestrator.ports import Benchmark, Environment, PolicyConnection, PolicyConnector

log = get_logger()

CACHED_ENVIRONMENTS = 16


class EnvironmentCache:
    """The environments of a worker by task; the least recently used one is closed when there are too many."""

    def __init__(self, benchmark: Benchmark, capacity: int = CACHED_ENVIRONMENTS) -> None:
        self.benchmark = benchmark
        self._capacity = capacity
        self._environments: OrderedDict[str, Environment] = OrderedDict()

    def get(self, task_id: str) -> Environment:
        """The environment of the task, made if need be.

        Raises:
            EnvironmentFailed: it could not be made.
        """
        if task_id in self._environments:
            self._environments.move_to_end(task_id)
            return self._environments[task_id]
        while len(self._environments) >= self._capacity:
            self._close(*self._environments.popitem(last=False))
        environment = self._environments[task_id] = simulated(self.benchmark.make, task_id)
        return environment

    def discard(self, task_id: str) -> None:
        environment = self._environments.pop(task_id, None)
        if environment is not None:
            self._close(task_id, environment)

    def close(self) -> None:
        while self._environments:
            self._close(*self._environments.popitem())

    def _close(self, task_id: str, environment: Environment) -> None:
        try:
            environment.close()
        except Exception:
            log.warning("environment_not_closed", task_id=task_id, exc_info=True)


class PolicyLine:
    """The worker's connection to the policy: kept across episodes where that is safe, else opened anew.

    A server gives each connection a policy instance of its own. One connection serves several episodes only
    if the policy can be told that an episode begins, or keeps nothing between steps anyway.
    """

    def __init__(
        self, connector: PolicyConnector, *, stateless: bool, connect_timeout_seconds: float
    ) -> None:
        self._connector = connector
        self._stateless = stateless
        self._connect_timeout_seconds = connect_timeout_seconds
        self._connection: PolicyConnection | None = None

    def connection(self) -> PolicyConnection:
        """A connection on which an episode may begin.

        Raises:
            PolicyError: none could be opened.
        """
        if self._connection is None:
            self._connection = self._connector.connect(self._connect_timeout_seconds)
        return self._connection

    def release(self, *, sound: bool) -> None:
        """The episode is over; only a `sound` connection is ever used again."""
        connection = self._connection
        if connection is not None and not (sound and (self._stateless or connection.supports_reset)):
            self.close()

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(PolicyError, OSError):
                connection.close()
