"""How a local Ray is brought up, and what of it is left when that takes too long."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
import ray

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


async def test_a_ray_address_where_nobody_listens_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        await runtime._check_address(f"127.0.0.1:{port}")
        await runtime._check_address(f"ray://127.0.0.1:{port}")
    await runtime._check_address("auto")

    for address in (f"127.0.0.1:{port}", f"ray://localhost:{port}", "[::1]:1", "127.0.0.1:99999"):
        with pytest.raises(InfrastructureError) as refused:
            await runtime._check_address(address)
        assert f"no Ray cluster can be reached at RAY_ADDRESS={address}: " in str(refused.value)


async def test_a_cancelled_start_of_a_ray_that_is_only_joined_waits_for_nothing() -> None:
    start = SlowStart(None)
    joined = asyncio.create_task(enter(runtime._ray(start.init)))
    await eventually(lambda: start.began == 1)

    joined.cancel()
    with pytest.raises(asyncio.CancelledError):
        await joined

    assert not start.may_end.is_set()
    start.may_end.set()


async def test_a_cancelled_start_of_a_ray_of_our_own_sees_its_end_and_clears_up() -> None:
    start = SlowStart(None)
    started = asyncio.create_task(enter(runtime._ray(start.init, start.cleared.set)))
    await eventually(lambda: start.began == 1)

    started.cancel()
    await asyncio.sleep(0)
    start.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await started

    assert start.cleared.is_set()


async def enter(context: Any) -> None:
    async with context:
        raise AssertionError("nobody should come here")


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("alive", "lives"), [((False, True), True), ((False,), False), ((), False), (None, True)], ids=str
)
async def test_a_cluster_without_a_living_node_runs_no_control_plane(
    monkeypatch: pytest.MonkeyPatch, alive: tuple[bool, ...] | None, lives: bool
) -> None:
    def nodes() -> list[dict[str, bool]]:
        if not alive:
            raise RuntimeError("Failed to connect to GCS")
        return [{"Alive": each} for each in alive]

    monkeypatch.setattr(ray, "is_initialized", lambda: alive is not None)
    monkeypatch.setattr(ray, "nodes", nodes)

    assert await runtime._some_node_lives() is lives
