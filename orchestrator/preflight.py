"""Whether the cluster of the settings is fit for submissions: by hand, and before a control plane starts."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from uuid import NAMESPACE_DNS, UUID, uuid5

from orchestrator.adapters.kubernetes.canaries import dns_servers
from orchestrator.adapters.kubernetes.preflight import Preflight
from orchestrator.adapters.kubernetes.preflight_api import PodMaker, PreflightApi
from orchestrator.domain.errors import InfrastructureError, UsageError
from orchestrator.domain.preflight import Level, PreflightReport
from orchestrator.logging import get_logger
from orchestrator.settings import Settings

log = get_logger()


@dataclass(frozen=True, slots=True)
class PreflightParts:
    """A cluster, and how a submission's pod is made for it. `sandboxed`: with a kernel of its own."""

    api: PreflightApi
    maker: PodMaker
    in_cluster: bool
    sandboxed: bool


OpenParts = Callable[[Settings, UUID], AbstractAsyncContextManager[PreflightParts]]
"""Opens the cluster of the settings for a block; the UUID is whose the canaries are."""


async def preflight(
    settings: Settings, open_parts: OpenParts, installation_id: UUID | None = None
) -> PreflightReport:
    """What was found. Without an installation the canaries carry an id of this machine's own.

    Raises:
        UsageError: the settings name no cluster, or no image.
    """
    owner = installation_id or uuid5(NAMESPACE_DNS, f"{socket.gethostname()}.preflight.orchestrator")
    async with open_parts(settings, owner) as parts:
        look = Preflight(
            parts.api,
            parts.maker,
            in_cluster=parts.in_cluster,
            sandboxed=parts.sandboxed,
            accepted=frozenset(settings.kubernetes_accept_unsafe),
            start_seconds=settings.start_up_timeout_seconds,
            dns_servers=dns_servers(),
        )
        return await look.report()


async def require_safe(settings: Settings, open_parts: OpenParts, installation_id: UUID) -> None:
    """Return if submissions may run in the cluster of the settings; the table is in the log.

    Raises:
        UsageError: a setting has to be changed, or to accept by name what was found unsafe.
        InfrastructureError: something of the cluster is broken.
    """
    report = await preflight(settings, open_parts, installation_id)
    for each in report.findings:
        tell = log.info if each.level is Level.OK else log.warning
        tell(
            "preflight_finding",
            finding=str(each.name),
            state=report.mark(each),
            what=each.what,
            remedy=each.remedy,
        )
    if report.is_fine:
        return
    broken = any(each.level is Level.BROKEN for each in report.refusals)
    raise (InfrastructureError if broken else UsageError)(str(report))
