"""One double and one client for a test."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import pytest

from tests.kubernetes_double import ApiDouble
from tests.unit.kubernetes_double.double_client import Client


@pytest.fixture
async def double() -> AsyncIterator[ApiDouble]:
    async with ApiDouble() as double:
        yield double


@pytest.fixture
async def client(double: ApiDouble) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession() as session:
        yield Client(double, session)
