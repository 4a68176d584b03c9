from __future__ import annotations

from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs


@pytest.fixture
def unrendered_log() -> Iterator[None]:
    """Keeps structlog from drawing tracebacks, which takes a second each and holds up the loop."""
    with capture_logs():
        yield
