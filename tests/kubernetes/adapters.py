"""Kubernetes adapters for tests: what they run, what they talk to, and how they are let go of."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import orchestrator
from orchestrator.ports import Containers, ContainerSpec, Evidence
from orchestrator.settings import Settings
from tests.kubernetes_double import ApiDouble, PodControl

if TYPE_CHECKING:
    from orchestrator.adapters.kubernetes.containers import KubernetesContainers

IMAGE_REPOSITORY = "registry.example/orchestrator-submission"
IMAGE = f"{IMAGE_REPOSITORY}@sha256:{'0' * 64}"
DEADLINE_SECONDS = 30.0
ADAPTER_IS_HERE = (
    Path(orchestrator.__file__).with_name("adapters") / "kubernetes" / "containers.py"
).is_file()
ON_A_CLUSTER = "for a real cluster set KUBECONFIG and ORCHESTRATOR_KUBERNETES_IMAGE: docs/testing.md"

# PID 1 of a container gets no signal that it has no handler for, also not from itself: it exits with the code
# that the runtime would report. Only a real fault ends it as one.
PRELUDE = """
import os, signal, socket, sys, time
signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
def ready():
    global listener
    listener = socket.create_server((sys.argv[1], 8000))
def read_key():
    return os.environ["ORCHESTRATOR_SESSION_KEY"]
def die_of(number):
    if number == signal.SIGSEGV:
        import ctypes
        ctypes.string_at(0)
    os._exit(128 + number)
"""


def command_of(script: str) -> list[str]:
    """What a pod runs in place of the submission host; the address to listen on is an argument of its own."""
    return ["python", "-u", "-c", PRELUDE + script, "0.0.0.0"]


def settings_on(kubeconfig: Path, **more: Any) -> dict[str, Any]:
    """The settings of an installation whose submissions run on the cluster of this kubeconfig."""
    return {
        "containers": "kubernetes",
        "kubernetes_config_file": kubeconfig,
        "kubernetes_image": IMAGE,
        "kubernetes_allowed_images": (IMAGE_REPOSITORY,),
        **more,
    }


def variables_for(kubeconfig: Path) -> dict[str, str]:
    """The same for a command, as its environment. The double's pods are plain processes, in no network."""
    return {
        "ORCHESTRATOR_KUBERNETES_ACCEPT_UNSAFE": "container,network",
        "KUBECONFIG": str(kubeconfig),
        "ORCHESTRATOR_KUBERNETES_IMAGE": IMAGE,
        "ORCHESTRATOR_KUBERNETES_ALLOWED_IMAGES": IMAGE_REPOSITORY,
    }


def open_adapter(settings: Settings, command: Sequence[str] | None = None) -> KubernetesContainers:
    """An adapter as a process of the control plane has it; here alone the tests make one."""
    from orchestrator.cluster_containers import kubernetes_containers

    return kubernetes_containers(settings, command=command)


class Adapters:
    """Makes adapters, each a control plane's process of its own, and closes what a test forgot."""

    def __init__(self, double: ApiDouble, directory: Path) -> None:
        self._double = double
        self._directory = directory
        self._made: list[KubernetesContainers] = []
        self.token_file = directory / "token"
        self.token_file.write_text(double.token)

    def settings(self, url: str | None = None, **more: Any) -> Settings:
        """Settings that lead to the double, or to a proxy in front of it at `url`."""
        path = self._directory / f"kubeconfig-{len(self._made)}"
        self._double.write_kubeconfig(path, url, self.token_file)
        return Settings(**settings_on(path, **more))

    def waiting(self, **settings: Any) -> KubernetesContainers:
        """An adapter whose pods listen and wait to be ended."""
        return self.running("ready(); signal.pause()", **settings)

    def running(self, script: str, url: str | None = None, **settings: Any) -> KubernetesContainers:
        """An adapter whose pods run this script as their submission host."""
        made = open_adapter(self.settings(url, **settings), command_of(script))
        self._made.append(made)
        return made

    async def close(self, containers: KubernetesContainers) -> None:
        self._made.remove(containers)
        await containers.close()

    async def close_all(self) -> None:
        for containers in list(self._made):
            await self.close(containers)


@asynccontextmanager
async def settings_of_double(directory: Path) -> AsyncIterator[dict[str, Any]]:
    """Settings that lead to a double of its own for the block."""
    if not ADAPTER_IS_HERE:
        pytest.skip("the adapter for Kubernetes is not part of this tree")
    async with ApiDouble() as double:
        yield settings_on(double.write_kubeconfig(directory / "kubeconfig"))


@asynccontextmanager
async def settings_of_cluster(directory: Path) -> AsyncIterator[dict[str, Any]]:
    """Settings that lead to the cluster of KUBECONFIG; all else comes from ORCHESTRATOR_KUBERNETES_*."""
    if not os.environ.get("KUBECONFIG") or not os.environ.get("ORCHESTRATOR_KUBERNETES_IMAGE"):
        pytest.skip(ON_A_CLUSTER)
    yield {"containers": "kubernetes"}


async def preflight_on(adapters: Adapters) -> str:
    """What `orchestrator preflight` prints."""
    from orchestrator.cluster_containers import open_preflight_parts
    from orchestrator.preflight import preflight

    return str(await preflight(adapters.settings(), open_preflight_parts))


def pod_of(double: ApiDouble, spec: ContainerSpec) -> PodControl:
    """The pod of this container."""
    return double.pod(f"submission-{spec.container_id.hex}")


async def end_of(containers: Containers, handle: str) -> Evidence:
    """The evidence once the container has ended."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while (evidence := await containers.evidence(handle)).running:
            await asyncio.sleep(0.02)
    return evidence
