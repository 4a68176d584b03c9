"""Whatever makes a submission's pod weaker is refused: by Pod Security "restricted", or by our policy."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.adapters.kubernetes.preflight_admission import WEAKENINGS, weakened
from tests.kuberay.admission_policy import refusals
from tests.kuberay.kustomize import Json, build
from tests.kubernetes_double.admission import restricted_violations

ROOT = Path(__file__).resolve().parents[2]
OBJECTS = build(ROOT / "kuberay" / "base")
PRODUCTION = build(ROOT / "kuberay" / "overlays" / "production")
GOLDEN: Json = json.loads((ROOT / "tests" / "golden" / "kubernetes" / "pod.txt").read_text())

# What an operator sets, or what does not keep a submission in: the rest of the pod's spec is what does.
FREE = (
    "activeDeadlineSeconds",
    "containers.0.command",
    "containers.0.env",
    "containers.0.image",
    "containers.0.imagePullPolicy",
    "containers.0.name",
    "containers.0.ports",
    "containers.0.terminationMessagePolicy",
    "containers.0.volumeMounts",
    "containers.0.workingDir",
    "tolerations",
    "volumes.0.name",
    "volumes.1.name",
)
# What is the same when it is absent, be it by default or because the pod's own setting counts.
SAME_WHEN_ABSENT = (
    "hostIPC",
    "hostNetwork",
    "hostPID",
    "shareProcessNamespace",
    "securityContext.fsGroup",
    *(
        f"containers.0.securityContext.{field}"
        for field in ("privileged", "runAsNonRoot", "runAsUser", "runAsGroup")
    ),
    "containers.0.securityContext.seccompProfile",
)
# Without a container or a volume that it mounts, it is no pod: the API server itself refuses it.
NO_POD = ("containers", "containers.0", "volumes", "volumes.0", "volumes.1")


def fields(part: Any, path: str = "") -> Iterator[str]:
    """The paths of all that is said in a spec, leaves and what holds them."""
    items = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    for name, value in items:
        yield f"{path}{name}"
        yield from fields(value, f"{path}{name}.")


def is_free(path: str) -> bool:
    return any(path == free or path.startswith(f"{free}.") for free in FREE)


def place_of(pod: Json, path: str) -> tuple[Any, Any]:
    """What holds this field, and its key there."""
    *parents, last = path.split(".")
    place: Any = pod["spec"]
    for name in parents:
        place = place[int(name) if isinstance(place, list) else name]
    return place, int(last) if isinstance(place, list) else last


def other_than(value: Any) -> Any:
    """Another value of the same type."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1000
        case str():
            return "1" if value.endswith(("m", "0", "8", "6")) else "Another"
    return None


HOLDING = [path for path in fields(GOLDEN["spec"]) if not is_free(path)]
LEAVES = [
    path
    for path in HOLDING
    if not isinstance(place_of(GOLDEN, path)[0][place_of(GOLDEN, path)[1]], dict | list)
    and not path.endswith("sizeLimit")  # what all volumes hold is limited by ephemeral-storage, and sooner
]


def refused(pod: Json) -> list[str]:
    """By whom, and why."""
    return [*restricted_violations(pod), *refusals(OBJECTS, pod)]


def test_the_pod_of_a_submission_is_let_in() -> None:
    assert refused(GOLDEN) == []


@pytest.mark.parametrize("path", sorted({*HOLDING} - {*SAME_WHEN_ABSENT} - {*NO_POD}))
def test_a_pod_that_leaves_a_field_out_is_refused(path: str) -> None:
    pod = copy.deepcopy(GOLDEN)
    place, last = place_of(pod, path)

    del place[last]

    assert refused(pod) != []


@pytest.mark.parametrize("path", SAME_WHEN_ABSENT)
def test_a_pod_may_leave_out_what_is_so_by_default(path: str) -> None:
    pod = copy.deepcopy(GOLDEN)
    place, last = place_of(pod, path)

    del place[last]

    assert refused(pod) == []


