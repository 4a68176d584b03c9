"""Containers as pods of the cluster that the settings name, and what is looked at before they run there."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from secrets import token_bytes
from typing import Any
from uuid import UUID

from orchestrator.adapters.kubernetes import manifests
from orchestrator.adapters.kubernetes.access import ClusterAccess, Credentials
from orchestrator.adapters.kubernetes.api import KubernetesApi
from orchestrator.adapters.kubernetes.containers import KubernetesContainers
from orchestrator.adapters.kubernetes.manifests import HOST_COMMAND, PodTemplate, toleration
from orchestrator.domain.errors import UsageError
from orchestrator.ports import ContainerLimits, ContainerSpec
from orchestrator.preflight import PreflightParts
from orchestrator.settings import Settings

Json = dict[str, Any]

# A process that ends in the middle of a preflight leaves its canaries to their expiry.
CANARY_SECONDS = 600


def kubernetes_containers(settings: Settings, command: Sequence[str] | None = None) -> KubernetesContainers:
    """Containers with a watch of their own: one for a process. `command` stands in for the submission host.

    Raises:
        UsageError: the settings name no image.
    """
    return KubernetesContainers(
        KubernetesApi(ClusterAccess(credentials(settings))),
        pod_template(settings, command),
        unschedulable_seconds=settings.kubernetes_unschedulable_seconds,
    )


def credentials(settings: Settings) -> Credentials:
    """With which the API server is asked."""
    return Credentials(settings.kubernetes_config_file, settings.kubernetes_context)


def pod_template(settings: Settings, command: Sequence[str] | None = None) -> PodTemplate:
    """What all pods have in common, as set.

    Raises:
        UsageError: the settings name no image.
    """
    if settings.kubernetes_image is None:
        raise UsageError(
            "containers=kubernetes needs kubernetes_image, the submission base image pinned by its digest "
            "(docs/operate.md says how to build it)"
        )
    return PodTemplate(
        namespace=settings.kubernetes_namespace,
        image=settings.kubernetes_image,
        limits=ContainerLimits(
            memory_bytes=settings.kubernetes_default_memory_bytes,
            disk_bytes=settings.kubernetes_default_disk_bytes,
            cpus=settings.kubernetes_default_cpus,
        ),
        service_account=settings.kubernetes_service_account,
        runtime_class=settings.kubernetes_runtime_class,
        user_namespaces=settings.kubernetes_user_namespaces,
        node_selector=tuple(_pair(label) for label in settings.kubernetes_node_selector),
        tolerations=tuple(toleration(taint) for taint in settings.kubernetes_tolerations),
        priority_class=settings.kubernetes_priority_class,
        pull_secrets=settings.kubernetes_pull_secrets,
        gpu_resource=settings.kubernetes_gpu_resource,
        command=tuple(command) if command is not None else _host_command(settings),
    )


def _pair(label: str) -> tuple[str, str]:
    key, _, value = label.partition("=")
    return key, value


def _host_command(settings: Settings) -> tuple[str, ...]:
    return (
        *HOST_COMMAND,
        *("--environment-timeout", f"{settings.environment_timeout_seconds:g}"),
        *("--max-archive-bytes", str(settings.archive_max_bytes)),
    )


@dataclass(frozen=True)
class CanaryMaker:
    """`PodMaker`: the submissions' own builder, for preflight."""

    template: PodTemplate
    owner: UUID

    @property
    def namespace(self) -> str:
        return self.template.namespace

    @property
    def canary_selector(self) -> str:
        return manifests.selector_of(self.owner, manifests.CANARY)

    def anchor(self, container_id: UUID, *, canary: bool) -> Json:
        return manifests.anchor(self.template, self._spec(container_id), _component(canary))

    def pod(
        self, container_id: UUID, anchor_uid: str, *, canary: bool, command: Sequence[str] | None = None
    ) -> Json:
        template = self.template if command is None else replace(self.template, command=tuple(command))
        spec = self._spec(container_id)
        return manifests.pod(template, spec, anchor_uid, datetime.now(UTC), _component(canary))

    def _spec(self, container_id: UUID) -> ContainerSpec:
        return ContainerSpec(
            container_id=container_id,
            installation_id=self.owner,
            job_id=0,
            attempt=0,
            expires_at=datetime.now(UTC) + timedelta(seconds=CANARY_SECONDS),
            session_key=token_bytes(32),
        )


def _component(canary: bool) -> str:
    return manifests.CANARY if canary else manifests.CONTAINER


@asynccontextmanager
async def open_preflight_parts(settings: Settings, owner: UUID) -> AsyncIterator[PreflightParts]:
    """The cluster of the settings, and a maker of canaries that are `owner`'s.

    Raises:
        UsageError: the settings name no image.
    """
    found = credentials(settings)
    api = KubernetesApi(ClusterAccess(found))
    try:
        yield PreflightParts(
            api=api,
            maker=CanaryMaker(pod_template(settings), owner),
            in_cluster=found.in_cluster,
            sandboxed=settings.kubernetes_runtime_class is not None,
        )
    finally:
        await api.close()
