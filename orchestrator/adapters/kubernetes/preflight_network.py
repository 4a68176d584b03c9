"""What NetworkPolicies say of submissions' pods, and what canaries have seen of how they are enforced."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.domain.preflight import Finding, Level, Unsafe, finding
from orchestrator.submission.probe import UNFILTERED, Outcome, ProbeReport

Json = dict[str, Any]

OTHER_POD = "another pod of the namespace"
NODE = "the kubelet of its node"
_REACHED_IS_A_WARNING = (NODE,)


@dataclass(frozen=True, slots=True)
class CanaryFindings:
    """What two canaries have said, and whether this process could connect to the RPC port of one.

    `trouble` is why there is nothing to say; `connected` is None where nothing was tried.
    """

    reports: tuple[ProbeReport, ...] = ()
    connected: bool | None = None
    trouble: str = ""


# ------------------------------------------------------------------------------------------- policies


def policy_problems(policies: Sequence[Json], labels: Mapping[str, str]) -> list[str]:
    """Why these NetworkPolicies do not close the network of pods with these labels, both ways."""
    ours = [policy["spec"] for policy in policies if selects(policy["spec"].get("podSelector"), labels)]
    problems = [
        f"no policy denies {direction.lower()} to submissions' pods by default"
        for direction in ("Ingress", "Egress")
        if not any(direction in types_of(spec) for spec in ours)
    ]
    if any(spec.get("egress") for spec in ours):
        problems.append("a policy allows them egress")
    if any(not (rule or {}).get("from") for spec in ours for rule in spec.get("ingress") or []):
        problems.append("a policy lets everybody connect to them")
    return problems


def types_of(spec: Json) -> Sequence[str]:
    """The directions that a policy is about; where it names none, egress only if it has rules for it."""
    named: Sequence[str] = spec.get("policyTypes") or ["Ingress", *(["Egress"] if spec.get("egress") else [])]
    return named


def selects(selector: Json | None, labels: Mapping[str, str]) -> bool:
    """Whether a label selector matches; an empty one matches everything."""
    selector = selector or {}
    matches = selector.get("matchLabels") or {}
    return all(labels.get(key) == value for key, value in matches.items()) and all(
        _fits(expression, labels) for expression in selector.get("matchExpressions") or []
    )


def _fits(expression: Json, labels: Mapping[str, str]) -> bool:
    value, values = labels.get(expression["key"]), expression.get("values") or []
    match expression["operator"]:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
    return False


def judge_policies(policies: Sequence[Json], labels: Mapping[str, str], seen: CanaryFindings) -> Finding:
    """Whether a default-deny policy is there. Other means than policies will do, if canaries show it."""
    problems = policy_problems(policies, labels)
    closed = bool(seen.reports) and not any(_open(seen.reports))
    return finding(
        Unsafe.NETWORK_POLICY,
        problems,
        Level.WARNING if closed else Level.UNSAFE,
        f"a default-deny policy covers submissions' pods, both ways ({len(policies)} policies there)",
        "apply kuberay/base's NetworkPolicies in the submissions' namespace"
        + ("; the canaries found the network closed all the same" if closed else ""),
    )


# -------------------------------------------------------------------------------------------- canaries


def judge_canaries(seen: CanaryFindings, *, in_cluster: bool, sandboxed: bool) -> Iterator[Finding]:
    """Whether pods like a submission's really can reach nothing, and are reached by us alone."""
    if not seen.reports:
        why = f"that pods are isolated is not shown: {seen.trouble or 'no canary has reported'}"
        remedy = "submissions' pods would fare no better: mend what it says, or come again when there is room"
        yield Finding(Unsafe.CANARY, Level.UNSAFE, why, remedy)
        return
    yield Finding(Unsafe.CANARY, Level.OK, "two canary pods ran, made like a submission's, and reported")
    times = [each.sealed_after_seconds for each in seen.reports if each.sealed_after_seconds is not None]
    yield finding(
        Unsafe.NETWORK,
        list(dict.fromkeys(_open(seen.reports))),
        Level.UNSAFE,
        f"canary pods reach nothing: {_tried(seen.reports)}; closed within {max(times, default=0):.1f} s",
        "the policies are not enforced: use a network plugin that enforces NetworkPolicy, for egress, too",
    )
    yield _judge_node(seen.reports)
    yield _judge_rpc_port(seen, in_cluster=in_cluster)
    found = {weakness for each in seen.reports for weakness in each.weaknesses}
    yield finding(
        Unsafe.CONTAINER,
        sorted(found - ({UNFILTERED} if sandboxed else set())),
        Level.UNSAFE,
        "seen from inside: no root, no capability, a read-only root, filtered system calls, no token",
        "the node's container runtime does not do what the pod asks for: use another, or another node pool",
    )


def _open(reports: Iterable[ProbeReport]) -> Iterator[str]:
    for report in reports:
        if report.open_network is not None:
            yield report.open_network
        for outcome in report.outcomes:
            if outcome.reached and outcome.name not in _REACHED_IS_A_WARNING:
                yield f"a canary pod reached {outcome.name} ({outcome.address})"


def _tried(reports: Iterable[ProbeReport]) -> str:
    names = dict.fromkeys(outcome.name for report in reports for outcome in report.outcomes)
    return ", ".join(name for name in names if name not in _REACHED_IS_A_WARNING)


def _judge_node(reports: Iterable[ProbeReport]) -> Finding:
    reached: list[Outcome] = [
        outcome
        for report in reports
        for outcome in report.outcomes
        if outcome.name in _REACHED_IS_A_WARNING and outcome.reached
    ]
    return finding(
        "node",
        [f"a canary pod reached {each.name} ({each.address})" for each in reached],
        Level.WARNING,
        "nor the node that they run on",
        "some network plugins leave a pod's own node open: deny it with the plugin's own kind of policy",
    )


def _judge_rpc_port(seen: CanaryFindings, *, in_cluster: bool) -> Finding:
    name, what = (
        "rpc-port",
        "this process connects to the RPC port of a canary, and the other canary does not",
    )
    tried = any(outcome.name == OTHER_POD for report in seen.reports for outcome in report.outcomes)
    if seen.connected and tried:
        return Finding(name, Level.OK, what)
    if seen.connected is None or seen.connected:
        return Finding(name, Level.WARNING, "it was not tried who reaches the RPC port", "look at `canary`")
    if in_cluster:
        return Finding(
            name,
            Level.BROKEN,
            "this pod cannot connect to the RPC port of a canary: no archive could be pushed",
            "run it in a pod that the NetworkPolicy of kuberay/base admits: namespace orchestrator, label "
            "orchestrator.dev/role control or rollout",
        )
    return Finding(
        name,
        Level.WARNING,
        "from outside of the cluster the RPC port is out of reach: whether workers reach it is not shown",
        "run `orchestrator preflight` in a control pod; to run submissions from here, route pod addresses "
        "to this machine and add its address range to the ingress rule (kuberay/overlays/dev)",
    )
