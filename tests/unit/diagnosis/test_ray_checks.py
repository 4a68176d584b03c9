from __future__ import annotations

import asyncio
import socket

import pytest

from orchestrator.diagnosis import ray_checks
from orchestrator.diagnosis.findings import State
from orchestrator.domain.errors import InfrastructureError
from tests.golden_texts import check_golden


async def test_a_cluster_where_nobody_listens_is_said_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but not listening
        port = taken.getsockname()[1]

        finding = await ray_checks.cluster(f"127.0.0.1:{port}")

    assert finding.state is State.BROKEN
    text = f"{finding.what}\nto do: {finding.remedy}".replace(str(port), "<port>")
    check_golden("doctor", "ray_cluster_refuses", text)


async def test_a_cluster_that_does_not_answer_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_checks, "CONNECT_SECONDS", 0.01)

    finding = await ray_checks.cluster("192.0.2.200:6379")

    assert finding.state is State.BROKEN
    assert "cannot be reached: " in finding.what


async def test_a_ray_that_cannot_be_imported_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(*arguments: str) -> None:
        raise InfrastructureError("ImportError: libstdc++.so.6: version `GLIBCXX_3.4.29' not found")

    monkeypatch.setattr(ray_checks, "_probe", fails)

    finding = await ray_checks.ray_itself()

    assert finding.state is State.BROKEN
    check_golden("doctor", "ray_not_importable", f"{finding.what}\nto do: {finding.remedy}")


async def test_the_last_line_of_a_probe_that_fails_is_its_reason() -> None:
    with pytest.raises(InfrastructureError, match="nowhere"):
        await asyncio.wait_for(ray_checks._probe("nowhere"), 60)
