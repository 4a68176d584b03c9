"""A stepped process, and pools whose connections it can hold at every statement."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs

from orchestrator.adapters.postgres.pool import Database, open_pool
from tests.stepping import Stepper, stepping

if TYPE_CHECKING:
    from tests.conftest import Pool


@pytest.fixture
def steps() -> Iterator[Stepper]:
    """Where this test lets what wait."""
    with stepping() as stepper:
        yield stepper


@pytest.fixture
async def pool(database: Database, steps: Stepper) -> AsyncIterator[Pool]:
    """Stepped."""
    async with open_pool(database, application_name="stepped", max_size=10) as pool:
        yield pool


@pytest.fixture(autouse=True)
def unrendered_log() -> Iterator[None]:
    """Keeps structlog from drawing tracebacks, which takes a second each and holds up the loop."""
    with capture_logs():
        yield
