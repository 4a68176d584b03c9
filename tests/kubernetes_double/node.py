"""The controllers round the store: one node with its pods, garbage collection, events, disruptions."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import deque
from collections.abc import Callable
from pathlib import Path

from tests.kubernetes_double.objects import KINDS, Key, ObjectStore, timestamp
from tests.kubernetes_double.plans import Plan, Timing
from tests.kubernetes_double.pods import PodRun, Stop, disruption, mark_deleted
from tests.kubernetes_double.processes import free_address
from tests.kubernetes_double.refusals import Json, Refused

FINISHED = ("Failed", "Succeeded")
RPC_PORT = 8000
DEFAULT_GRACE_SECONDS = 30.0
ORPHAN_FINALIZER = "foregroundDeletion"


class Node:
    """Runs every pod of the store, one task each, until it is closed."""

    def __init__(self, store: ObjectStore, directory: Path, timing: Timing) -> None:
        self.store = store
        self.directory = directory
        self.timing = timing
        self.plans: deque[Plan] = deque()
        self.plan_for: Callable[[Json], Plan | None] = lambda pod: None
        self.runs: dict[str, PodRun] = {}  # by uid
        self.addresses: dict[Key, str] = {}
        self._numbers = itertools.count(random.SystemRandom().randrange(2**23))
        self._tasks: set[asyncio.Task[None]] = set()
        self._gates: dict[str, asyncio.Server] = {}
        self.failures: list[BaseException] = []

    # ------------------------------------------------------------------------------------------- pods

    def adopt(self, pod: Json) -> None:
        """A pod was created: from now on it lives."""
        metadata = pod["metadata"]
        key = Key("pods", metadata["namespace"], metadata["name"])
        plan = self.plan_for(pod) or (self.plans.popleft() if self.plans else Plan())
        run = PodRun(self, key, metadata["uid"], plan)
        self.runs[run.uid] = run
        self._own(self._live(run))
        self.collect_garbage()

    async def _live(self, run: PodRun) -> None:
        try:
            await run.live()
        finally:
            gate = self._gates.pop(run.uid, None)
            if gate is not None:
                gate.close()
            self.addresses.pop(run.key, None)
            self.runs.pop(run.uid, None)

    def delete_pod(self, key: Key, uid: str, grace_seconds: float | None) -> Json:
        """As the API server does it: at once where no kubelet has it or it has ended, else by the kubelet."""
        pod = self.store.get(key)
        status, spec = pod.get("status") or {}, pod["spec"]
        grace = spec.get("terminationGracePeriodSeconds", DEFAULT_GRACE_SECONDS)
        if grace_seconds is not None:
            grace = grace_seconds
        if status.get("phase") in FINISHED or not spec.get("nodeName") or grace == 0:
            self.store.remove(key, uid)
            if (run := self.runs.get(uid)) is not None:
                run.stop(Stop(0))
            return pod
        deleted = self.store.change(key, lambda pod: mark_deleted(pod, grace), uid)
        if (run := self.runs.get(uid)) is not None:
            run.stop(Stop(grace))
        return deleted

    def disrupt(self, key: Key, uid: str, reason: str, message: str) -> None:
        """Who disturbs a pod says so first, and then deletes it."""
        self.store.change(key, lambda pod: disruption(pod, reason, message), uid)
        self.delete_pod(key, uid, None)

    def config_maps(self, namespace: str) -> dict[str, Json]:
        return {key.name: stored for key, stored in self.store.select("configmaps", namespace)}

    def take_address(self, key: Key) -> str:
        address = free_address(self.addresses.values(), self._numbers, RPC_PORT)
        self.addresses[key] = address
        return address

    async def open_egress(self, run: PodRun, address: str) -> tuple[str, int]:
        """Where this pod reaches the API server, for as long as its NetworkPolicy is not in force yet."""

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await reader.read()
            except ConnectionError:
                pass
            finally:
                writer.close()

        gate = await asyncio.start_server(accept, address, 0)
        self._gates[run.uid] = gate
        if not run.plan.egress_stays_open:
            # It stops listening; what was connected before stays connected, as on a real node.
            asyncio.get_running_loop().call_later(run.timing.egress_open_seconds, gate.close)
        return address, gate.sockets[0].getsockname()[1]

    # ----------------------------------------------------------------------------------------- garbage

    def collect_garbage(self) -> None:
        """Look soon for what has owners, and none of them any more."""
        self._own(self._collect_garbage())

    async def _collect_garbage(self) -> None:
        await asyncio.sleep(self.timing.garbage_seconds)
        for plural in ("pods", "configmaps", "events"):
            for key, stored in self.store.select(plural):
                owners = stored["metadata"].get("ownerReferences") or []
                if owners and not self.store.uids(key.namespace) & {owner["uid"] for owner in owners}:
                    self._delete(key, stored)

    def _delete(self, key: Key, stored: Json) -> None:
        uid = stored["metadata"]["uid"]
        try:
            if key.plural == "pods":
                if "deletionTimestamp" not in stored["metadata"]:
                    self.delete_pod(key, uid, None)
            elif self.store.remove(key, uid) is not None:
                self.collect_garbage()
        except Refused:  # it went meanwhile
            pass

    def dependents(self, namespace: str, uid: str) -> list[tuple[Key, Json]]:
        """What this object owns."""
        return [
            (key, stored)
            for plural in ("pods", "configmaps")
            for key, stored in self.store.select(plural, namespace)
            if uid in {owner["uid"] for owner in stored["metadata"].get("ownerReferences") or []}
        ]

    def delete(self, key: Key, uid: str, propagation: str) -> Json:
        """Delete what is not a pod, and what it owns as `propagationPolicy` says."""
        stored = self.store.get(key)
        if propagation == "Orphan":
            for dependent, _ in self.dependents(key.namespace, uid):
                self.store.change(dependent, lambda each: each["metadata"].pop("ownerReferences"))
        if propagation == "Foreground":

            def marked(each: Json) -> None:
                each["metadata"] |= {
                    "deletionTimestamp": timestamp(),
                    "deletionGracePeriodSeconds": 0,
                    "finalizers": [ORPHAN_FINALIZER],
                }

            stored = self.store.change(key, marked, uid)
            self._own(self._delete_after_dependents(key, uid))
            return stored
        self.store.remove(key, uid)
        self.collect_garbage()
        return stored

    async def _delete_after_dependents(self, key: Key, uid: str) -> None:
        await asyncio.sleep(self.timing.garbage_seconds)
        for dependent, stored in self.dependents(key.namespace, uid):
            self._delete(dependent, stored)
        while self.dependents(key.namespace, uid):
            await self.store.next_change.wait()
        self.store.remove(key, uid)

    # ------------------------------------------------------------------------------------------ events

    def tell(self, key: Key, uid: str, reason: str, message: str) -> None:
        """An Event about a pod, as kubelet and scheduler write them."""
        self.store.add(
            KINDS["events"],
            key.namespace,
            {
                "metadata": {"generateName": f"{key.name}."},
                "involvedObject": {
                    "kind": "Pod",
                    "namespace": key.namespace,
                    "name": key.name,
                    "uid": uid,
                    "apiVersion": "v1",
                },
                "reason": reason,
                "message": message,
                "type": "Warning",
                "count": 1,
                "firstTimestamp": timestamp(),
                "lastTimestamp": timestamp(),
                "source": {"component": "kubelet", "host": "node-1"},
                "reportingComponent": "kubelet",
                "reportingInstance": "node-1",
            },
        )

    # ------------------------------------------------------------------------------------------- tasks

    def _own(self, work: object) -> None:
        task = asyncio.get_running_loop().create_task(work)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failures.append(error)

    async def close(self) -> None:
        """End every pod; what broke in here meanwhile is raised now.

        Raises:
            ExceptionGroup: of the double's own failures.
        """
        while self._tasks:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.wait(self._tasks, timeout=10)
        if self.failures:
            raise BaseExceptionGroup("the double broke", self.failures)
