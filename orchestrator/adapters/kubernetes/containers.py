"""`Containers` as hardened pods of a cluster: a submission can touch nothing but its RPC connection."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import structlog

from orchestrator.adapters.kubernetes import manifests
from orchestrator.adapters.kubernetes.api import KubernetesApi, persistently
from orchestrator.adapters.kubernetes.evidence import GONE, view_of
from orchestrator.adapters.kubernetes.manifests import PodTemplate
from orchestrator.adapters.kubernetes.objects import AttemptObjects, NoRoom
from orchestrator.adapters.kubernetes.pod_record import PodRecord
from orchestrator.adapters.kubernetes.preflight_api import ApiRefused, Paths
from orchestrator.adapters.kubernetes.readiness import Ended, Patience, Readiness, dial
from orchestrator.adapters.kubernetes.watch import PodWatch
from orchestrator.domain.errors import InfrastructureError, OrchestratorError, SubmissionError
from orchestrator.domain.log_text import shown
from orchestrator.ports import ContainerSpec, Endpoint, Evidence, OwnedContainer, Verdict

log = structlog.get_logger(__name__)

Json = dict[str, Any]

BACKEND = "kubernetes"
# An API server that is away for minutes must not fail a job.
API_PATIENCE_SECONDS = 600.0
LOG_SECONDS = 30.0
LIST_SECONDS = 30.0
CLEAN_UP_SECONDS = 20.0
LOG_LINES = 200
ERROR_LOG_BYTES = 8192
ROOM_PAUSE_SECONDS = 2.0
# Several questions for the same pod in so short a time get one answer.
FRESH_SECONDS = 1.0
# It takes a control plane about 50 s to find out that a node is dead.
NODE_DOUBT_SECONDS = 75.0
NODE_LOOK_SECONDS = 5.0
_NAME = re.compile(r"(submission|canary)-([0-9a-f]{32})")


@dataclass(frozen=True, slots=True)
class Handle:
    """Both objects of an attempt have this name."""

    namespace: str
    name: str

    def encode(self) -> str:
        return json.dumps({"backend": BACKEND, "namespace": self.namespace, "name": self.name})

    @classmethod
    def decode(cls, text: str) -> Handle | None:
        """The handle that `encode` wrote; None for what is none of ours."""
        try:
            data = json.loads(text)
            named = data["backend"] == BACKEND and _NAME.fullmatch(data["name"])
            return cls(str(data["namespace"]), data["name"]) if named else None
        except (ValueError, KeyError, TypeError):
            return None


class KubernetesContainers:
    """Implements `Containers`; one for a process and its event loop, with one watch. `close` ends it."""

    def __init__(
        self,
        api: KubernetesApi,
        template: PodTemplate,
        *,
        unschedulable_seconds: float,
        api_patience_seconds: float = API_PATIENCE_SECONDS,
    ) -> None:
        self._api = api
        self._template = template
        self._unschedulable_seconds = unschedulable_seconds
        self._api_patience_seconds = api_patience_seconds
        self._watch = PodWatch(api, template.namespace)
        self._pending: dict[str, ContainerSpec] = {}  # what a quota had no room for

    async def close(self) -> None:
        """Let go of watch and connections; what runs goes on running."""
        await self._watch.close()
        await self._api.close()

    def handle_of(self, container_id: UUID) -> str:
        """The handle of a container, whether it is there or not."""
        return Handle(self._template.namespace, manifests.name_of(container_id)).encode()

    # --------------------------------------------------------------------------------------- creation

    async def create(self, spec: ContainerSpec) -> str:
        """The handle of the container of `spec.container_id`, made unless it exists (running or ended).

        Where a quota is used up, `wait_ready` goes on trying.

        Raises:
            InfrastructureError: it could not be made; nothing of it is left.
        """
        name = manifests.name_of(spec.container_id)
        try:
            await self._make(name, spec)
        except NoRoom as error:
            log.info("container_waits_for_room", container_id=str(spec.container_id), why=str(error))
            self._pending[name] = spec
        except (ApiRefused, OrchestratorError) as error:
            await self._clean_up(name)
            if isinstance(error, ApiRefused):
                raise InfrastructureError(f"the container could not be created: {error}") from error
            raise
        return Handle(self._template.namespace, name).encode()

    async def _make(self, name: str, spec: ContainerSpec) -> None:
        pod = await self._objects().make(self._template, spec)
        self._pending.pop(name, None)
        self._watch.follow(name).see(view_of(pod))

    async def _clean_up(self, name: str) -> None:
        try:
            await self._objects(CLEAN_UP_SECONDS).remove(name)
        except (ApiRefused, InfrastructureError) as error:
            log.warning("container_left_to_reconciler", name=name, why=str(error))

    # -------------------------------------------------------------------------------------- readiness

    async def wait_ready(
        self,
        handle: str,
        timeout_seconds: float,
        tell: Callable[[str], Awaitable[None]] | None = None,
    ) -> Endpoint:
        """Where the submission host of the container accepts connections.

        The time stands still while a pod waits for room, up to a time of its own, and while the API server is
        away.

        Raises:
            SubmissionError: it ended before, through its own fault; carries the end of its log.
            InfrastructureError: it ended otherwise, can never begin, or the time is over.
            UsageError: it can never begin because of the image that the job itself names.
        """
        found = self._decode(handle)
        if found is None:
            raise InfrastructureError("the container ended before it was ready: gone")
        patience = Patience(timeout_seconds, self._unschedulable_seconds, self._api_patience_seconds)
        record = self._watch.follow(found.name)
        readiness = Readiness(self._objects(), self._watch, record, patience, self._template.image, tell)
        await self._wait_for_room(found.name, readiness)
        try:
            if record.view is None and record.end is None:
                await self._read(record)
            return await readiness.endpoint()
        except Ended:
            raise await self._ended(handle, record) from None

    async def _wait_for_room(self, name: str, readiness: Readiness) -> None:
        while (spec := self._pending.get(name)) is not None:
            try:
                await self._make(name, spec)
            except NoRoom as error:
                await readiness.say(str(error))
                pause = ROOM_PAUSE_SECONDS * random.uniform(0.5, 1.0)  # noqa: S311 - spreads callers
                await asyncio.sleep(min(pause, self._unschedulable_seconds))
                readiness.patience.spend(str(error), on_room=True)
            except ApiRefused as refused:
                raise InfrastructureError(f"the container could not be created: {refused}") from refused

    async def _ended(self, handle: str, record: PodRecord) -> SubmissionError | InfrastructureError:
        evidence = await record.settled() or GONE
        if evidence.verdict is Verdict.SUBMISSION:
            tail = await self.logs(handle, ERROR_LOG_BYTES)
            return SubmissionError(f"the submission ended before it was ready: {evidence.reason}", tail)
        return InfrastructureError(f"the container ended before it was ready: {evidence.reason}")

    # --------------------------------------------------------------------------------------- evidence

    async def evidence(self, handle: str) -> Evidence:
        """How the container stands or ended; the first end that was seen is the one that counts.

        While the API server is away this waits: what was known before proves nothing now.

        Raises:
            InfrastructureError: the API server was away for too long.
        """
        found = self._decode(handle)
        if found is None:
            return GONE
        record = self._watch.follow(found.name)
        is_fresh = time.monotonic() - record.read_at < FRESH_SECONDS
        evidence = await self._now(record)
        if is_fresh or not evidence.running or record.view is None or not record.view.runs:
            return evidence
        if await dial(record.view.ip) is not None:
            return evidence
        return await self._in_doubt(record)

    async def _now(self, record: PodRecord) -> Evidence:
        if record.end is None and time.monotonic() - record.read_at >= FRESH_SECONDS:
            await self._read(record)
        return await record.settled() or GONE

    async def _in_doubt(self, record: PodRecord) -> Evidence:
        """A pod that does not even refuse connections: its node may be dead, which shows only later."""
        until = time.monotonic() + NODE_DOUBT_SECONDS
        while True:
            await record.changes(NODE_LOOK_SECONDS)
            evidence = await self._now(record)
            if not evidence.running or record.view is None or time.monotonic() > until:
                return evidence
            if await dial(record.view.ip) is not None:
                return evidence

    async def _read(self, record: PodRecord) -> None:
        try:
            await persistently(lambda: self._watch.read(record.name), seconds=self._api_patience_seconds)
        except ApiRefused as refused:
            raise InfrastructureError(f"nothing can be known of the container: {refused}") from refused

    async def logs(self, handle: str, tail_bytes: int) -> str:
        """The end of the last lines that the submission printed, at most `tail_bytes` of UTF-8.

        Raises:
            InfrastructureError: the API server was away for too long.
        """
        found = self._decode(handle)
        if found is None:
            return ""
        path = f"{Paths(found.namespace).of('pods', found.name)}/log"
        # Without a limit of bytes: that would give the first ones of the tail.
        query = {"container": manifests.CONTAINER, "tailLines": str(LOG_LINES)}
        try:
            data = await persistently(lambda: self._api.text(path, query=query), seconds=LOG_SECONDS)
        except ApiRefused as refused:
            if refused.status not in (400, 404):  # 400: there is no container yet
                raise InfrastructureError(f"the log cannot be read: {refused}") from refused
            data = b""
        return shown(data or self._last_words(found.name), tail_bytes)

    def _last_words(self, name: str) -> bytes:
        """What the kubelet has kept in the status: the log of an evicted pod can be empty."""
        view = self._watch.view(name)
        return b"" if view is None or view.terminated is None else view.terminated.message.encode()

    # ---------------------------------------------------------------------------------------- removal

    async def remove(self, handle: str) -> None:
        """Returns when pod and anchor are gone; silently when they were gone before.

        Raises:
            InfrastructureError: something of it is still there, or may be.
        """
        found = Handle.decode(handle)
        if found is None:
            return
        self._pending.pop(found.name, None)
        try:
            await self._objects(namespace=found.namespace).remove(found.name)
        except ApiRefused as refused:
            raise InfrastructureError(f"the container could not be removed: {refused}") from refused
        self._watch.forget(found.name)

    async def list_owned(self, installation_id: UUID) -> list[OwnedContainer]:
        """Every container of the installation in the namespace, in whatever state; of canaries the expired.

        Raises:
            InfrastructureError: the API server was away for too long.
        """
        objects = self._objects(LIST_SECONDS)
        found: dict[str, OwnedContainer] = {}
        try:
            for plural in ("configmaps", "pods"):  # of a half-made one, only the first is there
                for each in await objects.list_labelled(plural, manifests.selector_of(installation_id)):
                    owned = _owned(each, self._template.namespace, datetime.now(UTC))
                    if owned is not None:
                        found.setdefault(owned.handle, owned)
        except ApiRefused as refused:
            raise InfrastructureError(f"containers cannot be listed: {refused}") from refused
        return list(found.values())

    # ----------------------------------------------------------------------------------------- parts

    def _objects(self, seconds: float | None = None, namespace: str | None = None) -> AttemptObjects:
        patience = self._api_patience_seconds if seconds is None else seconds
        return AttemptObjects(self._api, namespace or self._template.namespace, patience)

    def _decode(self, handle: str) -> Handle | None:
        """The handle; None for one of elsewhere, of which nothing can be known here."""
        found = Handle.decode(handle)
        return found if found is not None and found.namespace == self._template.namespace else None


def _owned(stored: Json, namespace: str, now: datetime) -> OwnedContainer | None:
    """What an object is to the reconciler; None where it is none of its business."""
    metadata: Json = stored.get("metadata") or {}
    labels: Json = metadata.get("labels") or {}
    named = _NAME.fullmatch(str(metadata.get("name")))
    if named is None:
        return None
    expires_at = (metadata.get("annotations") or {}).get(manifests.EXPIRES_AT, "")
    try:
        expired = datetime.fromisoformat(expires_at) <= now
    except (ValueError, TypeError):
        expired = False
    if labels.get(manifests.COMPONENT) == manifests.CANARY and not expired:
        return None
    job = str(labels.get(manifests.JOB) or "")
    return OwnedContainer(
        container_id=UUID(named[2]),
        handle=Handle(namespace, named[0]).encode(),
        job_id=int(job) if job.isdigit() else None,
        expired=expired,
    )
