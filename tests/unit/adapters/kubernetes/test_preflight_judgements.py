"""What preflight makes of policies, refusals, rights and canaries' reports, without any cluster."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.adapters.kubernetes.preflight_admission import (
    WEAKENINGS,
    Refusal,
    is_weak,
    judge_admission_policy,
    judge_own_pod,
    judge_pod_security,
    unrestricted,
    weakened,
)
from orchestrator.adapters.kubernetes.preflight_network import (
    NODE,
    OTHER_POD,
    CanaryFindings,
    judge_canaries,
    policy_problems,
    selects,
)
from orchestrator.adapters.kubernetes.preflight_rights import (
    DANGEROUS,
    DANGEROUS_EVERYWHERE,
    NEEDED,
    Right,
    judge_rights,
    questions,
)
from orchestrator.domain.preflight import Finding, Level, PreflightReport, Unsafe
from orchestrator.submission.probe import API, UNFILTERED, Outcome, ProbeReport
from tests.kubernetes_double.admission import restricted_violations, weaknesses_of
from tests.unit.kubernetes_double.double_client import a_pod

LABELS = {"orchestrator.dev/component": "submission"}
DENY_ALL = {"spec": {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}}
FROM_WORKERS = {
    "spec": {
        "podSelector": {"matchLabels": LABELS},
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"podSelector": {}}], "ports": [{"port": 8000}]}],
    }
}


# ------------------------------------------------------------------------------------------- policies


@pytest.mark.parametrize(
    ("policies", "problems"),
    [
        ([DENY_ALL, FROM_WORKERS], []),
        ([], ["denies ingress", "denies egress"]),
        ([FROM_WORKERS], ["denies egress"]),
        ([{"spec": {"podSelector": {"matchLabels": {"app": "other"}}}}, DENY_ALL], []),
        ([{"spec": {"podSelector": {"matchLabels": {"app": "other"}}}}], ["denies ingress", "denies egress"]),
        ([{"spec": {"podSelector": {}}}], ["denies egress"]),
        ([DENY_ALL, {"spec": {"podSelector": {}, "egress": [{}]}}], ["allows them egress"]),
        ([DENY_ALL, {"spec": {"podSelector": {}, "ingress": [{}]}}], ["lets everybody connect"]),
        ([DENY_ALL, {"spec": {"podSelector": {}, "ingress": [{"ports": [{}]}]}}], ["lets everybody connect"]),
    ],
)
def test_policies_close_the_network_both_ways_or_it_is_said(policies: Any, problems: list[str]) -> None:
    found = policy_problems(policies, LABELS)

    assert len(found) == len(problems)
    assert all(part in problem for part, problem in zip(problems, found, strict=True))


@pytest.mark.parametrize(
    ("expression", "matches"),
    [
        ({"key": "a", "operator": "In", "values": ["1"]}, True),
        ({"key": "a", "operator": "In", "values": ["2"]}, False),
        ({"key": "b", "operator": "NotIn", "values": ["2"]}, True),
        ({"key": "a", "operator": "NotIn", "values": ["1"]}, False),
        ({"key": "a", "operator": "Exists"}, True),
        ({"key": "a", "operator": "DoesNotExist"}, False),
        ({"key": "b", "operator": "DoesNotExist"}, True),
        ({"key": "a", "operator": "Else"}, False),
    ],
)
def test_selectors_match_as_those_of_kubernetes(expression: Any, matches: bool) -> None:
    assert selects({"matchExpressions": [expression]}, {"a": "1"}) is matches


# ------------------------------------------------------------------------------------------ admission


@pytest.mark.parametrize("weakness", WEAKENINGS)
def test_each_weakening_is_one_that_restricted_admits_and_ours_must_not(weakness: str) -> None:
    pod = weakened(a_pod("mine"), weakness)

    assert list(restricted_violations(pod)) == []
    assert len(list(weaknesses_of(pod))) == 1
    assert list(weaknesses_of(a_pod("mine"))) == []


def test_a_pod_outside_of_restricted_has_no_other_weakness() -> None:
    pod = unrestricted(a_pod("mine"))

    assert list(weaknesses_of(pod)) == []
    assert len(list(restricted_violations(pod))) == 2


def test_a_level_below_restricted_is_not_taken_for_it() -> None:
    baseline = Refusal(403, 'pods "a" is forbidden: violates PodSecurity "baseline:latest": privileged')
    restricted = Refusal(
        403, 'pods "a" is forbidden: violates PodSecurity "restricted:v1.36": seccompProfile'
    )

    assert judge_pod_security(restricted, None).level is Level.OK
    for refusal in (None, baseline, Refusal(403, "serviceaccount not found")):
        assert judge_pod_security(refusal, None).level is Level.UNSAFE


def test_a_quota_speaks_after_the_policies_which_let_the_pod_in() -> None:
    exceeded = Refusal(403, "exceeded quota: small, requested: pods=1")

    assert "lets a pod in" in judge_pod_security(exceeded, exceeded).what
    assert judge_admission_policy({"a token": exceeded}, exceeded).what == "a pod is let in that has a token"


def test_limits_that_a_limit_range_fills_in_are_no_weakness() -> None:
    pod = a_pod("mine")

    assert is_weak(weakened(pod, "no limits"), "no limits")
    assert not is_weak(pod, "no limits")
    assert is_weak(pod, "a writable root")


def test_where_every_pod_is_refused_nothing_is_shown() -> None:
    refused = Refusal(403, "pod rejected: RuntimeClass not found")

    assert "cannot be told" in judge_pod_security(refused, refused).what
    assert "cannot be told" in judge_admission_policy({"a token": refused}, refused).what
    assert judge_admission_policy({"a token": refused}, None).level is Level.OK


@pytest.mark.parametrize(
    ("message", "level", "remedy"),
    [
        ("exceeded quota: small, requested: pods=1", Level.WARNING, "raise the quota"),
        ("failed quota: small: must specify limits.cpu", Level.BROKEN, "quota"),
        ('pod rejected: RuntimeClass "gvisor" not found', Level.BROKEN, "kubernetes_runtime_class"),
        ("no PriorityClass with name high was found", Level.BROKEN, "kubernetes_priority_class"),
        ('serviceaccount "submission" not found', Level.BROKEN, "kuberay/base"),
        ("maximum memory usage per Container is 1Gi, but limit is 2Gi", Level.BROKEN, "LimitRange"),
        ('namespaces "orchestrator-submissions" not found', Level.BROKEN, "kubernetes_namespace"),
        ("something new", Level.BROKEN, "what the API server says"),
    ],
)
def test_a_refusal_of_our_own_pod_says_what_to_do(message: str, level: Level, remedy: str) -> None:
    found = judge_own_pod(Refusal(403, message))

    assert (found.level, found.what) == (level, message)
    assert remedy in found.remedy


# --------------------------------------------------------------------------------------------- rights


def test_a_subresource_is_asked_for_in_a_field_of_its_own() -> None:
    review = Right("create", "pods", "exec").review("mine")

    assert review["spec"]["resourceAttributes"] == {
        "namespace": "mine",
        "verb": "create",
        "resource": "pods",
        "subresource": "exec",
    }
    assert not any("/" in right.resource for right in (*NEEDED, *DANGEROUS, *DANGEROUS_EVERYWHERE))


def test_what_reaches_beyond_the_namespace_is_named_as_such() -> None:
    held = {
        (right, place): (right, place) == (Right("list", "secrets"), "") for right, place in questions("a")
    }
    held |= {(right, "a"): True for right in NEEDED}

    needed, dangerous = judge_rights(held, "a", in_cluster=True)

    assert needed.level is Level.OK
    assert (dangerous.level, dangerous.what) == (
        Level.UNSAFE,
        "held without need: list secrets (everywhere)",
    )


# ------------------------------------------------------------------------------------------- canaries


def report(*reached: str, weaknesses: tuple[str, ...] = (), open_network: str | None = None) -> ProbeReport:
    outcomes = tuple(
        Outcome(name, "192.0.2.1:1", name in reached, "") for name in (API, OTHER_POD, NODE, "DNS")
    )
    return ProbeReport("n", 0.3, open_network, outcomes, weaknesses)


def judged(*reports: ProbeReport, connected: bool | None = True, **where: bool) -> dict[str, Finding]:
    seen = CanaryFindings(reports, connected)
    where = {"in_cluster": True, "sandboxed": False} | where
    return {each.name: each for each in judge_canaries(seen, **where)}


def test_closed_canaries_are_fine() -> None:
    assert {each.level for each in judged(report(), report()).values()} == {Level.OK}


@pytest.mark.parametrize("reached", [API, OTHER_POD, "DNS"])
def test_whatever_one_canary_reaches_is_unsafe(reached: str) -> None:
    found = judged(report(), report(reached))

    assert found[Unsafe.NETWORK].level is Level.UNSAFE
    assert reached in found[Unsafe.NETWORK].what
    assert found["node"].level is Level.OK


def test_a_node_that_is_reached_is_a_warning() -> None:
    found = judged(report(NODE))

    assert (found["node"].level, found[Unsafe.NETWORK].level) == (Level.WARNING, Level.OK)


def test_a_network_that_never_closed_is_unsafe_though_nothing_was_reached_later() -> None:
    assert judged(report(open_network="it is open"))[Unsafe.NETWORK].level is Level.UNSAFE


def test_a_pod_of_ours_that_cannot_connect_is_broken_and_a_laptop_is_not() -> None:
    assert judged(report(), connected=False)["rpc-port"].level is Level.BROKEN
    assert judged(report(), connected=False, in_cluster=False)["rpc-port"].level is Level.WARNING


def test_a_sandbox_need_not_filter_system_calls() -> None:
    unfiltered = report(weaknesses=(UNFILTERED,))

    assert judged(unfiltered)[Unsafe.CONTAINER].level is Level.UNSAFE
    assert judged(unfiltered, sandboxed=True)[Unsafe.CONTAINER].level is Level.OK


# --------------------------------------------------------------------------------------------- report


def test_broken_ones_cannot_be_accepted() -> None:
    unsafe, broken = Finding("network", Level.UNSAFE, "open"), Finding("pod", Level.BROKEN, "refused", "mend")
    accepted = frozenset({"network", "pod"})

    assert PreflightReport("here", (unsafe,), accepted).is_fine
    assert PreflightReport("here", (unsafe, broken), accepted).refusals == (broken,)
    assert list(PreflightReport("here", (unsafe, broken), accepted).lines()) == [
        "preflight of here",
        "  accepted  network  open",
        "  broken    pod      refused",
        "                     to do: mend",
        "no submission runs here: pod",
    ]


def test_the_page_explains_every_finding() -> None:
    from pathlib import Path

    page = (Path(__file__).parents[4] / "docs" / "preflight.md").read_text()

    for name in (*Unsafe, "api", "needed-rights", "pod", "node", "rpc-port", "runtime-class"):
        assert f"| `{name}` |" in page
    assert f"all {len(NEEDED)} verbs" in page
    assert f"each of {len(WEAKENINGS)} single weakenings" in page
