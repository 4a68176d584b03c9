"""The life of one pod: scheduler, kubelet and node controller, each writing what it writes, in its order.

What a real node does, and when, is in the words of the project's notes on Kubernetes: the phase comes after
`state.terminated`, a DisruptionTarget condition before the container is killed, an eviction's reason only
with the phase.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.kubernetes_double.objects import Key, deletion_time, timestamp
from tests.kubernetes_double.plans import Plan, Timing
from tests.kubernetes_double.processes import (
    REPOSITORY,
    CannotStart,
    ConfigMissing,
    ContainerPlace,
    ContainerProcess,
    directory_bytes,
    environment_of,
    memory_bytes,
)
from tests.kubernetes_double.quantities import limit, quantity
from tests.kubernetes_double.refusals import Json, Refused

if TYPE_CHECKING:
    from tests.kubernetes_double.node import Node

NODE_NAME = "node-1"
STARTING = {"waiting": {"reason": "ContainerCreating"}}
LAST_WORDS_BYTES = 2048
CLOSED_NETWORK = Path(__file__).parent / "closed_network"


@dataclass(frozen=True)
class Stop:
    """Why the kubelet ends a container."""

    grace_seconds: float
    reason: str | None = None  # of the pod, with its phase
    message: str | None = None


class PodRun:
    """One pod on the node. Its end can be ordered at any time; only the first order counts."""

    def __init__(self, node: Node, key: Key, uid: str, plan: Plan) -> None:
        self._node = node
        self.key = key
        self.uid = uid
        self.plan = plan
        self.timing: Timing = plan.timing or node.timing
        self.process: ContainerProcess | None = None
        self.place: ContainerPlace | None = None
        self.prints = plan.prints.encode()
        self.evicted = False
        self._stop: asyncio.Future[Stop] = asyncio.get_running_loop().create_future()
        self._killed_for_memory = False
        self._node_is_dead = asyncio.Event()
        self._deadline: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------------------------------------- orders

    def stop(self, stop: Stop) -> None:
        """Have the kubelet end it."""
        if not self._stop.done():
            self._stop.set_result(stop)

    def kill_for_memory(self) -> None:
        """The kernel kills the whole container, and the runtime knows why."""
        assert self.process is not None
        self._killed_for_memory = True
        self.process.kill()

    def kill_node(self) -> None:
        """Its node is cut off: the process is gone and the kubelet says nothing any more."""
        self._node_is_dead.set()

    @property
    def log(self) -> bytes:
        """What the kubelet still has of its log: nothing of a pod that was evicted."""
        if self.evicted:
            return b""
        return self.prints if self.process is None else self.process.log

    # -------------------------------------------------------------------------------------- its life

    async def live(self) -> None:
        """From its creation until its object is gone or has ended for good."""
        life = asyncio.create_task(self._live())
        death = asyncio.create_task(self._node_is_dead.wait())
        try:
            await asyncio.wait({life, death}, return_when=asyncio.FIRST_COMPLETED)
            if life.done():
                await life
                return
            life.cancel()
            await asyncio.gather(life, return_exceptions=True)
            await self._end_process()
            await self._die_with_node()
        finally:
            for pending in (life, death, self._deadline):
                if pending is not None:
                    pending.cancel()
            await asyncio.gather(life, death, return_exceptions=True)
            await self._end_process()
            if self.place is not None:
                await asyncio.to_thread(self.place.remove)

    async def _live(self) -> None:
        try:
            await self._schedule()
            if await self._begin():
                await self._run()
            await self._await_deletion()
        except Refused:  # its object is gone: removed by force
            pass

    async def _end_process(self) -> None:
        if self.process is not None:
            self.process.kill()
            await self.process.wait()

    async def _schedule(self) -> None:
        await asyncio.sleep(self.timing.schedule_seconds)
        if self.plan.unschedulable is not None:
            message = self.plan.unschedulable
            self._change(
                lambda pod: _condition(pod, "PodScheduled", "False", "Unschedulable", message),
            )
            self._node.tell(self.key, self.uid, "FailedScheduling", message)
            await self._pause(self.plan.unschedulable_seconds)

        def bind(pod: Json) -> None:
            pod["spec"]["nodeName"] = NODE_NAME
            _condition(pod, "PodScheduled", "True")

        self._change(bind)

    async def _begin(self) -> bool:
        """Whether its container runs now; else the pod has ended, or was deleted before."""
        if self.plan.refused_by_kubelet is not None:
            self._refuse(self.plan.refused_by_kubelet)
            return False
        self._change(self._creating)
        address = self._node.take_address(self.key)
        self._start_deadline()
        if not await self._wait_as_planned():
            await self._never_ran(await self._stop)
            return False
        await asyncio.sleep(self.timing.create_seconds)
        if self.plan.exits is not None:
            return True
        return await self._start(address)

    def _refuse(self, reason: str) -> None:
        def refused(pod: Json) -> None:
            resource = reason.removeprefix("OutOf")
            pod["status"] |= {
                "phase": "Failed",
                "reason": reason,
                "message": f"Pod was rejected: Node didn't have enough resource: {resource}, requested: 2, "
                "used: 1, capacity: 2",
                "startTime": timestamp(),
            }

        self._change(refused)

    def _creating(self, pod: Json) -> None:
        pod["status"] |= {"hostIP": "192.0.2.1", "hostIPs": [{"ip": "192.0.2.1"}], "startTime": timestamp()}
        _condition(pod, "PodReadyToStartContainers", "False")
        _condition(pod, "Initialized", "True")
        _not_ready(pod)
        self._container(pod, STARTING)

    def _start_deadline(self) -> None:
        spec = self._pod()["spec"]
        if "activeDeadlineSeconds" in spec:
            message = "Pod was active on the node longer than the specified deadline"
            stop = Stop(spec.get("terminationGracePeriodSeconds", 30), "DeadlineExceeded", message)
            self._deadline = asyncio.get_running_loop().call_later(
                spec["activeDeadlineSeconds"], self.stop, stop
            )

    async def _wait_as_planned(self) -> bool:
        """False if it is to end before all its waiting is over."""
        if self.plan.event is not None:
            self._node.tell(self.key, self.uid, *self.plan.event)
            if not await self._pause(self.plan.event_seconds):
                return False
        for number, (reason, message) in enumerate(self.plan.waits):
            self._change(
                lambda pod, reason=reason, message=message: self._container(
                    pod, {"waiting": {"reason": reason, "message": message}}
                )
            )
            self._node.tell(self.key, self.uid, "Failed", f"Error: {reason}: {message}")
            last = number == len(self.plan.waits) - 1
            if not await self._pause(self.plan.waits_seconds if last else self.timing.create_seconds):
                return False
        return True

    async def _start(self, address: str) -> bool:
        pod = self._pod()
        self.place = ContainerPlace.of(pod, self._node.directory / self.uid, address)
        while True:
            try:
                environment = environment_of(pod, self._node.config_maps(self.key.namespace), self.place)
                break
            except ConfigMissing as error:
                message = str(error)
                self._change(
                    lambda pod, message=message: self._container(
                        pod, {"waiting": {"reason": "CreateContainerConfigError", "message": message}}
                    )
                )
                if not await self._pause(self.timing.create_seconds * 4):
                    await self._never_ran(await self._stop)
                    return False
        if self.plan.polices_python:
            environment["PYTHONPATH"] = os.pathsep.join((str(CLOSED_NETWORK), str(REPOSITORY)))
        api = await self._node.open_egress(self, address)
        try:
            if self.plan.start_error is not None:
                raise CannotStart(self.plan.start_error)
            self.process = await ContainerProcess.start(pod, self.place, environment, api)
        except CannotStart as error:
            self._container_ended("StartError", 128, str(error))
            await asyncio.sleep(self.timing.phase_lag_seconds)
            self._change(lambda pod: pod["status"].update(phase="Failed"))
            return False
        return True

    async def _run(self) -> None:
        """Running, until it ends or is ended."""
        began = timestamp()
        await asyncio.sleep(self.timing.running_lag_seconds)
        watch = asyncio.create_task(self._watch_limits())
        try:
            self._change(lambda pod: self._running(pod, began))
            stop, code = await self._until_end()
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
        reason = "Completed" if code == 0 else "Error"
        if self._killed_for_memory:
            reason, code = "OOMKilled", 137
        words = self.log[-LAST_WORDS_BYTES:].decode(errors="replace") if code else ""
        await asyncio.sleep(self.timing.terminated_lag_seconds)
        self._container_ended(reason, code, words, began)
        await asyncio.sleep(self.timing.phase_lag_seconds)
        self._finish(stop, code)

    def _running(self, pod: Json, began: str) -> None:
        address = self._node.addresses[self.key]
        pod["status"] |= {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]}
        for condition in ("PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady"):
            _condition(pod, condition, "True")
        self._container(pod, {"running": {"startedAt": began}}, ready=True)

    async def _until_end(self) -> tuple[Stop | None, int]:
        """Why the kubelet ended it, if it did, and its exit code."""
        if self.process is None:  # planned without one
            assert self.plan.exits is not None
            return None, self.plan.exits
        ending = asyncio.create_task(self.process.wait())
        await asyncio.wait({ending, self._stop}, return_when=asyncio.FIRST_COMPLETED)
        if not self._stop.done():
            return None, await ending
        stop = self._stop.result()
        if not ending.done():
            self.process.send(signal.SIGTERM)
            grace = stop.grace_seconds * self.timing.grace_scale
            await asyncio.wait({ending}, timeout=grace)
            self.process.kill() if not ending.done() else None
        return stop, await ending

    def _finish(self, stop: Stop | None, code: int) -> None:
        self.evicted = stop is not None and stop.reason == "Evicted"

        def finished(pod: Json) -> None:
            pod["status"]["phase"] = "Succeeded" if code == 0 and not (stop and stop.reason) else "Failed"
            if stop is not None and stop.reason is not None:
                pod["status"] |= {"reason": stop.reason, "message": stop.message}

        self._change(finished)

    async def _never_ran(self, stop: Stop) -> None:
        def unknown(pod: Json) -> None:
            state = {
                "exitCode": 137,
                "reason": "ContainerStatusUnknown",
                "message": "The container could not be located when the pod was terminated",
                "startedAt": None,
                "finishedAt": None,
            }
            _not_ready(pod)
            self._container(pod, {"terminated": state})
            if stop.reason is not None:
                pod["status"] |= {"phase": "Failed", "reason": stop.reason, "message": stop.message}

        self._change(unknown)

    async def _await_deletion(self) -> None:
        """The kubelet removes the object once somebody has asked for it."""
        while "deletionTimestamp" not in self._pod()["metadata"]:
            await self._node.store.next_change.wait()
        await asyncio.sleep(self.timing.removal_lag_seconds)
        self._node.store.remove(self.key, self.uid)

    async def _watch_limits(self) -> None:
        """What the kernel does about memory, and the kubelet's housekeeping about disk."""
        pod = self._pod()
        memory, disk = limit(pod, "memory"), limit(pod, "ephemeral-storage")
        sizes = {
            volume["name"]: quantity(volume["emptyDir"]["sizeLimit"])
            for volume in pod["spec"].get("volumes") or []
            if (volume.get("emptyDir") or {}).get("sizeLimit")
        }
        if self.process is None or self.place is None:
            return
        while True:
            await asyncio.sleep(self.timing.housekeeping_seconds)
            used = await asyncio.to_thread(memory_bytes, self.process.pid)
            if memory is not None and used > memory:
                self.kill_for_memory()
                return
            if (message := await asyncio.to_thread(self._overflow, sizes, disk)) is not None:
                self.stop(Stop(0, "Evicted", message))
                return

    def _overflow(self, sizes: dict[str, float], disk: float | None) -> str | None:
        assert self.place is not None
        for name, most in sizes.items():
            if directory_bytes(self.place.directory / name) > most:
                return f'Usage of EmptyDir volume "{name}" exceeds the limit "{most:.0f}". '
        if disk is not None and directory_bytes(self.place.directory) > disk:
            return f"Pod ephemeral local storage usage exceeds the total limit of containers {disk:.0f}. "
        return None

    async def _die_with_node(self) -> None:
        """The node controller marks it; the taint manager deletes it; nobody is there to confirm that."""
        with contextlib.suppress(Refused):
            await asyncio.sleep(self.timing.not_ready_seconds)
            self._change(lambda pod: _condition(pod, "Ready", "False"))
            seconds = _toleration_seconds(self._pod()) * self.timing.node_lifecycle_scale
            await asyncio.sleep(seconds)
            self._node.disrupt(
                self.key, self.uid, "DeletionByTaintManager", "Taint manager: deleting due to NoExecute taint"
            )
            while self._pod():
                await self._node.store.next_change.wait()

    # ------------------------------------------------------------------------------------ its object

    def _pod(self) -> Json:
        pod = self._node.store.get(self.key)
        if pod["metadata"]["uid"] != self.uid:
            raise Refused(404, "NotFound", "another pod has its name now")
        return pod

    def _change(self, change: Callable[[Json], object]) -> None:
        self._node.store.change(self.key, lambda pod: (change(pod), None)[1], self.uid)

    async def _pause(self, seconds: float | None) -> bool:
        """False if it is to end meanwhile."""
        done, _ = await asyncio.wait({self._stop}, timeout=seconds)
        return not done

    def _container(self, pod: Json, state: Json, *, ready: bool = False) -> None:
        container = pod["spec"]["containers"][0]
        pod["status"]["containerStatuses"] = [
            {
                "name": container["name"],
                "image": container["image"],
                "imageID": container["image"] if "waiting" not in state else "",
                "containerID": f"containerd://{self.uid.replace('-', '')}" if "waiting" not in state else "",
                "lastState": {},
                "ready": ready,
                "restartCount": 0,
                "started": "running" in state,
                "state": state,
            }
        ]

    def _container_ended(self, reason: str, code: int, message: str = "", began: str | None = None) -> None:
        state: Json = {
            "exitCode": code,
            "reason": reason,
            "startedAt": began or timestamp(),
            "finishedAt": timestamp(),
            "containerID": f"containerd://{self.uid.replace('-', '')}",
        }
        if message:
            state["message"] = message

        def ended(pod: Json) -> None:
            _not_ready(pod, "PodCompleted" if code == 0 else "ContainersNotReady")
            self._container(pod, {"terminated": state})

        self._change(ended)


