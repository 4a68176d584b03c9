"""How a local Ray is brought up, and what of it is left when that takes too long."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from orchestrator import runtime
from orchestrator.domain.errors import InfrastructureError


class SlowStart:
    """`ray.init` that ends when it may, in one way or the other."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error
        self.may_end = threading.Event()
        self.began = 0
        self.cleared = threading.Event()

    def init(self, ray: Any) -> None:
        self.began += 1
        assert self.may_end.wait(30)
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [None, OSError("it was killed")], ids=["comes up", "fails"])
async def test_a_ray_that_is_not_up_in_time_is_taken_down_and_not_started_again(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    monkeypatch.setattr(runtime, "RAY_START_SECONDS", 0.05)
    start = SlowStart(error)
    with pytest.raises(InfrastructureError, match=r"not up within 0\.05 s"):
        async with runtime._ray(start.init, start.cleared.set):
            pass

    start.may_end.set()

    assert await asyncio.to_thread(start.cleared.wait, 30)
    assert start.began == 1


async def test_a_ray_that_does_not_start_is_tried_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    start = SlowStart(OSError("no"))
    start.may_end.set()

    with pytest.raises(InfrastructureError, match="Ray does not start or cannot be reached: no"):
        async with runtime._ray(start.init):
            pass

    assert start.began == 2
