"""What the API server lets into the submissions' namespace, found out by server-side dry runs alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.domain.preflight import Finding, Level, Unsafe, finding

Json = dict[str, Any]

_NO_LIMITS = "no limits"


@dataclass(frozen=True, slots=True)
class Refusal:
    """How the API server refused an object; None in its place where it took it."""

    status: int
    message: str

    @property
    def is_of_quota(self) -> bool:
        """Whether a quota did it, which is asked after all policies: they had let the object in."""
        return "exceeded quota" in self.message or "failed quota" in self.message


def _pod(change: Callable[[Json], None]) -> Callable[[Json], None]:
    return lambda pod: change(pod["spec"])


def _container(change: Callable[[Json], None]) -> Callable[[Json], None]:
    return lambda pod: change(pod["spec"]["containers"][0])


def _set(**fields: Any) -> Callable[[Json], None]:
    return lambda part: part.update(fields)


def _secure(**fields: Any) -> Callable[[Json], None]:
    return _container(lambda container: container["securityContext"].update(fields))


def _with_volume(volume: Json) -> Callable[[Json], None]:
    return _pod(lambda spec: spec.setdefault("volumes", []).append({"name": "weakness"} | volume))


def _with_secret_variable(container: Json) -> None:
    reference = {"secretKeyRef": {"name": "weakness", "key": "weakness"}}
    container.setdefault("env", []).append({"name": "WEAKNESS", "valueFrom": reference})


def _add_capability(container: Json) -> None:
    container["securityContext"]["capabilities"]["add"] = ["NET_BIND_SERVICE"]


def _as_root_of_user_namespace(pod: Json) -> None:
    root = {"runAsUser": 0, "runAsNonRoot": False}
    pod["spec"]["hostUsers"] = False
    for part in (pod["spec"], pod["spec"]["containers"][0]):
        part.setdefault("securityContext", {}).update(root)


def _with_cluster_dns(spec: Json) -> None:
    spec["dnsPolicy"] = "ClusterFirst"
    spec.pop("dnsConfig", None)


_TOKEN = {"serviceAccountToken": {"path": "token", "expirationSeconds": 3600}}
# Pod Security "restricted" lets each of these in.
WEAKENINGS: Mapping[str, Callable[[Json], None]] = {
    "a token of its service account": _pod(_set(automountServiceAccountToken=True)),
    "a projected token": _with_volume({"projected": {"sources": [_TOKEN]}}),
    "another service account": _pod(_set(serviceAccountName="default")),
    "a Secret as a volume": _with_volume({"secret": {"secretName": "weakness", "optional": True}}),
    "a Secret as a variable": _container(_with_secret_variable),
    "a writable root": _secure(readOnlyRootFilesystem=False),
    _NO_LIMITS: _container(_set(resources={})),
    "the cluster's DNS": _pod(_with_cluster_dns),
    "service links": _pod(_set(enableServiceLinks=True)),
    "a shared process namespace": _pod(_set(shareProcessNamespace=True)),
    "a capability": _container(_add_capability),
    "root in a user namespace": _as_root_of_user_namespace,
    "a node of its choice": _pod(_set(nodeName="weakness")),
}


def weakened(pod: Json, weakness: str) -> Json:
    """This pod with one weakness of `WEAKENINGS`."""
    changed = copy.deepcopy(pod)
    WEAKENINGS[weakness](changed)
    return changed


def is_weak(created: Json, weakness: str) -> bool:
    """Whether a pod that was let in has the weakness still: a LimitRange fills limits in."""
    limits = created["spec"]["containers"][0].get("resources", {}).get("limits", {})
    return weakness != _NO_LIMITS or not {"cpu", "memory", "ephemeral-storage"} <= set(limits)


def unrestricted(pod: Json) -> Json:
    """This pod, within Pod Security "baseline" and not within "restricted", and with nothing else changed."""
    changed = copy.deepcopy(pod)
    changed["spec"].get("securityContext", {}).pop("seccompProfile", None)
    context = changed["spec"]["containers"][0]["securityContext"]
    context.pop("seccompProfile", None)
    context["allowPrivilegeEscalation"] = True
    return changed


def judge_own_pod(refusal: Refusal | None) -> Finding:
    """Whether the namespace takes the very pod in which a submission runs."""
    name, good = "pod", "the namespace takes our pod: quota, limits, runtime class and account fit"
    if refusal is None:
        return Finding(name, Level.OK, good)
    message = refusal.message
    if "exceeded quota" in message:
        return Finding(
            name, Level.WARNING, message, "submissions wait until there is room: raise the quota, or wait"
        )
    for part, remedy in _REMEDIES.items():
        if part.lower() in message.lower():
            return Finding(name, Level.BROKEN, message, remedy)
    return Finding(name, Level.BROKEN, message or f"HTTP {refusal.status}", "see what the API server says")


_REMEDIES = {
    "failed quota": "the quota wants a request or limit that our pod does not have: see kuberay/base's quota",
    "RuntimeClass": "set kubernetes_runtime_class to a RuntimeClass of this cluster, or create that one",
    "PriorityClass": "set kubernetes_priority_class to a PriorityClass of this cluster, or create that one",
    "serviceaccount": "apply kuberay/base: it has the service account without any rights",
    "maximum": "lower kubernetes_default_*, or raise the namespace's LimitRange",
    "minimum": "raise kubernetes_default_*, or lower the namespace's LimitRange",
    "namespaces": "apply kuberay/base, or set kubernetes_namespace",
    "ValidatingAdmissionPolicy": "the policy is not that of this version: apply this version's kuberay/base",
    "PodSecurity": "a setting weakens our pod: see kubernetes_* settings",
}


def judge_pod_security(refusal: Refusal | None, own: Refusal | None) -> Finding:
    """Whether the namespace enforces Pod Security "restricted", by a pod that only this level refuses."""
    remedy = "label the namespace pod-security.kubernetes.io/enforce=restricted, as kuberay/base does"
    if refusal is not None and 'violates PodSecurity "restricted' in refusal.message:
        return Finding(
            Unsafe.POD_SECURITY, Level.OK, 'the namespace enforces Pod Security "restricted" (dry run)'
        )
    if refusal is None or refusal.is_of_quota:
        what = 'the namespace lets a pod in that Pod Security "restricted" refuses'
    elif own is not None and refusal.message == own.message:
        what = "it cannot be told whether Pod Security is enforced: every pod of ours is refused"
    else:
        what = f'a pod outside of Pod Security "restricted" was refused for another reason: {refusal.message}'
    return Finding(Unsafe.POD_SECURITY, Level.UNSAFE, what, remedy)


def judge_admission_policy(refusals: Mapping[str, Refusal | None], own: Refusal | None) -> Finding:
    """Whether each single weakening that "restricted" admits is refused."""
    let_in = [weakness for weakness, refusal in refusals.items() if refusal is None or refusal.is_of_quota]
    unclear = [
        weakness
        for weakness, refusal in refusals.items()
        if weakness not in let_in and refusal is not None and own is not None
        if refusal.message == own.message
    ]
    problems = [f"a pod is let in that has {', or '.join(let_in)}"] if let_in else []
    if unclear:
        problems.append("it cannot be told for all weakenings: every pod of ours is refused")
    return finding(
        Unsafe.ADMISSION_POLICY,
        problems,
        Level.UNSAFE,
        f"each of {len(refusals)} single weakenings of our pod is refused (dry run)",
        "apply the ValidatingAdmissionPolicy and its binding of kuberay/base",
    )
