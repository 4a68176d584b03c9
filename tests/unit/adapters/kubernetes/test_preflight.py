"""One look at a whole cluster, with the double of its API server: each red line, and none where all is well.

What the double cannot show is that its pods, which are plain processes, are hardened.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from orchestrator.adapters.kubernetes import canaries
from orchestrator.adapters.kubernetes.preflight import Preflight
from orchestrator.adapters.kubernetes.preflight_rights import NEEDED
from orchestrator.domain.preflight import Finding, Level, PreflightReport, Unsafe
from tests.kubernetes_double import NAMESPACE, ApiDouble, Plan, emptied
from tests.unit.adapters.kubernetes.conftest import PlainApi, PlainMaker


@pytest.fixture(autouse=True)
def short_seal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canaries, "SEAL_SECONDS", 1.0)


def rules(*more: dict[str, Any]) -> dict[str, Any]:
    """The Role of the control plane, and more than it."""
    needed = [
        {"apiGroups": [right.group], "resources": [str(right).split()[1]], "verbs": [right.verb]}
        for right in NEEDED
    ]
    return {NAMESPACE: [*needed, *more]}


class Cluster:
    """A double with these options, and a look at it."""

    def __init__(self, **options: Any) -> None:
        self.double = ApiDouble(**{"rights": rules()} | options)

    async def __aenter__(self) -> ApiDouble:
        self._session = aiohttp.ClientSession()
        await self.double.__aenter__()
        self.double.node.plan_for = lambda pod: Plan(polices_python=True)
        return self.double

    async def __aexit__(self, *error: Any) -> None:
        await self._session.close()
        await self.double.__aexit__(None, None, None)

    async def look(self, **options: Any) -> PreflightReport:
        api = PlainApi(self.double, self._session)
        preflight = Preflight(api, PlainMaker(), **{"in_cluster": True, "sandboxed": True} | options)
        async with emptied(self.double):
            return await preflight.report()


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    cluster = Cluster()
    async with cluster:
        yield cluster


def red(report: PreflightReport) -> dict[str, Level]:
    return {each.name: each.level for each in report.findings if each.level is not Level.OK}


def named(report: PreflightReport, name: str) -> Finding:
    (found,) = [each for each in report.findings if each.name == name]
    return found


async def test_nothing_is_wrong_in_a_cluster_as_it_should_be_but_what_the_double_cannot_show(
    cluster: Cluster,
) -> None:
    report = await cluster.look(accepted=frozenset({Unsafe.CONTAINER}))

    assert red(report) == {Unsafe.CONTAINER: Level.UNSAFE}  # its pods are plain processes
    assert report.is_fine
    assert {each.name for each in report.findings} == {
        *Unsafe,
        *("api", "needed-rights", "pod", "node", "rpc-port"),
    }
    assert str(report).splitlines()[-1] == "submissions can run here"
    assert "accepted" in str(report)


async def test_what_is_unsafe_refuses_to_start_until_it_is_accepted_by_name(cluster: Cluster) -> None:
    report = await cluster.look()

    assert [each.name for each in report.refusals] == [Unsafe.CONTAINER]
    assert report.verdict() == (
        "no submission runs here: container; "
        "ORCHESTRATOR_KUBERNETES_ACCEPT_UNSAFE=container would accept what is unsafe"
    )


async def test_it_asks_for_no_right_that_it_does_not_need(cluster: Cluster) -> None:
    await cluster.look()

    asked = {call.right for call in cluster.double.calls if not call.resource.startswith("selfsubject")}
    assert asked <= {(right.group, str(right).split()[1], right.verb) for right in NEEDED}


async def test_missing_and_needless_rights_are_told_apart_by_their_subresource() -> None:
    exec_right = {"apiGroups": [""], "resources": ["pods/exec"], "verbs": ["create"]}
    cluster = Cluster(rights={NAMESPACE: [*rules()[NAMESPACE][1:], exec_right]})
    async with cluster:
        report = await cluster.look()

    assert named(report, "needed-rights").level is Level.BROKEN
    assert "create pods" in named(report, "needed-rights").what
    assert named(report, Unsafe.RIGHTS).what == "held without need: create pods/exec"
    assert named(report, Unsafe.RIGHTS).level is Level.UNSAFE


async def test_what_a_person_may_do_from_outside_is_a_warning() -> None:
    cluster = Cluster(rights=None)
    async with cluster:
        report = await cluster.look(in_cluster=False)

    assert named(report, Unsafe.RIGHTS).level is Level.WARNING
    assert "list secrets" in named(report, Unsafe.RIGHTS).what


async def test_a_namespace_without_pod_security_is_unsafe(cluster: Cluster) -> None:
    from tests.kubernetes_double.objects import Key

    key = Key("namespaces", "", NAMESPACE)
    cluster.double.store.change(key, lambda namespace: namespace["metadata"].update(labels={}))

    report = await cluster.look()

    assert named(report, Unsafe.POD_SECURITY).level is Level.UNSAFE


async def test_each_weakening_that_is_let_in_is_named() -> None:
    cluster = Cluster(hardened=False)
    async with cluster:
        report = await cluster.look()

    what = named(report, Unsafe.ADMISSION_POLICY).what
    assert named(report, Unsafe.ADMISSION_POLICY).level is Level.UNSAFE
    for weakness in ("a writable root", "a projected token", "the cluster's DNS", "another service account"):
        assert weakness in what
    assert named(report, Unsafe.POD_SECURITY).level is Level.OK


async def test_a_quota_that_is_used_up_is_a_warning_but_shows_no_isolation(cluster: Cluster) -> None:
    quota = {"metadata": {"name": "small"}, "spec": {"hard": {"pods": "0"}}}
    cluster.double.add("resourcequotas", NAMESPACE, quota)

    report = await cluster.look()

    assert named(report, "pod").level is Level.WARNING
    assert "exceeded quota: small" in named(report, "pod").what
    assert named(report, Unsafe.CANARY).level is Level.UNSAFE


async def test_a_policy_that_is_not_there_is_a_warning_where_the_network_is_closed_all_the_same(
    cluster: Cluster,
) -> None:
    from tests.kubernetes_double.objects import Key

    cluster.double.store.remove(Key("networkpolicies", NAMESPACE, "default-deny"), None)

    report = await cluster.look()

    assert named(report, Unsafe.NETWORK_POLICY).level is Level.WARNING


async def test_policies_that_are_not_enforced_are_unsafe(cluster: Cluster) -> None:
    cluster.double.node.plan_for = lambda pod: Plan(egress_stays_open=True)

    report = await cluster.look()

    assert named(report, Unsafe.NETWORK).level is Level.UNSAFE
    assert "another pod of the namespace" in named(report, Unsafe.NETWORK).what
    assert named(report, Unsafe.NETWORK_POLICY).level is Level.OK


async def test_without_a_canary_that_runs_nothing_is_shown_and_why_is_said(cluster: Cluster) -> None:
    cluster.double.node.plan_for = lambda pod: Plan(unschedulable="0/3 nodes are available")

    report = await cluster.look(start_seconds=0.5)

    assert "0/3 nodes are available" in named(report, Unsafe.CANARY).what
    assert not report.is_fine


async def test_an_api_server_that_is_not_there_is_all_that_is_said() -> None:
    cluster = Cluster()
    async with cluster:
        pass
    async with aiohttp.ClientSession() as session:
        api = PlainApi(cluster.double, session)
        report = await Preflight(api, PlainMaker(), in_cluster=False, sandboxed=True).report()

    (finding,) = report.findings
    assert (finding.name, finding.level) == ("api", Level.BROKEN)
    assert "kubernetes_config_file" in finding.remedy
