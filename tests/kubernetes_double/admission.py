"""Whether a pod is let in: what the API server's admission plugins say, each in its own words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from tests.kubernetes_double.objects import KINDS, Key, ObjectStore
from tests.kubernetes_double.quantities import asked, quantity
from tests.kubernetes_double.refusals import Json, Refused, bad_request, forbidden

ENFORCE_LABEL = "pod-security.kubernetes.io/enforce"
PLAIN_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
}
PLAIN_VOLUMES |= {"secret"}
FINISHED = ("Failed", "Succeeded")
NAME = re.compile(r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")
LABEL_VALUE = re.compile(r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$")


def validate(plural: str, given: Json) -> None:
    """What the API server checks of every object before admission.

    Raises:
        Refused: 400 or 422.
    """
    metadata = given.get("metadata") or {}
    name = metadata.get("name") or metadata.get("generateName")
    if not name:
        raise Refused(422, "Invalid", "metadata.name: Required value: name or generateName is required")
    if not NAME.match(name) and "name" in metadata:
        raise Refused(
            422, "Invalid", f"metadata.name: Invalid value: {name!r}: a lowercase RFC 1123 subdomain"
        )
    for key, value in (metadata.get("labels") or {}).items():
        if len(value) > 63 or not LABEL_VALUE.match(value):
            raise Refused(422, "Invalid", f"metadata.labels: Invalid value: {value!r} of {key}")
    if plural == "pods":
        _validate_pod(given)


def _validate_pod(pod: Json) -> None:
    spec = pod.get("spec") or {}
    if not spec.get("containers"):
        raise Refused(422, "Invalid", "spec.containers: Required value")
    if spec.get("dnsPolicy") == "None" and not (spec.get("dnsConfig") or {}).get("nameservers"):
        raise Refused(
            422,
            "Invalid",
            "spec.dnsConfig.nameservers: Required value: must provide at least one DNS nameserver when "
            "`dnsPolicy` is None",
        )
    volumes = {volume["name"] for volume in spec.get("volumes") or []}
    for container in spec["containers"]:
        for mount in container.get("volumeMounts") or []:
            if mount["name"] not in volumes:
                raise Refused(
                    422, "Invalid", f'spec.containers[0].volumeMounts[0].name: Not found: "{mount["name"]}"'
                )
        if not container.get("image"):
            raise Refused(422, "Invalid", "spec.containers[0].image: Required value")
    if (seconds := spec.get("activeDeadlineSeconds")) is not None and seconds < 1:
        raise Refused(
            422, "Invalid", "spec.activeDeadlineSeconds: Invalid value: must be between 1 and 2147483647"
        )


def admit_pod(store: ObjectStore, namespace: str, pod: Json, *, hardened: bool) -> None:
    """Pass, or be refused as the first plugin that dislikes it says.

    Raises:
        Refused: 403.
    """
    name = (pod.get("metadata") or {}).get("name") or "pod"
    spec = pod["spec"]
    account = spec.setdefault("serviceAccountName", "default")
    if store.find(Key("serviceaccounts", namespace, account)) is None:
        raise forbidden(
            "pods",
            name,
            f'error looking up service account {namespace}/{account}: serviceaccount "{account}" not found',
        )
    runtime_class = spec.get("runtimeClassName")
    if runtime_class and store.find(Key("runtimeclasses", "", runtime_class)) is None:
        raise forbidden("pods", name, f'pod rejected: RuntimeClass "{runtime_class}" not found')
    priority_class = spec.get("priorityClassName")
    if priority_class and store.find(Key("priorityclasses", "", priority_class)) is None:
        raise forbidden("pods", name, f"no PriorityClass with name {priority_class} was found")
    labels = store.get(Key("namespaces", "", namespace))["metadata"].get("labels") or {}
    if labels.get(ENFORCE_LABEL) == "restricted" and (violations := list(restricted_violations(pod))):
        raise forbidden("pods", name, f'violates PodSecurity "restricted:latest": {", ".join(violations)}')
    if hardened and (weaknesses := list(weaknesses_of(pod))):
        raise forbidden(
            "pods",
            name,
            "ValidatingAdmissionPolicy 'submissions' with binding 'submissions' denied request: "
            + ", ".join(weaknesses),
        )
    _admit_within_quotas(store, namespace, name, pod)


def restricted_violations(pod: Json) -> Iterator[str]:
    """What Pod Security "restricted" finds."""
    spec = pod["spec"]
    if any(spec.get(field) for field in ("hostNetwork", "hostPID", "hostIPC")):
        yield "host namespaces"
    plain = PLAIN_VOLUMES | {"name"}
    if any(set(volume) - plain for volume in spec.get("volumes") or []):
        yield "restricted volume types"
    of_pod = spec.get("securityContext") or {}
    for container in [*spec["containers"], *(spec.get("initContainers") or [])]:
        own = container.get("securityContext") or {}
        must = f'(container "{container["name"]}" must set'
        if own.get("privileged"):
            yield f"privileged {must} securityContext.privileged=false)"
        if own.get("allowPrivilegeEscalation") is not False:
            yield (
                f"allowPrivilegeEscalation != false {must} securityContext.allowPrivilegeEscalation=false)"
            )
        if "ALL" not in (own.get("capabilities") or {}).get("drop", []):
            yield f'unrestricted capabilities {must} securityContext.capabilities.drop=["ALL"])'
        if set((own.get("capabilities") or {}).get("add", [])) - {"NET_BIND_SERVICE"}:
            yield "unrestricted capabilities (added)"
        own_users = spec.get("hostUsers") is False  # then any user is admitted
        if not own_users and own.get("runAsNonRoot", of_pod.get("runAsNonRoot")) is not True:
            yield f"runAsNonRoot != true {must} securityContext.runAsNonRoot=true)"
        if not own_users and own.get("runAsUser", of_pod.get("runAsUser")) == 0:
            yield "runAsUser=0 (container must not set securityContext.runAsUser=0)"
        profile = (own.get("seccompProfile") or of_pod.get("seccompProfile") or {}).get("type")
        if profile not in ("RuntimeDefault", "Localhost"):
            yield f'seccompProfile {must} securityContext.seccompProfile.type to "RuntimeDefault")'
        if any("hostPort" in port for port in container.get("ports") or []):
            yield "hostPort"


def weaknesses_of(pod: Json) -> Iterator[str]:
    """What "restricted" lets through and our ValidatingAdmissionPolicy does not."""
    spec = pod["spec"]
    if spec.get("automountServiceAccountToken") is not False:
        yield "token automount"
    if spec.get("serviceAccountName") != "submission":
        yield "another service account"
    if spec.get("dnsPolicy") != "None":
        yield "DNS of the cluster"
    if spec.get("enableServiceLinks") is not False:
        yield "service links"
    if spec.get("shareProcessNamespace"):
        yield "shared process namespace"
    if spec.get("nodeName"):
        yield "nodeName"
    if any(set(volume) & {"secret", "projected", "csi"} for volume in spec.get("volumes") or []):
        yield "volumes that carry secrets or tokens"
    for container in spec["containers"]:
        own = container.get("securityContext") or {}
        if own.get("runAsUser", (spec.get("securityContext") or {}).get("runAsUser")) == 0:
            yield "root"
        if own.get("readOnlyRootFilesystem") is not True:
            yield "a writable root"
        if (own.get("capabilities") or {}).get("add"):
            yield "added capabilities"
        limits = (container.get("resources") or {}).get("limits") or {}
        if not {"cpu", "memory", "ephemeral-storage"} <= set(limits):
            yield "no limits"
        if any("secretKeyRef" in (each.get("valueFrom") or {}) for each in container.get("env") or []):
            yield "secretKeyRef"
        if any("secretRef" in each for each in container.get("envFrom") or []):
            yield "secretRef"


def _admit_within_quotas(store: ObjectStore, namespace: str, name: str, pod: Json) -> None:
    wanted = asked(pod)
    used: Counter[str] = Counter()
    for _, other in store.select("pods", namespace):
        if (other.get("status") or {}).get("phase") not in FINISHED:
            used.update(asked(other))
    for key, stored in store.select("resourcequotas", namespace):
        _admit_within_quota(key.name, stored["spec"]["hard"], wanted, used, name)


def _admit_within_quota(quota: str, hard: Json, wanted: Counter[str], used: Counter[str], name: str) -> None:
    unsaid = [
        resource
        for resource in hard
        if resource.startswith(("limits.", "requests.")) and resource not in wanted
    ]
    if unsaid:
        raise forbidden("pods", name, f"failed quota: {quota}: must specify {','.join(unsaid)}")
    over = [
        resource
        for resource, most in hard.items()
        if resource in wanted and used[resource] + wanted[resource] > quantity(most)
    ]
    if over:

        def told(counts: Counter[str] | Json) -> str:
            return ",".join(f"{resource}={counts[resource]}" for resource in over)

        raise forbidden(
            "pods",
            name,
            f"exceeded quota: {quota}, requested: {told(wanted)}, used: {told(used)}, limited: {told(hard)}",
        )


def check_type(plural: str, given: object) -> Json:
    """The body, if it says that it is what its path says.

    Raises:
        Refused: 400.
    """
    kind = KINDS[plural]
    if not isinstance(given, dict):
        raise bad_request(
            "the object provided is unrecognized (must be of type Pod): couldn't get version/kind"
        )
    if (given.get("kind"), given.get("apiVersion")) != (kind.kind, kind.api_version):
        raise bad_request(
            f"the API version in the data ({given.get('apiVersion')}) and the kind ({given.get('kind')}) "
            f"do not match the expected ({kind.api_version}, {kind.kind})"
        )
    return given
