"""The pods that built manifests lead to: whose they are, and as what policies see them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from pathlib import Path

from orchestrator.adapters.kubernetes.preflight_network import selects, types_of
from tests.kuberay.kustomize import Json, build

KUBERAY = Path(__file__).resolve().parents[2] / "kuberay"
CONTROL, SUBMISSIONS = "orchestrator", "orchestrator-submissions"


@dataclass(frozen=True)
class Pod:
    """One pod, or all of a template."""

    name: str
    namespace: str
    labels: dict[str, str]
    spec: Json

    @property
    def containers(self) -> list[Json]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


def objects_of(overlay: str) -> list[Json]:
    """All that is applied for an overlay, or for base: its migration comes along."""
    migration = "migration" if overlay == "base" else f"{overlay}/migration"
    return build(KUBERAY / overlay) + build(KUBERAY / migration)


def pods_of(objects: list[Json]) -> Iterator[Pod]:
    """Of what is no pod itself, but makes some."""
    for each in objects:
        namespace = each["metadata"].get("namespace", "")
        if each["kind"] == "RayService":
            cluster = each["spec"]["rayClusterConfig"]
            yield _of_ray("head", "head", namespace, cluster["headGroupSpec"])
            for group in cluster["workerGroupSpecs"]:
                yield _of_ray(group["groupName"], "worker", namespace, group)
        elif each["kind"] in ("Job", "Deployment", "StatefulSet"):
            template = each["spec"]["template"]
            labels = template["metadata"]["labels"]
            yield Pod(each["metadata"]["name"], namespace, labels, template["spec"])


def _of_ray(name: str, node_type: str, namespace: str, group: Json) -> Pod:
    """With the labels that KubeRay adds."""
    template = group["template"]
    labels = {"ray.io/is-ray-node": "yes", "ray.io/node-type": node_type, "ray.io/cluster": "orchestrator-x"}
    labels["ray.io/serve"] = "true"  # on a head once its proxy answers
    return Pod(name, namespace, template["metadata"]["labels"] | labels, template["spec"])


def submission(component: str = "submission") -> Pod:
    """A pod of the adapter, as far as policies look at it."""
    return Pod(component, SUBMISSIONS, {"orchestrator.dev/component": component}, {"containers": []})


def stranger(namespace: str, **labels: str) -> Pod:
    """A pod of somebody else's."""
    return Pod("stranger", namespace, labels, {"containers": []})


def connects(objects: list[Json], source: Pod | str, target: Pod | str, port: int) -> bool:
    """Whether NetworkPolicies let a connection through; an address stands for what is outside."""
    policies = [each for each in objects if each["kind"] == "NetworkPolicy"]
    return (isinstance(source, str) or _allows(policies, source, "egress", target, port)) and (
        isinstance(target, str) or _allows(policies, target, "ingress", source, port)
    )


def _allows(policies: list[Json], pod: Pod, direction: str, peer: Pod | str, port: int) -> bool:
    ours = [
        policy["spec"]
        for policy in policies
        if policy["metadata"]["namespace"] == pod.namespace
        and selects(policy["spec"]["podSelector"], pod.labels)
        and direction.capitalize() in types_of(policy["spec"])
    ]
    rules = [rule for spec in ours for rule in spec.get(direction, [])]
    peers = "to" if direction == "egress" else "from"
    return not ours or any(
        (not rule.get("ports") or any(each["port"] == port for each in rule["ports"]))
        and (not rule.get(peers) or any(_is_peer(each, peer, pod.namespace) for each in rule[peers]))
        for rule in rules
    )


def _is_peer(rule: Json, peer: Pod | str, namespace: str) -> bool:
    if isinstance(peer, str):
        return "ipBlock" in rule and _in_block(rule["ipBlock"], peer)
    if "ipBlock" in rule:
        # By its address a pod is somewhere in 10.0.0.0/8; only "everywhere" holds that in our manifests.
        return _in_block(rule["ipBlock"], "10.1.2.3")
    spaces = rule.get("namespaceSelector")
    named = {"kubernetes.io/metadata.name": peer.namespace}
    inside = selects(spaces, named) if spaces is not None else peer.namespace == namespace
    return inside and selects(rule.get("podSelector"), peer.labels)


def _in_block(block: Json, address: str) -> bool:
    wanted = ip_address(address)
    return wanted in ip_network(block["cidr"]) and not any(
        wanted in ip_network(each) for each in block.get("except", [])
    )
