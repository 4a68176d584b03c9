"""What a pod's status says: why it has not begun, how it ended, and whose fault that was. Pure."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.adapters.kubernetes.manifests import CONTAINER
from orchestrator.domain.episodes import FaultClass
from orchestrator.ports import Evidence, Verdict

Json = dict[str, Any]

GONE = Evidence(running=False, reason="gone", verdict=Verdict.INFRASTRUCTURE)
RUNNING = Evidence(running=True, reason="running")
SHOWN_CHARS = 500

_ENDED = ("Succeeded", "Failed")
_NEVER_RAN = ("ContainerStatusUnknown", "StartError", "ContainerCannotRun", "CreateContainerError")
# The kubelet's words where a node was short of something, whoever used it up.
_OF_THE_NODE = ("The node was low on resource", "The node had condition")
_OF_GARBAGE_COLLECTION = "DeletionByPodGC"  # also added to pods that have ended long ago


@dataclass(frozen=True, slots=True)
class Waiting:
    """Why the container does not run yet, as the kubelet says."""

    reason: str
    message: str = ""

    def __str__(self) -> str:
        return words(self.reason, self.message)


@dataclass(frozen=True, slots=True)
class Terminated:
    """How the container ended, as the runtime says."""

    reason: str
    exit_code: int
    message: str = ""


@dataclass(frozen=True, slots=True)
class PodView:
    """What matters of a pod; the rest of the object is let go."""

    name: str
    uid: str
    version: int
    image: str = ""
    phase: str = "Pending"
    reason: str = ""
    message: str = ""
    ip: str = ""
    is_scheduled: bool = False
    unschedulable: str = ""
    is_deleted: bool = False
    disruption: str = ""  # the reason of a DisruptionTarget condition that is true
    is_ready: bool | None = None
    containers_are_ready: bool | None = None
    waiting: Waiting | None = None
    runs: bool = False
    terminated: Terminated | None = None

    @property
    def has_ended(self) -> bool:
        return self.phase in _ENDED

    @property
    def node_is_lost(self) -> bool:
        """The node controller says not ready, of a pod whose kubelet had said ready to the last."""
        return self.runs and self.is_ready is False and self.containers_are_ready is not False


def view_of(pod: Json) -> PodView:
    """The view of a pod as the API server sends it.

    Raises:
        ValueError: it is no pod.
    """
    try:
        metadata, spec, status = pod["metadata"], pod.get("spec") or {}, pod.get("status") or {}
        conditions = {each["type"]: each for each in status.get("conditions") or []}
        state: Json = _of_submission(status.get("containerStatuses")).get("state") or {}
        scheduled: Json = conditions.get("PodScheduled") or {}
        disruption: Json = conditions.get("DisruptionTarget") or {}
        return PodView(
            name=metadata["name"],
            uid=metadata["uid"],
            version=int(metadata["resourceVersion"]),
            image=_of_submission(spec.get("containers")).get("image") or "",
            phase=status.get("phase") or "Pending",
            reason=status.get("reason") or "",
            message=status.get("message") or "",
            ip=status.get("podIP") or "",
            is_scheduled=bool(spec.get("nodeName")) or scheduled.get("status") == "True",
            unschedulable=_unschedulable(scheduled),
            is_deleted=bool(metadata.get("deletionTimestamp")),
            disruption=(disruption.get("reason") or "disrupted") if _is_true(disruption) else "",
            is_ready=_truth(conditions.get("Ready")),
            containers_are_ready=_truth(conditions.get("ContainersReady")),
            waiting=_waiting(state.get("waiting")),
            runs="running" in state,
            terminated=_terminated(state.get("terminated")),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no pod: {error}") from error


def _of_submission(containers: Sequence[Json] | None) -> Json:
    """The submission's container, or its status: a cluster may add others to every pod (a mesh's proxy)."""
    named = [each for each in containers or () if each.get("name", CONTAINER) == CONTAINER]
    return named[0] if named else {}


def _unschedulable(condition: Json) -> str:
    if condition.get("status") != "False":
        return ""
    return words(condition.get("reason") or "not scheduled", condition.get("message") or "")


def _truth(condition: Json | None) -> bool | None:
    return None if condition is None or condition.get("status") == "Unknown" else _is_true(condition)


def _is_true(condition: Mapping[str, Any]) -> bool:
    return condition.get("status") == "True"


def _waiting(state: Json | None) -> Waiting | None:
    return None if state is None else Waiting(state.get("reason") or "waiting", state.get("message") or "")


def _terminated(state: Json | None) -> Terminated | None:
    if state is None:
        return None
    return Terminated(state.get("reason") or "", int(state.get("exitCode", -1)), state.get("message") or "")


def judge(last: PodView, at_end: PodView | None = None, *, ran: bool = False) -> Evidence:
    """The evidence of a pod that has ended, or is being deleted.

    `at_end` is how it looked when its container was first seen to have ended: what was added later proves
    nothing, but for the kubelet's own reason, which comes late. `ran`: it was seen running before.
    """
    first = at_end or last
    ran = ran or (first.terminated is not None and first.terminated.reason not in _NEVER_RAN)
    if "TerminationByKubelet" in (first.disruption, last.disruption):
        return _ours(f"ended by its node: {words(last.reason or first.disruption, last.message)}")
    if first.disruption and not (first.disruption == _OF_GARBAGE_COLLECTION and first.terminated):
        return _ours(f"disrupted: {first.disruption}")
    if last.reason == "DeadlineExceeded":
        if ran:
            return _theirs("lifetime exceeded", FaultClass.CRASH, first.terminated)
        return _ours("lifetime exceeded before it ran")
    if last.reason == "Evicted":
        if last.message.startswith(_OF_THE_NODE):
            return _ours(f"ended by its node: {words(last.reason, last.message)}")
        return _theirs(f"out of disk: {words(last.message)}", FaultClass.OUT_OF_DISK, first.terminated)
    if last.reason:  # whatever else a kubelet has against a pod: OutOfmemory, NodeAffinity, Shutdown
        return _ours(words(last.reason, last.message))
    if first.is_deleted:
        return _ours("deleted by somebody else")
    if first.terminated is None:
        return _ours("ended without a word")
    return _judge_end(first.terminated)


def _judge_end(end: Terminated) -> Evidence:
    if end.reason == "OOMKilled":
        return _theirs("out of memory", FaultClass.OUT_OF_MEMORY, end)
    if end.reason in _NEVER_RAN:
        return _ours(words(end.reason, end.message))
    return _theirs(exit_in_words(end.exit_code), FaultClass.CRASH, end)


def _ours(reason: str) -> Evidence:
    return Evidence(running=False, reason=reason, verdict=Verdict.INFRASTRUCTURE)


def _theirs(reason: str, fault: FaultClass, end: Terminated | None) -> Evidence:
    code = None if end is None else end.exit_code
    return Evidence(running=False, reason=reason, verdict=Verdict.SUBMISSION, fault=fault, exit_code=code)


def node_lost() -> Evidence:
    """Of a pod whose node does not answer."""
    return _ours("its node does not answer")


def exit_in_words(code: int) -> str:
    """The exit code of a container; above 128 it names a signal."""
    if code == 0:
        return "exited 0 by itself"
    try:
        return f"exit code {code} ({signal.Signals(code - 128).name})"
    except ValueError:
        return f"exit code {code}"


def words(*parts: str) -> str:
    """Reason and message in one line of bounded length, with nothing in it that a terminal obeys."""
    text = ": ".join(" ".join(part.split()) for part in parts if part.strip())
    text = "".join(each if each.isprintable() else "?" for each in text)
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 1] + "…"


# ------------------------------------------------------------------------------------ what never begins

# How long a pod may wait for each of these: what a kubelet tries again may succeed.
PATIENCE_SECONDS = {
    "InvalidImageName": 0.0,
    "ErrImageNeverPull": 0.0,
    "CreateContainerConfigError": 5.0,
    "CreateContainerError": 15.0,
    "RunContainerError": 15.0,
    "ErrImagePull": 60.0,
    "ImagePullBackOff": 60.0,
    "ImageInspectError": 60.0,
    "RegistryUnavailable": 60.0,
}
_OF_THE_IMAGE = ("InvalidImageName", "ErrImageNeverPull", "ErrImagePull", "ImagePullBackOff")
_FINAL_WORDS = ("not found", "denied", "unauthorized", "forbidden", "manifest unknown", "invalid reference")


def patience_seconds(waiting: Waiting) -> float | None:
    """How long this may go on until it is given up; None: as long as anything."""
    seconds = PATIENCE_SECONDS.get(waiting.reason)
    is_final = waiting.reason in _OF_THE_IMAGE and any(
        each in waiting.message.lower() for each in _FINAL_WORDS
    )
    return 0.0 if seconds is not None and is_final else seconds


def is_of_the_image(waiting: Waiting) -> bool:
    """Whether another image would do."""
    return waiting.reason in _OF_THE_IMAGE and patience_seconds(waiting) == 0.0


def newest_trouble(events: Iterable[Json]) -> str:
    """The newest of a pod's events that tells why it has not begun: reasons that stand nowhere else."""

    def at(event: Json) -> str:
        series: Json = event.get("series") or {}
        return str(
            series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime") or ""
        )

    # Once it has a node, what the scheduler had against it is of no interest.
    telling = [
        each
        for each in events
        if (each.get("type") == "Warning" and each.get("reason") != "FailedScheduling")
        or each.get("reason") == "Pulling"
    ]
    newest = max(telling, key=at, default=None)
    return "" if newest is None else words(str(newest.get("reason")), str(newest.get("message") or ""))
