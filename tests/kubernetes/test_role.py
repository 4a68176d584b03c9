"""The Role of the control plane names what the adapter really calls: no verb too many, none missing."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.adapters.kubernetes.preflight_rights import NEEDED
from orchestrator.ports import ContainerSpec
from tests.kubernetes.adapters import Adapters, preflight_on
from tests.kubernetes.test_faults import LATE, whole_life
from tests.kubernetes_double import Account, ApiDouble
from tests.kubernetes_double.refusals import Json

BASE = Path(__file__).resolve().parents[2] / "kuberay" / "base"
SUBMISSIONS = "orchestrator-submissions"
Right = tuple[str, str, str]  # group, resource, verb
# One policy is never read, but its owner may well look at it with the same account.
NOT_CALLED: set[Right] = {("networking.k8s.io", "networkpolicies", "get")}


def role_rules() -> list[Json]:
    """The rules of the one Role in the submissions' namespace."""
    documents: list[Any] = [
        document
        for path in sorted(BASE.glob("*.yaml"))
        for document in yaml.safe_load_all(path.read_text())
        if document
    ]
    [role] = [
        each
        for each in documents
        if each.get("kind") == "Role" and each["metadata"].get("namespace") == SUBMISSIONS
    ]
    rules: list[Json] = role["rules"]
    return rules


def rights_of(rules: list[Json]) -> set[Right]:
    return {
        (group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def needed_rights() -> set[Right]:
    """What preflight asks for."""
    return {
        (right.group, f"{right.resource}/{right.subresource}".rstrip("/"), right.verb) for right in NEEDED
    }


async def test_the_adapter_makes_every_call_that_preflight_asks_a_right_for_and_no_other(
    double: ApiDouble, adapters: Adapters, spec: ContainerSpec
) -> None:
    double.node.plan_for = lambda pod: LATE

    await whole_life(adapters.running("print('hello', flush=True); ready(); signal.pause()"), spec)
    await preflight_on(adapters)

    asked = {call.right for call in double.calls if not call.resource.startswith("selfsubject")}
    assert needed_rights() - asked == NOT_CALLED
    assert asked <= needed_rights()


@pytest.mark.skipif(not BASE.is_dir(), reason="the manifests are not part of this tree")
async def test_the_role_lets_the_adapter_do_its_work_and_nothing_more(
    double: ApiDouble, adapters: Adapters, spec: ContainerSpec
) -> None:
    double.accounts.tokens[double.token] = Account(
        "system:serviceaccount:orchestrator:orchestrator", {double.namespace: role_rules()}
    )
    double.node.plan_for = lambda pod: LATE
    script = "print('hello', flush=True); ready(); signal.pause()"

    await whole_life(adapters.running(script), spec)
    await preflight_on(adapters)

    asked = {call.right for call in double.calls if not call.resource.startswith("selfsubject")}
    assert asked | NOT_CALLED == rights_of(role_rules())
    assert {call.namespace for call in double.calls if call.namespace} == {double.namespace}


@pytest.mark.skipif(not BASE.is_dir(), reason="the manifests are not part of this tree")
async def test_without_any_one_of_its_rights_the_preflight_says_which_is_missing(tmp_path: Path) -> None:
    rights = sorted(rights_of(role_rules()))

    async def table_without(right: Right) -> str:
        directory = tmp_path / "-".join(right).replace("/", "-")
        directory.mkdir()
        async with ApiDouble() as double:
            rules = [
                {"apiGroups": [each[0]], "resources": [each[1]], "verbs": [each[2]]}
                for each in rights
                if each != right
            ]
            account = double.accounts.tokens[double.token]
            double.accounts.tokens[double.token] = dataclasses.replace(
                account, rules={double.namespace: rules}
            )
            return await preflight_on(Adapters(double, directory))

    # At once: each waits for time-outs most of the time.
    tables = await asyncio.gather(*map(table_without, rights))

    assert len(rights) == 13
    for (_, resource, verb), table in zip(rights, tables, strict=True):
        assert f"{verb} {resource}" in table