def _condition(pod: Json, kind: str, status: str, reason: str | None = None, message: str = "") -> None:
    conditions = pod["status"].setdefault("conditions", [])
    told: Json = {"type": kind, "status": status, "lastProbeTime": None, "lastTransitionTime": timestamp()}
    if reason is not None:
        told |= {"reason": reason, "message": message}
    pod["status"]["conditions"] = [each for each in conditions if each["type"] != kind] + [told]


def disruption(pod: Json, reason: str, message: str) -> None:
    """Add the condition that says who disturbs it."""
    _condition(pod, "DisruptionTarget", "True", reason, message)


def _not_ready(pod: Json, reason: str = "ContainersNotReady") -> None:
    names = f"[{pod['spec']['containers'][0]['name']}]"
    for kind in ("Ready", "ContainersReady"):
        _condition(pod, kind, "False", reason, f"containers with unready status: {names}")


def _toleration_seconds(pod: Json) -> float:
    for toleration in pod["spec"].get("tolerations") or []:
        if toleration.get("key") == "node.kubernetes.io/unreachable":
            return float(toleration.get("tolerationSeconds", 10**9))
    return 300.0


def mark_deleted(pod: Json, grace_seconds: float) -> None:
    """What the API server writes for a graceful deletion; a second one can only shorten it."""
    metadata = pod["metadata"]
    before = metadata.get("deletionGracePeriodSeconds")
    if before is None or grace_seconds < before:
        metadata |= {
            "deletionTimestamp": deletion_time(grace_seconds),
            "deletionGracePeriodSeconds": int(grace_seconds),
        }
