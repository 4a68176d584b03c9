"""Which rights our account holds where submissions run: all that are needed, and none that is dangerous."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.domain.preflight import Finding, Level, Unsafe, finding

REVIEWS_PATH = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
SHOWN_RIGHTS = 12
EVERYWHERE = ""  # as a namespace: all of them, and what has none


@dataclass(frozen=True, slots=True)
class Right:
    """One verb on one resource. A subresource has a field of its own: as part of a name it is believed."""

    verb: str
    resource: str
    subresource: str = ""
    group: str = ""

    def __str__(self) -> str:
        return f"{self.verb} {self.resource}{f'/{self.subresource}' if self.subresource else ''}"

    def review(self, namespace: str) -> dict[str, Any]:
        """The question whether we have it."""
        attributes = {
            "namespace": namespace,
            "verb": self.verb,
            "group": self.group,
            "resource": self.resource,
            "subresource": self.subresource,
        }
        return {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": {name: text for name, text in attributes.items() if text}},
        }


_NETWORKING = "networking.k8s.io"
_RBAC = "rbac.authorization.k8s.io"
NEEDED = (
    *(Right(verb, "pods") for verb in ("create", "get", "list", "watch", "delete")),
    Right("get", "pods", "log"),
    *(Right(verb, "configmaps") for verb in ("create", "get", "list", "delete")),
    Right("list", "events"),
    *(Right(verb, "networkpolicies", group=_NETWORKING) for verb in ("get", "list")),
)
DANGEROUS = (
    Right("create", "pods", "exec"),
    Right("get", "pods", "exec"),  # what a WebSocket needs
    Right("create", "pods", "attach"),
    Right("create", "pods", "portforward"),
    Right("create", "pods", "proxy"),
    Right("update", "pods", "ephemeralcontainers"),
    Right("patch", "pods", "ephemeralcontainers"),
    Right("update", "pods"),
    Right("patch", "pods"),
    Right("get", "secrets"),
    Right("list", "secrets"),
    Right("create", "secrets"),
    Right("create", "serviceaccounts", "token"),
    Right("create", "networkpolicies", group=_NETWORKING),
    Right("update", "networkpolicies", group=_NETWORKING),
    Right("patch", "networkpolicies", group=_NETWORKING),
    Right("delete", "networkpolicies", group=_NETWORKING),
    Right("create", "rolebindings", group=_RBAC),
    Right("update", "roles", group=_RBAC),
    Right("patch", "roles", group=_RBAC),
    Right("create", "daemonsets", group="apps"),
)
DANGEROUS_EVERYWHERE = (
    Right("create", "pods"),
    Right("get", "secrets"),
    Right("list", "secrets"),
    Right("get", "nodes", "proxy"),
    Right("patch", "nodes"),
    Right("impersonate", "users"),
    Right("patch", "namespaces"),
    Right("create", "clusterrolebindings", group=_RBAC),
    Right("delete", "validatingadmissionpolicybindings", group="admissionregistration.k8s.io"),
)


def questions(namespace: str) -> Iterator[tuple[Right, str]]:
    """All that has to be asked: rights, and where."""
    yield from ((right, namespace) for right in (*NEEDED, *DANGEROUS))
    yield from ((right, EVERYWHERE) for right in DANGEROUS_EVERYWHERE)


def judge_rights(
    held: Mapping[tuple[Right, str], bool], namespace: str, *, in_cluster: bool
) -> Iterator[Finding]:
    """What to make of the answers. What a person may do from outside is no reason to refuse."""
    missing = [str(right) for right in NEEDED if not held[right, namespace]]
    yield finding(
        "needed-rights",
        [f"missing in {namespace}: {', '.join(missing)}"] if missing else [],
        Level.BROKEN,
        f"all {len(NEEDED)} verbs that are needed in {namespace} are allowed",
        "bind the Role of kuberay/base to this account, in the submissions' namespace",
    )
    excess = [str(right) for right in DANGEROUS if held[right, namespace]]
    excess += [f"{right} (everywhere)" for right in DANGEROUS_EVERYWHERE if held[right, EVERYWHERE]]
    if (more := len(excess) - SHOWN_RIGHTS) > 0:
        excess[SHOWN_RIGHTS:] = [f"and {more} more"]
    yield finding(
        Unsafe.RIGHTS,
        [f"held without need: {', '.join(excess)}"] if excess else [],
        Level.UNSAFE if in_cluster else Level.WARNING,
        "none of the rights that would undo a submission's isolation is held",
        "use the account `orchestrator` of kuberay/base, which has the needed verbs alone"
        + ("" if in_cluster else "; a kubeconfig of a person may hold more, which is no reason to refuse"),
    )