@pytest.mark.parametrize("path", LEAVES)
def test_a_pod_that_says_otherwise_in_a_field_is_refused(path: str) -> None:
    pod = copy.deepcopy(GOLDEN)
    place, last = place_of(pod, path)

    place[last] = other_than(place[last])

    assert refused(pod) != []


def _spec(**more: Any) -> Callable[[Json], None]:
    return lambda pod: pod["spec"].update(more)


def _container(**more: Any) -> Callable[[Json], None]:
    return lambda pod: pod["spec"]["containers"][0].update(more)


def _secure(**more: Any) -> Callable[[Json], None]:
    return lambda pod: pod["spec"]["containers"][0]["securityContext"].update(more)


def _secure_pod(**more: Any) -> Callable[[Json], None]:
    return lambda pod: pod["spec"]["securityContext"].update(more)


def _volume(**source: Any) -> Callable[[Json], None]:
    return lambda pod: pod["spec"]["volumes"].append({"name": "more", **source})


def _variable(**source: Any) -> Callable[[Json], None]:
    return lambda pod: pod["spec"]["containers"][0]["env"].append({"name": "MORE", "valueFrom": source})


def _as_root_of_a_user_namespace(pod: Json) -> None:
    pod["spec"]["hostUsers"] = False
    for part in (pod["spec"], pod["spec"]["containers"][0]):
        part["securityContext"] |= {"runAsUser": 0, "runAsNonRoot": False}


