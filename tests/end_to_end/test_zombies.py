"""Consumer and sink that were stopped while a newer generation took over: they notice, and end themselves."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from typing import TYPE_CHECKING

import psutil
import pytest
import ray

from orchestrator.actors.control_plane import (
    consumer_name,
    sink_name,
    start_control_plane,
    stop_control_plane,
)
from orchestrator.adapters.postgres.installation import take_generation
from orchestrator.domain.lifecycle import JobStatus
from tests.end_to_end.conftest import EXAMPLES, Plane
from tests.end_to_end.test_survival import processes_of_our_ray

if TYPE_CHECKING:
    from collections.abc import Iterable

pytestmark = pytest.mark.ray

TITLES = ("ray::QueueConsumer", "ray::ResultSink")


async def test_a_stopped_generation_that_comes_back_after_a_newer_one_took_over_ends_itself(
    plane: Plane,
) -> None:
    old = [pid for title in TITLES for pid in processes_of_our_ray(title)]
    for pid in old:
        os.kill(pid, signal.SIGSTOP)
    newer = replace(plane.recipe, installation=await take_generation(plane.pool, "newer code"))
    try:
        await start_control_plane(newer)
        stopped = [pid for pid in old if is_alive(pid)]
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
        job = plane.job(
            EXAMPLES / "cartpole", config={"seed": 11, "episodes_per_task": 2, "max_episode_steps": 20}
        )
        await plane.submit(job)
        result = await plane.result(job, 60)
        await all_gone(old, 20)

        assert len(old) == 2
        assert result.status is JobStatus.COMPLETED
        assert await plane.pool.fetchval("SELECT epoch FROM jobs") == 1
        assert len(await plane.queued_messages("episode_data")) == 2
        for name in (consumer_name(newer.generation), sink_name(newer.generation)):
            assert ray.get_actor(name, newer.namespace) is not None
    finally:
        for pid in filter(is_alive, old):
            os.kill(pid, signal.SIGKILL)
        await stop_control_plane(newer)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def all_gone(pids: Iterable[int], seconds: float) -> None:
    async with asyncio.timeout(seconds):
        while left := [pid for pid in pids if is_alive(pid)]:
            await asyncio.sleep(0.1)
            assert left
