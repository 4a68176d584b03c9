from __future__ import annotations

import asyncio
import threading

import pytest

from orchestrator.actors import ray_calls
from orchestrator.actors.ray_calls import off_loop
from orchestrator.domain.errors import InfrastructureError

MOST = 3


@pytest.fixture
def few_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_calls, "_places", threading.BoundedSemaphore(MOST))
    monkeypatch.setattr(ray_calls, "RAY_CALL_SECONDS", 0.3)


def blocking_threads() -> int:
    return sum(thread.name == "blocking-calls" for thread in threading.enumerate())


async def test_calls_that_never_return_take_no_more_threads_than_there_are_places(few_places: None) -> None:
    before, answer = blocking_threads(), threading.Event()

    calls = [asyncio.create_task(off_loop(answer.wait)) for _ in range(4 * MOST)]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    threads = blocking_threads() - before
    answer.set()

    assert [type(outcome) for outcome in outcomes] == [InfrastructureError] * len(calls)
    assert threads == MOST


async def test_calls_go_on_once_those_before_them_have_returned(few_places: None) -> None:
    answer = threading.Event()

    calls = [asyncio.create_task(off_loop(answer.wait)) for _ in range(4 * MOST)]
    await asyncio.sleep(0)
    answer.set()
    outcomes = await asyncio.gather(*calls)

    assert outcomes == [True] * len(calls)
    assert await off_loop(int, "7") == 7
