"""`orchestrator preflight` and the look before a control plane starts, against the double of a cluster."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import aiohttp
import pytest
import structlog

from orchestrator.adapters.kubernetes import canaries
from orchestrator.commands.preflight import NOT_FIT, preflight_command
from orchestrator.domain.errors import InfrastructureError, UsageError
from orchestrator.domain.preflight import Unsafe
from orchestrator.preflight import OpenParts, PreflightParts, require_safe
from orchestrator.settings import Settings
from tests.kubernetes_double import ApiDouble, Plan, emptied
from tests.unit.adapters.kubernetes.conftest import PlainApi, PlainMaker

ACCEPTS = Settings(kubernetes_accept_unsafe=(Unsafe.CONTAINER,))  # the double's pods are plain processes


@pytest.fixture
async def cluster(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ApiDouble]:
    monkeypatch.setattr(canaries, "SEAL_SECONDS", 1.0)
    async with ApiDouble() as double:
        double.node.plan_for = lambda pod: Plan(polices_python=True)
        async with emptied(double):
            yield double


@pytest.fixture
def parts(cluster: ApiDouble) -> OpenParts:
    @asynccontextmanager
    async def open_parts(settings: Settings, owner: UUID) -> AsyncIterator[PreflightParts]:
        async with aiohttp.ClientSession() as session:
            yield PreflightParts(PlainApi(cluster, session), PlainMaker(), in_cluster=False, sandboxed=True)

    return open_parts


@pytest.fixture
def logged() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as entries:
        yield entries


async def test_a_cluster_that_is_fit_exits_with_0_and_shows_the_table(
    parts: OpenParts, capsys: pytest.CaptureFixture[str]
) -> None:
    code = await preflight_command(lambda: ACCEPTS, parts, as_json=False)

    shown = capsys.readouterr().out
    assert code == 0
    assert shown.splitlines()[0] == "preflight of namespace orchestrator-submissions"
    assert "  accepted  container" in shown
    assert shown.splitlines()[-1] == "submissions can run here"


async def test_a_cluster_that_is_not_exits_with_3_and_says_why_in_json(
    parts: OpenParts, capsys: pytest.CaptureFixture[str]
) -> None:
    code = await preflight_command(Settings, parts, as_json=True)

    shown = json.loads(capsys.readouterr().out)
    (unsafe,) = [each for each in shown["findings"] if each["level"] == "unsafe"]
    assert code == NOT_FIT
    assert shown["fit"] is False
    assert unsafe["name"] == "container"
    assert unsafe["accepted"] is False
    assert unsafe["remedy"]


async def test_what_is_accepted_lets_a_control_plane_start_with_the_table_in_the_log(
    parts: OpenParts, logged: list[Any]
) -> None:
    await require_safe(ACCEPTS, parts, uuid4())

    found = {each["finding"]: each["state"] for each in logged if each["event"] == "preflight_finding"}
    assert found["container"] == "accepted"
    assert found["network"] == "ok"


async def test_what_is_unsafe_keeps_a_control_plane_from_starting(parts: OpenParts) -> None:
    with pytest.raises(UsageError, match="ORCHESTRATOR_KUBERNETES_ACCEPT_UNSAFE=container"):
        await require_safe(Settings(), parts, uuid4())


async def test_what_is_broken_does_so_whatever_is_accepted(parts: OpenParts, cluster: ApiDouble) -> None:
    cluster.accounts.tokens.clear()

    with pytest.raises(InfrastructureError, match="no submission runs here"):
        await require_safe(Settings(kubernetes_accept_unsafe=tuple(Unsafe)), parts, uuid4())
