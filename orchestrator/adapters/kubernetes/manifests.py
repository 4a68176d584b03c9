"""The two objects of a container attempt: an anchor, and the hardened pod that it owns. Pure."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from orchestrator.ports import ContainerLimits, ContainerSpec

Json = dict[str, Any]

CONTAINER = "submission"
CANARY = "canary"
RPC_PORT = 8000
WORK, TMP = "/work", "/tmp"  # noqa: S108 - paths in the pod
SUBMISSION_USER = 65532
STOP_SECONDS = 5
# A node that is gone for so long does not come back in time for an episode.
NODE_LOST_SECONDS = 30
SESSION_KEY = "session-key"
SESSION_KEY_VARIABLE = "ORCHESTRATOR_SESSION_KEY"

MANAGED_BY = "app.kubernetes.io/managed-by"
MANAGER = "orchestrator"
INSTALLATION = "orchestrator.dev/installation"
JOB = "orchestrator.dev/job"
ATTEMPT = "orchestrator.dev/attempt"
CONTAINER_ID = "orchestrator.dev/container"
COMPONENT = "orchestrator.dev/component"
EXPIRES_AT = "orchestrator.dev/expires-at"
SPEC_HASH = "orchestrator.dev/spec-hash"

HOST_COMMAND = (
    *("python", "-m", "orchestrator.submission.host", "--directory", WORK),
    *("--host", "0.0.0.0", "--port", str(RPC_PORT)),  # noqa: S104 - the NetworkPolicy says who may connect
    *("--no-index", "--seal"),
)


@dataclass(frozen=True, slots=True)
class PodTemplate:
    """What is the same for all pods of an installation. `limits` has no None but for its GPUs."""

    namespace: str
    image: str
    limits: ContainerLimits
    service_account: str = "submission"
    runtime_class: str | None = None
    user_namespaces: bool = False
    node_selector: tuple[tuple[str, str], ...] = ()
    tolerations: tuple[tuple[tuple[str, str], ...], ...] = ()
    priority_class: str | None = None
    pull_secrets: tuple[str, ...] = ()
    gpu_resource: str = "nvidia.com/gpu"
    command: tuple[str, ...] = HOST_COMMAND


def name_of(container_id: UUID, component: str = CONTAINER) -> str:
    """The name of both objects: it says nothing of the submission."""
    return f"{component}-{container_id.hex}"


def selector_of(installation_id: UUID | None, component: str | None = None) -> str:
    """The labels of what is ours: of an installation's, or of every one's."""
    wanted = {MANAGED_BY: MANAGER, COMPONENT: component, INSTALLATION: str(installation_id or "")}
    return ",".join(f"{key}={value}" for key, value in wanted.items() if value)


def anchor(template: PodTemplate, spec: ContainerSpec, component: str = CONTAINER) -> Json:
    """The ConfigMap whose removal removes all of the attempt. Only its own pod gets to see the key in it."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(template, spec, component),
        "immutable": True,
        "data": {SESSION_KEY: spec.session_key.hex()},
    }


def pod(
    template: PodTemplate,
    spec: ContainerSpec,
    anchor_uid: str,
    now: datetime,
    component: str = CONTAINER,
) -> Json:
    """The pod. It ends when it expires, if nobody removes it before."""
    metadata = _metadata(template, spec, component)
    metadata["ownerReferences"] = [
        {"apiVersion": "v1", "kind": "ConfigMap", "name": metadata["name"], "uid": anchor_uid}
    ]
    seconds = math.ceil((spec.expires_at - now).total_seconds())
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": {**_pod_spec(template, spec, component), "activeDeadlineSeconds": max(1, seconds)},
    }


