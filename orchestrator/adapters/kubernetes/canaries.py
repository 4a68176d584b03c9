"""Two pods that are made like a submission's, and run our probe: what they reach, and who reaches them.

The first one stays and listens on the RPC port; the second one tries to reach it, and everything else. They
are removed whatever happens; should this process be killed, their expiry has the reconciler do it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID, uuid4

import structlog

from orchestrator.adapters.kubernetes.preflight_api import ApiRefused, Json, Paths, PodMaker, PreflightApi
from orchestrator.adapters.kubernetes.preflight_network import NODE, OTHER_POD, CanaryFindings
from orchestrator.domain.errors import InfrastructureError
from orchestrator.submission.probe import BANNER_PREFIX, ProbeReport
from orchestrator.submission.sealing import Address

log = structlog.get_logger(__name__)

RPC_PORT = 8000
EXPIRES_AT = "orchestrator.dev/expires-at"
KUBELET_PORT = 10250
INTERNET = Address("1.1.1.1", 443)
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 1.0
CONNECT_SECONDS = 3.0
CONNECT_TRIES = 4
ATTEMPTS = 2
REMOVAL_SECONDS = 30.0
SEAL_SECONDS = 20.0
REPORT_SECONDS = SEAL_SECONDS + 20.0
STAY_SECONDS = 240.0
_ENDED = ("Succeeded", "Failed")
_NAMESERVER = re.compile(r"^\s*nameserver\s+(\S+)", re.MULTILINE)


class CanaryTrouble(Exception):
    """A canary has nothing to say, for the reason in the text."""


@dataclass(frozen=True, slots=True)
class Canary:
    """A pod of ours that runs."""

    name: str
    role: str
    nonce: str
    address: str
    host_address: str | None


@dataclass(frozen=True)
class Canaries:
    """Runs canaries; each step has `start_seconds` at most."""

    api: PreflightApi
    maker: PodMaker
    start_seconds: float = 120.0
    dns_servers: tuple[str, ...] = ()

    async def look(self) -> CanaryFindings:
        """What they saw; what keeps them from it is said in the findings."""
        trouble = ""
        await self._sweep()
        for _ in range(ATTEMPTS):
            try:
                return await self._look()
            except CanaryTrouble as error:
                return CanaryFindings(trouble=str(error))
            except (ApiRefused, InfrastructureError) as error:
                trouble = f"a canary pod cannot be run: {error}"
        return CanaryFindings(trouble=trouble)

    async def _sweep(self) -> None:
        """Remove the expired canaries of our own, of a process that was killed."""
        paths, query = Paths(self.maker.namespace), {"labelSelector": self.maker.canary_selector}
        for plural in ("pods", "configmaps"):
            try:
                found = await self.api.call("GET", paths.of(plural), query=query)
                for each in found.get("items") or []:
                    if is_expired(each):
                        await self.api.call("DELETE", paths.of(plural, each["metadata"]["name"]))
            except (ApiRefused, InfrastructureError) as error:
                log.warning("old_canaries_not_removed", kind=plural, why=str(error))

    async def _look(self) -> CanaryFindings:
        async with self._canary("listener", self._targets(), stays=True) as listener:
            peer = Address(listener.address, RPC_PORT)
            targets = [*self._targets(), f"--tcp={OTHER_POD}={peer}"]
            if listener.host_address:
                targets.append(f"--tcp={NODE}={Address(listener.host_address, KUBELET_PORT)}")
            async with self._canary("prober", targets, stays=False) as prober:
                dialling = asyncio.create_task(connects(peer, listener.nonce))
                try:
                    reports = await self._report(listener), await self._report(prober)
                    return CanaryFindings(reports, await dialling)
                finally:
                    dialling.cancel()
                    await asyncio.wait({dialling})

    def _targets(self) -> list[str]:
        return [f"--tcp=the internet={INTERNET}", *(f"--dns={server}" for server in self.dns_servers)]

    @asynccontextmanager
    async def _canary(self, role: str, targets: Sequence[str], *, stays: bool) -> AsyncIterator[Canary]:
        """A canary that runs, for the block."""
        container_id, nonce = uuid4(), uuid4().hex
        command = [
            *("python", "-m", "orchestrator.submission.probe", "--host", "0.0.0.0"),  # noqa: S104 - in a pod
            *("--port", str(RPC_PORT), "--nonce", nonce, "--seal-timeout", f"{SEAL_SECONDS:g}"),
            *targets,
            *(["--stay", f"{STAY_SECONDS:g}"] if stays else []),
        ]
        try:
            pod = await self._create(container_id, command)
            name = pod["metadata"]["name"]
            status = await self._started(name, role)
            yield Canary(name, role, nonce, status["podIP"], status.get("hostIP"))
        finally:
            # To its end also when this is cancelled: then once more, with nobody waiting for more than that.
            await _to_the_end(self._remove(container_id))

    async def _create(self, container_id: UUID, command: Sequence[str]) -> Json:
        paths = Paths(self.maker.namespace)
        anchor = await self.api.call(
            "POST", paths.of("configmaps"), body=self.maker.anchor(container_id, canary=True)
        )
        pod = self.maker.pod(container_id, anchor["metadata"]["uid"], canary=True, command=command)
        return await self.api.call("POST", paths.of("pods"), body=pod)

    async def _started(self, name: str, role: str) -> Json:
        """Its status once it runs, or has run.

        Raises:
            CanaryTrouble: it did not start, with what Kubernetes says of it.
        """
        deadline, pause, why = time.monotonic() + self.start_seconds, FIRST_PAUSE_SECONDS, ""
        while time.monotonic() < deadline:
            status: Json = (await self._pod(name, role)).get("status") or {}
            started = status.get("phase") in ("Running", *_ENDED)
            if started and status.get("podIP"):
                return status
            if status.get("phase") in _ENDED:
                raise CanaryTrouble(f"the {role} canary pod ended before it ran: {_why(status)}")
            why = _why(status) or why
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, LONGEST_PAUSE_SECONDS)
        why = why or await self._events(name) or "no reason is given"
        raise CanaryTrouble(f"the {role} canary pod did not start within {self.start_seconds:g} s: {why}")

    async def _report(self, canary: Canary) -> ProbeReport:
        """What a canary says.

        Raises:
            CanaryTrouble: nothing, or it is gone.
        """
        deadline, pause = time.monotonic() + REPORT_SECONDS, FIRST_PAUSE_SECONDS
        said = ""
        while time.monotonic() < deadline:
            # The state before the log: all that a pod has printed is there once it is known to have ended.
            status: Json = (await self._pod(canary.name, canary.role)).get("status") or {}
            try:
                said = await self.api.log(self.maker.namespace, canary.name)
            except ApiRefused as refused:
                said = str(refused)
                if refused.status == 403:  # a right that is not gained
                    break
            report = ProbeReport.find(said, canary.nonce)
            if report is not None:
                return report
            if status.get("phase") in _ENDED:
                break
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, LONGEST_PAUSE_SECONDS)
        raise CanaryTrouble(
            f"a canary pod said nothing of use: {said[-500:].strip() or 'its log is empty'}; the image "
            "(kubernetes_image) has to be the submission base image of this version"
        )

    async def _pod(self, name: str, role: str) -> Json:
        try:
            return await self.api.call("GET", Paths(self.maker.namespace).of("pods", name))
        except ApiRefused as refused:
            if refused.status != 404:
                raise
            raise CanaryTrouble(f"somebody removed the {role} canary pod while it was needed") from None

    async def _events(self, name: str) -> str:
        """The newest event about a pod: why it stays in ContainerCreating is told there alone."""
        query = {"fieldSelector": f"involvedObject.name={name}"}
        try:
            found = await self.api.call("GET", Paths(self.maker.namespace).of("events"), query=query)
        except (ApiRefused, InfrastructureError):
            return ""
        warnings = [each for each in found.get("items", []) if each.get("type") == "Warning"]
        newest = max(warnings, key=lambda each: str(each.get("lastTimestamp") or ""), default=None)
        return "" if newest is None else f"{newest.get('reason')}: {newest.get('message')}"

    async def _remove(self, container_id: UUID) -> None:
        """Remove both objects, also where only one of them was made."""
        paths = Paths(self.maker.namespace)
        names = {
            "pods": self.maker.pod(container_id, "", canary=True)["metadata"]["name"],
            "configmaps": self.maker.anchor(container_id, canary=True)["metadata"]["name"],
        }
        deadline = time.monotonic() + REMOVAL_SECONDS
        for plural, name in names.items():
            pause = FIRST_PAUSE_SECONDS
            while True:
                try:
                    await self.api.call("DELETE", paths.of(plural, name))
                    break
                except ApiRefused as refused:
                    if refused.status == 404:
                        break
                    why, is_final = str(refused), refused.status == 403  # a right that is not gained
                except InfrastructureError as error:
                    why, is_final = str(error), False
                if is_final or time.monotonic() >= deadline:
                    log.warning("canary_left", kind=plural, name=name, why=why, next="it expires")
                    break
                await asyncio.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE_SECONDS)


def is_expired(stored: Json) -> bool:
    """Whether the time of an object of ours is over; one that names none is left alone."""
    expires_at = (stored["metadata"].get("annotations") or {}).get(EXPIRES_AT, "")
    try:
        return datetime.fromisoformat(expires_at) < datetime.now(UTC)
    except (ValueError, TypeError):
        return False


async def _to_the_end(work: object) -> None:
    """Wait for this work also while the caller is cancelled, which is passed on afterwards."""
    task = asyncio.ensure_future(work)  # type: ignore[call-overload]
    cancelled = False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise
            cancelled = True
    task.result()
    if cancelled:
        raise asyncio.CancelledError


def _why(status: Json) -> str:
    """What a pod that does not run says of it: its container's reason, or the scheduler's."""
    for container in status.get("containerStatuses") or []:
        waiting = (container.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") and waiting["reason"] != "ContainerCreating":
            return f"{waiting['reason']}: {waiting.get('message') or ''}".strip(": ")
    for condition in status.get("conditions") or []:
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return f"{condition.get('reason')}: {condition.get('message')}"
    return f"{status.get('reason') or ''}: {status.get('message') or ''}".strip(": ")


async def connects(address: Address, nonce: str) -> bool:
    """Whether this process can connect to the canary there; nobody else's answer counts."""
    for attempt in range(CONNECT_TRIES):
        if attempt:
            await asyncio.sleep(FIRST_PAUSE_SECONDS * 2**attempt)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                reader, writer = await asyncio.open_connection(address.host, address.port)
                try:
                    if await reader.readline() == BANNER_PREFIX + nonce.encode() + b"\n":
                        return True
                finally:
                    writer.close()
        except (OSError, ValueError):  # TimeoutError is one of the first
            continue
    return False


def dns_servers(resolv_conf: Path = Path("/etc/resolv.conf")) -> tuple[str, ...]:
    """Whom this machine asks for names; in a cluster that is the cluster's DNS."""
    try:
        found = _NAMESERVER.findall(resolv_conf.read_text())
    except OSError:
        return ()
    return tuple(dict.fromkeys(server for server in found if _can_be_dialled(server)))


def _can_be_dialled(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not address.is_loopback
