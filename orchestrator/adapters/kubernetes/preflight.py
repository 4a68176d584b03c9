"""Looks at a cluster before submissions run there, with the rights of the control plane and no others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar
from uuid import uuid4

from orchestrator.adapters.kubernetes.canaries import Canaries
from orchestrator.adapters.kubernetes.preflight_admission import (
    WEAKENINGS,
    Refusal,
    is_weak,
    judge_admission_policy,
    judge_own_pod,
    judge_pod_security,
    unrestricted,
    weakened,
)
from orchestrator.adapters.kubernetes.preflight_api import ApiRefused, Json, Paths, PodMaker, PreflightApi
from orchestrator.adapters.kubernetes.preflight_network import (
    CanaryFindings,
    judge_canaries,
    judge_policies,
)
from orchestrator.adapters.kubernetes.preflight_rights import REVIEWS_PATH, Right, judge_rights, questions
from orchestrator.domain.errors import InfrastructureError
from orchestrator.domain.preflight import Finding, Level, PreflightReport, Unsafe

T = TypeVar("T")

VERSION_PATH = "/version"
OLDEST_VERSION = (1, 30)  # where ValidatingAdmissionPolicy is there for certain
AT_ONCE = 8


@dataclass(frozen=True)
class Preflight:
    """One look, at the namespace of `maker`. `in_cluster`: our account is that of a pod."""

    api: PreflightApi
    maker: PodMaker
    in_cluster: bool
    sandboxed: bool
    accepted: frozenset[str] = frozenset()
    start_seconds: float = 120.0
    dns_servers: tuple[str, ...] = ()

    async def report(self) -> PreflightReport:
        """All that was found; never raises for what it finds."""
        place = f"namespace {self.maker.namespace}"
        try:
            version = await self.api.call("GET", VERSION_PATH)
        except (ApiRefused, InfrastructureError) as error:
            return PreflightReport(place, (_unreachable(error),), self.accepted)
        findings = [_version(version)]
        findings += await self._guarded(self._rights, "needed-rights")
        own, admission = await self._guarded_admission()
        findings += admission
        seen = await self._canaries(own)
        findings += await self._guarded(lambda: self._policies(seen), Unsafe.NETWORK_POLICY)
        findings += judge_canaries(seen, in_cluster=self.in_cluster, sandboxed=self.sandboxed)
        if not self.sandboxed:
            findings.append(_shares_kernel())
        return PreflightReport(place, tuple(findings), self.accepted)

    async def _guarded(self, look: Callable[[], Awaitable[list[Finding]]], name: str) -> list[Finding]:
        """What was found; a look that the API server does not allow is a finding, too."""
        try:
            return await look()
        except (ApiRefused, InfrastructureError) as error:
            return [Finding(name, Level.BROKEN, f"could not be looked at: {error}", "see `needed-rights`")]

    async def _guarded_admission(self) -> tuple[Refusal | None, list[Finding]]:
        try:
            return await self._admission()
        except InfrastructureError as error:
            refusal = Refusal(0, str(error))
            return refusal, [judge_own_pod(refusal)]

    async def _rights(self) -> list[Finding]:
        namespace = self.maker.namespace
        asked = list(questions(namespace))

        async def held(right: Right, where: str) -> bool:
            answer = await self.api.call("POST", REVIEWS_PATH, body=right.review(where))
            return bool((answer.get("status") or {}).get("allowed"))

        answers = await _at_once([partial(held, right, where) for right, where in asked])
        return list(
            judge_rights(dict(zip(asked, answers, strict=True)), namespace, in_cluster=self.in_cluster)
        )

    async def _admission(self) -> tuple[Refusal | None, list[Finding]]:
        pod = self.maker.pod(uuid4(), str(uuid4()), canary=False)
        tries = [
            partial(self._dry_run, pod),
            partial(self._dry_run, unrestricted(pod)),
            *(partial(self._dry_run, weakened(pod, weakness), weakness) for weakness in WEAKENINGS),
        ]
        own, loose, *weak = await _at_once(tries)
        findings = [
            judge_own_pod(own),
            judge_pod_security(loose, own),
            judge_admission_policy(dict(zip(WEAKENINGS, weak, strict=True)), own),
        ]
        return own, findings

    async def _dry_run(self, pod: Json, weakness: str = "") -> Refusal | None:
        try:
            path = Paths(self.maker.namespace).of("pods")
            created = await self.api.call("POST", path, query={"dryRun": "All"}, body=pod)
        except ApiRefused as refused:
            return Refusal(refused.status, refused.message)
        return None if is_weak(created, weakness) else Refusal(0, f"let in without {weakness}")

    async def _canaries(self, own: Refusal | None) -> CanaryFindings:
        if own is not None and not own.is_of_quota:
            return CanaryFindings(trouble="no canary can run where the namespace does not take our pod")
        return await Canaries(self.api, self.maker, self.start_seconds, self.dns_servers).look()

    async def _policies(self, seen: CanaryFindings) -> list[Finding]:
        found = await self.api.call("GET", Paths(self.maker.namespace).network_policies)
        labels = self.maker.pod(uuid4(), "", canary=False)["metadata"]["labels"]
        return [judge_policies(found.get("items") or [], labels, seen)]


async def _at_once(calls: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """The answers to all calls in their order, some of them at once."""
    places = asyncio.Semaphore(AT_ONCE)

    async def one(call: Callable[[], Awaitable[T]]) -> T:
        async with places:
            return await call()

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(call)) for call in calls]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _unreachable(error: Exception) -> Finding:
    return Finding(
        "api",
        Level.BROKEN,
        f"the API server does not answer: {error}",
        "in a pod, see that it has a token and that its egress to the API server is allowed; elsewhere, set "
        "kubernetes_config_file and kubernetes_context, and see that `kubectl version` works with them",
    )


def _version(version: Json) -> Finding:
    said = str(version.get("gitVersion") or "no version")
    digits = [
        "".join(filter(str.isdigit, str(version.get(part) or "0"))) or "0" for part in ("major", "minor")
    ]
    if (int(digits[0]), int(digits[1])) < OLDEST_VERSION:
        oldest = ".".join(map(str, OLDEST_VERSION))
        return Finding(
            "api", Level.WARNING, f"the API server answers; it is {said}", f"use Kubernetes {oldest} or later"
        )
    return Finding("api", Level.OK, f"the API server answers; it is {said}")


def _shares_kernel() -> Finding:
    return Finding(
        "runtime-class",
        Level.WARNING,
        "submissions share the kernel of their node: no runtime class is set",
        "where the cluster has gVisor or Kata Containers, name its RuntimeClass in kubernetes_runtime_class",
    )