def _metadata(template: PodTemplate, spec: ContainerSpec, component: str) -> Json:
    labels = {
        MANAGED_BY: MANAGER,
        INSTALLATION: str(spec.installation_id),
        CONTAINER_ID: str(spec.container_id),
        COMPONENT: component,
    }
    if component == CONTAINER:
        labels |= {JOB: str(spec.job_id), ATTEMPT: str(spec.attempt)}
    expires_at = spec.expires_at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    described = {
        "labels": labels,
        EXPIRES_AT: expires_at,
        "spec": _pod_spec(template, spec, component),
        "key": hashlib.sha256(spec.session_key).hexdigest(),
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    return {
        "name": name_of(spec.container_id, component),
        "namespace": template.namespace,
        "labels": labels,
        "annotations": {EXPIRES_AT: expires_at, SPEC_HASH: digest},
    }


def _pod_spec(template: PodTemplate, spec: ContainerSpec, component: str) -> Json:
    """All that does not change from one moment to the next."""
    limits = _limits(template, spec.limits)
    wanted: Json = {
        "restartPolicy": "Never",
        "serviceAccountName": template.service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "hostNetwork": False,
        "hostPID": False,
        "hostIPC": False,
        "shareProcessNamespace": False,
        "dnsPolicy": "None",
        "dnsConfig": {"nameservers": ["127.0.0.1"]},
        "terminationGracePeriodSeconds": STOP_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": SUBMISSION_USER,
            "runAsGroup": SUBMISSION_USER,
            "fsGroup": SUBMISSION_USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "tolerations": [*map(dict, template.tolerations), *_lost_node_tolerations()],
        "containers": [_container(template, spec, component, limits)],
        "volumes": [
            {"name": name, "emptyDir": {"sizeLimit": limits["ephemeral-storage"]}} for name in ("work", "tmp")
        ],
    }
    # What is not set is left out: the cluster then decides.
    optional: Json = {
        "hostUsers": False if template.user_namespaces else None,
        "runtimeClassName": template.runtime_class,
        "priorityClassName": template.priority_class,
        "nodeSelector": dict(template.node_selector),
        "imagePullSecrets": [{"name": name} for name in template.pull_secrets],
    }
    return wanted | {name: value for name, value in optional.items() if value not in (None, {}, [])}


def _container(template: PodTemplate, spec: ContainerSpec, component: str, limits: Json) -> Json:
    key = {"name": name_of(spec.container_id, component), "key": SESSION_KEY}
    variables = {
        "HOME": TMP,
        "TMPDIR": TMP,
        "USER": CONTAINER,
        "PYTHONUNBUFFERED": "1",  # else the last words before a crash are lost
        "PYTHONFAULTHANDLER": "1",
    }
    return {
        "name": CONTAINER,
        "image": spec.image or template.image,
        "imagePullPolicy": "IfNotPresent",
        "command": list(template.command),
        "workingDir": WORK,
        "ports": [{"name": "rpc", "containerPort": RPC_PORT, "protocol": "TCP"}],
        "env": [
            {"name": SESSION_KEY_VARIABLE, "valueFrom": {"configMapKeyRef": key}},
            *({"name": name, "value": value} for name, value in variables.items()),
        ],
        "resources": {"requests": dict(limits), "limits": dict(limits)},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "privileged": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "runAsUser": SUBMISSION_USER,
            "runAsGroup": SUBMISSION_USER,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumeMounts": [{"name": "work", "mountPath": WORK}, {"name": "tmp", "mountPath": TMP}],
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }


def _limits(template: PodTemplate, asked: ContainerLimits) -> Json:
    """Requests and limits alike: what a submission may use is there for it, and nothing else is."""
    cpus = asked.cpus or template.limits.cpus or 1.0
    limits = {
        "cpu": f"{max(1, math.ceil(cpus * 1000))}m",
        "memory": str(asked.memory_bytes or template.limits.memory_bytes),
        # Of all volumes and the log together: a kubelet looks after this sum much sooner than after a volume.
        "ephemeral-storage": str(asked.disk_bytes or template.limits.disk_bytes),
    }
    if asked.gpus:
        limits[template.gpu_resource] = str(asked.gpus)
    return limits


def _lost_node_tolerations() -> Sequence[Json]:
    return [
        {
            "key": f"node.kubernetes.io/{state}",
            "operator": "Exists",
            "effect": "NoExecute",
            "tolerationSeconds": NODE_LOST_SECONDS,
        }
        for state in ("not-ready", "unreachable")
    ]


def toleration(taint: str) -> tuple[tuple[str, str], ...]:
    """The toleration of a taint as kubectl writes it: `key=value:effect`, `key:effect`."""
    named, _, effect = taint.partition(":")
    key, has_value, value = named.partition("=")
    wanted = {"key": key, "operator": "Equal" if has_value else "Exists"}
    wanted |= {"value": value} if has_value else {}
    return tuple((wanted | ({"effect": effect} if effect else {})).items())
