"""A double, adapters on it, and a container's spec."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest

from orchestrator.ports import ContainerSpec
from tests.kubernetes.adapters import ADAPTER_IS_HERE, Adapters
from tests.kubernetes_double import ApiDouble

# Only where a tree has no such adapter at all; one that cannot be imported fails them.
collect_ignore_glob = [] if ADAPTER_IS_HERE else ["test_*.py"]


@pytest.fixture
async def double() -> AsyncIterator[ApiDouble]:
    async with ApiDouble() as double:
        yield double


@pytest.fixture
async def adapters(double: ApiDouble, tmp_path: Path) -> AsyncIterator[Adapters]:
    adapters = Adapters(double, tmp_path)
    try:
        yield adapters
    finally:
        await adapters.close_all()


@pytest.fixture
def spec() -> ContainerSpec:
    return ContainerSpec(
        container_id=uuid4(),
        installation_id=uuid4(),
        job_id=7,
        attempt=1,
        expires_at=datetime.now(UTC) + timedelta(minutes=5),
        session_key=bytes(range(32)),
    )
