"""Makes and removes the two objects of a container attempt, whatever an API server answers meanwhile."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import structlog

from orchestrator.adapters.kubernetes import manifests
from orchestrator.adapters.kubernetes.api import KubernetesApi, persistently
from orchestrator.adapters.kubernetes.evidence import view_of
from orchestrator.adapters.kubernetes.manifests import PodTemplate
from orchestrator.adapters.kubernetes.preflight_api import ApiRefused, Paths
from orchestrator.domain.errors import InfrastructureError
from orchestrator.ports import ContainerSpec

log = structlog.get_logger(__name__)

Json = dict[str, Any]

FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 1.0
# A kubelet has removed a pod long before, if it is there at all.
FORCE_SECONDS = 30.0
_QUOTA = re.compile(r"exceeded quota: ([^,\s]+)")


class NoRoom(Exception):
    """A quota is used up: there may be room a little later. The text names the quota."""


@dataclass(frozen=True)
class AttemptObjects:
    """The objects of one namespace. No call is made for longer than `patience_seconds` in vain."""

    api: KubernetesApi
    namespace: str
    patience_seconds: float

    async def get(self, plural: str, name: str) -> Json | None:
        """One object as it is now; None where there is none.

        Raises:
            ApiRefused, InfrastructureError.
        """
        try:
            return await self._call("GET", plural, name)
        except ApiRefused as refused:
            if refused.status == 404:
                return None
            raise

    async def make(self, template: PodTemplate, spec: ContainerSpec) -> Json:
        """The pod of this attempt below its anchor: made now, or before, by whomever.

        Raises:
            NoRoom: a quota is used up; the anchor may be there.
            ApiRefused, InfrastructureError: it cannot be made.
        """
        until = time.monotonic() + self.patience_seconds
        name = manifests.name_of(spec.container_id)
        while True:
            wanted_anchor = manifests.anchor(template, spec)
            anchor = await self._create_or_get("configmaps", wanted_anchor)
            if not _fits(anchor, wanted_anchor):
                log.warning("container_replaced", name=name, why="an anchor of its name is another one")
                await self.remove(name)
            else:
                # With the uid of just now: a pod whose owner is gone would be deleted within a second.
                uid = anchor["metadata"]["uid"]
                wanted = manifests.pod(template, spec, uid, datetime.now(UTC))
                pod = await self._create_or_get("pods", wanted)
                if _fits(pod, wanted) and _owner(pod) == uid:
                    return pod
                log.warning("container_replaced", name=name, why="a pod of its name is another one")
                await self._remove_all({"pods": name})
            if time.monotonic() > until:
                raise InfrastructureError(f"{name} could not be made: others make it, too")

    async def _create_or_get(self, plural: str, wanted: Json) -> Json:
        name = wanted["metadata"]["name"]
        until = time.monotonic() + self.patience_seconds
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                return await self._call("POST", plural, body=wanted)
            except ApiRefused as refused:
                if (quota := _QUOTA.search(refused.message)) is not None and refused.status == 403:
                    raise NoRoom(f"waits for room in quota {quota[1]}: {refused.message}") from None
                if refused.status != 409:
                    raise
            found = await self.get(plural, name)
            if found is not None:
                return found
            if time.monotonic() > until:
                raise InfrastructureError(f"{name} could not be made: its name is taken and free in turns")
            pause = await _pause(pause)

    async def remove(self, name: str) -> None:
        """Returns when neither object is there any more.

        Raises:
            ApiRefused, InfrastructureError: that cannot be said.
        """
        await self._remove_all({"configmaps": name, "pods": name})

    async def _remove_all(self, names: Mapping[str, str]) -> None:
        """Both are asked for at once, and then looked at until they are gone."""
        began_at = time.monotonic()
        for plural, name in names.items():
            await self._delete(plural, name, {})
        forced = False
        for plural, name in names.items():
            pause = FIRST_PAUSE_SECONDS
            while (found := await self.get(plural, name)) is not None:
                waited = time.monotonic() - began_at
                if waited > self.patience_seconds:
                    raise InfrastructureError(f"{name} does not go away")
                if not found["metadata"].get("deletionTimestamp"):
                    await self._delete(plural, name, {})  # another one of its name, or the answer was a lie
                elif plural == "pods" and not forced and (waited > FORCE_SECONDS or _is_on_lost_node(found)):
                    # Nobody is there to confirm that it has ended: it would stay for ever.
                    log.warning("pod_removed_by_force", name=name, after_seconds=round(waited, 1))
                    await self._delete(plural, name, {"gracePeriodSeconds": 0})
                    forced = True
                pause = await _pause(pause)

    async def _delete(self, plural: str, name: str, options: Json) -> None:
        body = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background", **options}
        try:
            await self._call("DELETE", plural, name, body=body)
        except ApiRefused as refused:
            if refused.status not in (404, 409):  # 409: it is not as it was, which is looked at next
                raise

    async def list_labelled(self, plural: str, selector: str) -> list[Json]:
        """The objects with these labels.

        Raises:
            ApiRefused, InfrastructureError.
        """
        answer = await self._call("GET", plural, query={"labelSelector": selector})
        return [each for each in answer.get("items") or [] if isinstance(each, dict)]

    async def events(self, pod: str) -> list[Json]:
        """The events of a pod of this name, tried once.

        Raises:
            ApiRefused, InfrastructureError.
        """
        query = {"fieldSelector": f"involvedObject.kind=Pod,involvedObject.name={pod}", "limit": "50"}
        answer = await self.api.once("GET", Paths(self.namespace).of("events"), query=query)
        return [each for each in answer.get("items") or [] if isinstance(each, dict)]

    async def _call(
        self,
        method: str,
        plural: str,
        name: str = "",
        *,
        query: Mapping[str, str] | None = None,
        body: Json | None = None,
    ) -> Json:
        path = Paths(self.namespace).of(plural, name)
        return await persistently(
            lambda: self.api.once(method, path, query=query, body=body), seconds=self.patience_seconds
        )

    def within(self, seconds: float) -> AttemptObjects:
        """The same with another patience."""
        return replace(self, patience_seconds=min(seconds, self.patience_seconds))


def _fits(found: Json, wanted: Json) -> bool:
    """Whether what is there is what we would make: by its labels, and the hash of all the rest."""
    metadata: Json = found.get("metadata") or {}
    same_hash = (metadata.get("annotations") or {}).get(manifests.SPEC_HASH) == wanted["metadata"][
        "annotations"
    ][manifests.SPEC_HASH]
    labels: Json = metadata.get("labels") or {}
    same_labels = all(labels.get(key) == value for key, value in wanted["metadata"]["labels"].items())
    return same_hash and same_labels and not metadata.get("deletionTimestamp")


def _owner(pod: Json) -> str | None:
    owners = pod["metadata"].get("ownerReferences") or [{}]
    uid: str | None = owners[0].get("uid")
    return uid


def _is_on_lost_node(pod: Json) -> bool:
    try:
        view = view_of(pod)
    except ValueError:
        return False
    return view.node_is_lost


async def _pause(seconds: float) -> float:
    """Wait about so long; how long to wait the next time."""
    await asyncio.sleep(seconds * random.uniform(0.5, 1.0))  # noqa: S311 - spreads callers
    return min(seconds * 1.5, LONGEST_PAUSE_SECONDS)