SIDECAR = {
    "name": "more",
    "image": "more",
    "securityContext": GOLDEN["spec"]["containers"][0]["securityContext"],
}
PROBE = {"tcpSocket": {"port": 80}}
ADDITIONS: dict[str, Callable[[Json], None]] = {
    "a second container": lambda pod: pod["spec"]["containers"].append(
        {**pod["spec"]["containers"][0], "name": "more"}
    ),
    "an init container": _spec(initContainers=[SIDECAR]),
    "an ephemeral container": _spec(ephemeralContainers=[SIDECAR]),
    "a Secret as a volume": _volume(secret={"secretName": "more"}),
    "a projected token": _volume(projected={"sources": [{"serviceAccountToken": {"path": "token"}}]}),
    "a ConfigMap as a volume": _volume(configMap={"name": "more"}),
    "the downward API": _volume(downwardAPI={"items": []}),
    "a claim": _volume(persistentVolumeClaim={"claimName": "more"}),
    "a claim of its own": _volume(ephemeral={"volumeClaimTemplate": {"spec": {}}}),
    "a driver's volume": _volume(csi={"driver": "more"}),
    "a directory of the node": _volume(hostPath={"path": "/"}),
    "an image as a volume": _volume(image={"reference": "more"}),
    "a volume without a limit": _volume(emptyDir={}),
    "a Secret as a variable": _variable(secretKeyRef={"name": "more", "key": "more"}),
    "another one's session key": _variable(
        configMapKeyRef={"name": "submission-other", "key": "session-key"}
    ),
    "a field as a variable": _variable(fieldRef={"fieldPath": "status.hostIP"}),
    "a file as a variable": _variable(fileKeyRef={"volumeName": "work", "path": "p", "key": "k"}),
    "variables of a Secret": _container(envFrom=[{"secretRef": {"name": "more"}}]),
    "variables of a ConfigMap": _container(envFrom=[{"configMapRef": {"name": "more"}}]),
    "a capability": _secure(capabilities={"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]}),
    "an unmasked /proc": _secure(procMount="Unmasked"),
    "a seccomp profile of the node": _secure(seccompProfile={"type": "Localhost", "localhostProfile": "p"}),
    "a seccomp profile for the pod": _secure_pod(
        seccompProfile={"type": "Localhost", "localhostProfile": "p"}
    ),
    "an AppArmor profile": _secure(appArmorProfile={"type": "Localhost", "localhostProfile": "p"}),
    "an AppArmor profile for the pod": _secure_pod(appArmorProfile={"type": "Unconfined"}),
    "a sysctl": _secure_pod(sysctls=[{"name": "net.ipv4.ip_unprivileged_port_start", "value": "0"}]),
    "another group": _secure_pod(supplementalGroups=[0]),
    "root in a user namespace": _as_root_of_a_user_namespace,
    "another system": _spec(os={"name": "windows"}),
    "a device": _spec(resourceClaims=[{"name": "more"}]),
    "a name for an address": _spec(hostAliases=[{"ip": "10.0.0.1", "hostnames": ["more"]}]),
    "another nameserver": _spec(dnsConfig={"nameservers": ["127.0.0.1", "10.96.0.10"]}),
    "the cluster's DNS": _spec(dnsPolicy="ClusterFirst"),
    "a node of its choice": _spec(nodeName="more"),
    "a liveness probe": _container(livenessProbe=PROBE),
    "a readiness probe": _container(readinessProbe=PROBE),
    "a start-up probe": _container(startupProbe=PROBE),
    "a hook": _container(lifecycle={"preStop": {"httpGet": {"host": "169.254.169.254", "port": 80}}}),
    "a port of the node": _container(ports=[{"containerPort": 8000, "hostPort": 8000}]),
    "no limits": _container(resources={}),
    "no limit of its disk": lambda pod: [
        pod["spec"]["containers"][0]["resources"][kind].pop("ephemeral-storage")
        for kind in ("limits", "requests")
    ],
    "limits above its requests": lambda pod: pod["spec"]["containers"][0]["resources"]["limits"].update(
        cpu="8"
    ),
    "no deadline": lambda pod: pod["spec"].pop("activeDeadlineSeconds"),
    "restarts": _spec(restartPolicy="OnFailure"),
    "an hour to stop": _spec(terminationGracePeriodSeconds=3600),
}


@pytest.mark.parametrize("addition", ADDITIONS)
def test_a_pod_with_something_more_is_refused_by_one_rule_that_says_so(addition: str) -> None:
    pod = copy.deepcopy(GOLDEN)

    ADDITIONS[addition](pod)

    assert refused(pod) != []
    assert [why for why in refused(pod) if "cannot be evaluated" in why] == []


@pytest.mark.parametrize("weakness", WEAKENINGS)
def test_what_preflight_tries_is_refused_by_our_policy_itself(weakness: str) -> None:
    assert refusals(OBJECTS, weakened(GOLDEN, weakness)) != []


def test_a_pod_that_runs_may_be_changed_and_have_its_node() -> None:
    pod = copy.deepcopy(GOLDEN)
    pod["spec"]["nodeName"] = "node-1"

    assert refusals(OBJECTS, pod, "UPDATE") == []


def test_what_settings_may_add_to_the_pod_is_let_in() -> None:
    pod = copy.deepcopy(GOLDEN)
    pod["spec"] |= {
        "hostUsers": False,
        "runtimeClassName": "gvisor",
        "priorityClassName": "low",
        "nodeSelector": {"pool": "submissions"},
        "imagePullSecrets": [{"name": "pull"}],
    }
    for kind in ("limits", "requests"):
        pod["spec"]["containers"][0]["resources"][kind]["nvidia.com/gpu"] = "1"

    assert refused(pod) == []


def test_production_takes_no_image_by_its_tag() -> None:
    pinned, tagged = copy.deepcopy(GOLDEN), copy.deepcopy(GOLDEN)
    pinned["spec"]["containers"][0]["image"] = f"registry.example/submission@sha256:{'a' * 64}"
    tagged["spec"]["containers"][0]["image"] = "registry.example/submission:latest"

    assert refusals(PRODUCTION, pinned) == []
    assert refusals(PRODUCTION, tagged) == ["a submission's image is pinned by its digest"]


def test_the_policy_is_bound_to_the_submissions_namespace_and_denies() -> None:
    [policy] = [each for each in OBJECTS if each["kind"] == "ValidatingAdmissionPolicy"]
    [binding] = [each for each in OBJECTS if each["kind"] == "ValidatingAdmissionPolicyBinding"]

    assert binding["spec"]["policyName"] == policy["metadata"]["name"]
    assert binding["spec"]["validationActions"] == ["Deny"]
    assert binding["spec"]["matchResources"]["namespaceSelector"]["matchLabels"] == {
        "kubernetes.io/metadata.name": "orchestrator-submissions"
    }
    assert policy["spec"]["failurePolicy"] == "Fail"
