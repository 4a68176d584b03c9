"""Consumer and sink that were stopped while a newer generation took over: they notice, and end themselves."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import psutil
import pytest
import ray

from orchestrator.actors.control_actors import QueueConsumerRemote, ResultSinkRemote
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


async def test_a_stopped_generation_that_comes_back_after_a_newer_one_took_over_ends_itself(
    plane: Plane,
) -> None:
    (old_consumer,) = processes_of_our_ray("ray::QueueConsumer")
    (old_sink,) = processes_of_our_ray("ray::ResultSink")
    old = (old_consumer, old_sink)
    for pid in old:
        os.kill(pid, signal.SIGSTOP)
    newer = replace(plane.recipe, installation=await take_generation(plane.pool, "newer code"))
    try:
        starting = asyncio.create_task(start_control_plane(newer))
        # Ray kills a stopped process only some seconds after its actor: until then it may come back.
        await named(consumer_name(newer.generation), newer.namespace)
        thawed = [thaw(old_consumer)]
        await starting
        thawed.append(thaw(old_sink))
        job = plane.job(
            EXAMPLES / "cartpole", config={"seed": 11, "episodes_per_task": 2, "max_episode_steps": 20}
        )
        await plane.submit(job)
        result = await plane.result(job, 60)
        await all_gone(old, 30)

        assert thawed == [True, True]
        assert result.status is JobStatus.COMPLETED
        assert await plane.pool.fetchval("SELECT epoch FROM jobs") == 1
        assert len(await plane.queued_messages("episode_data")) == 2
        for name in (consumer_name(newer.generation), sink_name(newer.generation)):
            assert ray.get_actor(name, newer.namespace) is not None
    finally:
        for pid in filter(is_alive, old):
            os.kill(pid, signal.SIGKILL)
        await stop_control_plane(newer)


async def test_a_sink_that_nobody_stops_ends_itself_once_a_newer_generation_has_taken_over(
    plane: Plane,
) -> None:
    (old_sink,) = processes_of_our_ray("ray::ResultSink")
    newer = replace(plane.recipe, installation=await take_generation(plane.pool, "newer code"))
    common = {"namespace": newer.namespace, "lifetime": "detached"}

    ResultSinkRemote.options(name=sink_name(newer.generation), **common).remote(newer)
    QueueConsumerRemote.options(name=consumer_name(newer.generation), **common).remote(newer)
    try:
        await all_gone([old_sink], 30)

        with pytest.raises(ValueError, match="Failed to look up actor"):
            ray.get_actor(sink_name(plane.recipe.generation), newer.namespace)
    finally:
        await stop_control_plane(newer)


async def named(name: str, namespace: str) -> None:
    """Return once an actor has the name."""
    async with asyncio.timeout(60):
        while True:
            with suppress(ValueError):
                ray.get_actor(name, namespace)
                return
            await asyncio.sleep(0.1)


def thaw(pid: int) -> bool:
    """Whether the process was there still, and goes on."""
    if alive := is_alive(pid):
        os.kill(pid, signal.SIGCONT)
    return alive


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
