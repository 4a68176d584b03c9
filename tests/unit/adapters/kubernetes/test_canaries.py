"""Canary pods against the double of the API server: real probes, real sockets, and what is left of them."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from orchestrator.adapters.kubernetes import canaries
from orchestrator.adapters.kubernetes.canaries import EXPIRES_AT, Canaries, dns_servers
from orchestrator.adapters.kubernetes.preflight_network import OTHER_POD
from orchestrator.submission.probe import API
from tests.kubernetes_double import ApiDouble, Plan, emptied
from tests.kubernetes_double.plans import IMAGE_CANNOT_BE_PULLED, NO_NODE, SANDBOX_FAILS


@pytest.fixture(autouse=True)
def short_seal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canaries, "SEAL_SECONDS", 1.0)


def outcomes(findings: canaries.CanaryFindings, number: int) -> dict[str, bool]:
    return {outcome.name: outcome.reached for outcome in findings.reports[number].outcomes}


async def test_two_canaries_report_that_they_reach_nobody_and_we_reach_them(
    double: ApiDouble, api: Any, maker: Any
) -> None:
    double.node.plan_for = lambda pod: Plan(polices_python=True)
    async with emptied(double):
        findings = await Canaries(api, maker, dns_servers=("192.0.2.53",)).look()

    assert findings.trouble == ""
    assert findings.connected is True
    assert [report.open_network for report in findings.reports] == [None, None]
    assert not any(outcomes(findings, 0).values())
    assert not any(outcomes(findings, 1).values())
    assert {API, OTHER_POD, "DNS", "DNS over TCP", "the internet"} <= set(outcomes(findings, 1))


async def test_a_cluster_that_enforces_nothing_is_found_out(double: ApiDouble, api: Any, maker: Any) -> None:
    double.node.plan_for = lambda pod: Plan(egress_stays_open=True)
    async with emptied(double):
        findings = await Canaries(api, maker).look()

    assert findings.connected is True
    assert outcomes(findings, 1)[OTHER_POD] is True
    assert outcomes(findings, 1)[API] is True
    assert "takes connections" in str(findings.reports[0].open_network)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (NO_NODE, "3 Insufficient memory"),
        (IMAGE_CANNOT_BE_PULLED, "ImagePullBackOff"),
        (SANDBOX_FAILS, "user namespaces are not supported"),
        (Plan(exits=1, prints="No module named orchestrator\n"), "No module named orchestrator"),
        (Plan(refused_by_kubelet="OutOfmemory"), "OutOfmemory"),
    ],
    ids=["unschedulable", "image", "sandbox", "exits", "kubelet"],
)
async def test_a_canary_that_does_not_run_says_why_and_leaves_nothing(
    double: ApiDouble, api: Any, maker: Any, plan: Plan, words: str
) -> None:
    double.node.plan_for = lambda pod: plan
    async with emptied(double):
        findings = await Canaries(api, maker, start_seconds=1.0).look()

    assert findings.reports == ()
    assert words in findings.trouble


async def test_a_canary_that_somebody_removes_is_said_to_be_removed(
    double: ApiDouble, api: Any, maker: Any
) -> None:
    double.node.plan_for = lambda pod: NO_NODE
    async with emptied(double):
        looking = asyncio.create_task(Canaries(api, maker, start_seconds=20.0).look())
        while not double.names("pods"):
            await double.store.next_change.wait()
        double.pod(double.names("pods")[0]).delete_by_another()

        findings = await looking

    assert findings.trouble == "somebody removed the listener canary pod while it was needed"


async def test_an_interrupt_leaves_no_canary(double: ApiDouble, api: Any, maker: Any) -> None:
    double.node.plan_for = lambda pod: Plan(egress_stays_open=True)
    async with emptied(double):
        looking = asyncio.create_task(Canaries(api, maker).look())
        while len(double.names("pods")) < 2:
            await double.store.next_change.wait()

        looking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await looking


async def test_a_second_interrupt_waits_for_the_removal_too(double: ApiDouble, api: Any, maker: Any) -> None:
    double.node.plan_for = lambda pod: NO_NODE
    async with emptied(double):
        looking = asyncio.create_task(Canaries(api, maker).look())
        while not double.names("pods"):
            await double.store.next_change.wait()

        looking.cancel()
        await asyncio.sleep(0)
        looking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await looking

    assert looking.cancelled()


def test_the_dns_of_this_machine_is_tried_where_others_can_ask_it(tmp_path: Path) -> None:
    resolv_conf = tmp_path / "resolv.conf"
    resolv_conf.write_text(
        "search example.org\nnameserver 10.0.0.2\nnameserver 127.0.0.53\n nameserver a.b\n"
    )

    assert dns_servers(resolv_conf) == ("10.0.0.2",)
    assert dns_servers(tmp_path / "none") == ()


async def test_canaries_that_a_killed_process_left_are_removed_once_they_have_expired(
    double: ApiDouble, api: Any, maker: Any
) -> None:
    double.node.plan_for = lambda pod: NO_NODE
    path = f"/api/v1/namespaces/{maker.namespace}"
    for expires_at, canary in (("2020-01-01T00:00:00Z", True), ("2020-01-01T00:00:00Z", False), (None, True)):
        container_id = uuid4()
        anchor = maker.anchor(container_id, canary=canary)
        anchor["metadata"]["annotations"] = {} if expires_at is None else {EXPIRES_AT: expires_at}
        await api.call("POST", f"{path}/configmaps", body=anchor)

    await Canaries(api, maker, start_seconds=0.3).look()

    assert len(double.names("configmaps")) == 2
