"""The kubernetes adapter as a backend of the suite: on the double, or on the cluster of the environment."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from orchestrator.settings import Settings
from tests.conformance.container_backends import Backend, Traits, remove_everything
from tests.kubernetes.adapters import command_of, open_adapter, settings_of_cluster, settings_of_double

if TYPE_CHECKING:
    from orchestrator.adapters.kubernetes.containers import KubernetesContainers

NEVER_LISTENED = "did not listen|in time|not ready"
ON_THE_DOUBLE = Traits(
    port=8000,
    deadline_seconds=30.0,
    never_listened=NEVER_LISTENED,
    lifetime_seconds=2.0,
    kept_log_bytes=10_000,
)
# An image may have to be pulled first, and a volume that overflows is noticed after more than a minute.
ON_A_CLUSTER = Traits(
    port=8000,
    deadline_seconds=180.0,
    never_listened=NEVER_LISTENED,
    lifetime_seconds=20.0,
    kept_log_bytes=10_000,
    memory_of_a_group=False,  # with cgroup v1 only the process is killed, and no trace is left
    bounded_disk=False,
)


class KubernetesBackend:
    """Adapters for one test, all closed after it."""

    def __init__(self, traits: Traits, settings: Settings) -> None:
        self.traits = traits
        self._settings = settings
        self._made: list[KubernetesContainers] = []

    def containers(self, script: str) -> KubernetesContainers:
        self._made.append(open_adapter(self._settings, command_of(script)))
        return self._made[-1]

    async def close(self, installation_id: UUID) -> None:
        try:
            await remove_everything(self.containers(""), installation_id)
        finally:
            for each in self._made:
                await each.close()


@asynccontextmanager
async def double_backend(directory: Path) -> AsyncIterator[Backend]:
    async with settings_of_double(directory) as settings:
        yield KubernetesBackend(ON_THE_DOUBLE, Settings(**settings))


@asynccontextmanager
async def cluster_backend(directory: Path) -> AsyncIterator[Backend]:
    async with settings_of_cluster(directory) as settings:
        yield KubernetesBackend(ON_A_CLUSTER, Settings(**settings))
