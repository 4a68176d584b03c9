"""What waits for a database that stands still, waits where it was made: the sink does not hold it all."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest

from orchestrator.actors.control_actors import ResultSinkRemote, sink_name
from orchestrator.actors.episode_publisher import PublishingStopped, SinkPublisher
from orchestrator.actors.ray_calls import create_actor, kill_actor
from orchestrator.adapters.postgres.fence import exclusively
from orchestrator.adapters.postgres.installation import take_generation
from orchestrator.adapters.postgres.pool import Database, open_pool
from orchestrator.app import ControlPlaneRecipe
from orchestrator.domain.episodes import CommitOutcome, EpisodeRun, FinishedEpisode
from orchestrator.settings import Settings
from tests.job_fixtures import finished

pytestmark = pytest.mark.timeout(180)

MEBIBYTE = 2**20
WORKERS = 48
EPISODE_BYTES = 8 * MEBIBYTE
SINK_BYTES = 16 * MEBIBYTE
JOB_ID = 1


def large_episode(number: int) -> FinishedEpisode:
    run = EpisodeRun(JOB_ID, epoch=1, run=1, task_id="t", episode_id=number, seed=1, policy_seed=1)
    return replace(finished(run), step_messages=(bytes(EPISODE_BYTES),))


def published(sink: object, stop: threading.Event, number: int) -> list[CommitOutcome] | None:
    """What the sink answers to a worker, or None if it was of no use."""
    publisher = SinkPublisher(lambda: sink, stop, timeout_seconds=30.0)
    try:
        return publisher.publish([large_episode(number)])
    except PublishingStopped:
        return None


async def by_all_workers(publish: Callable[[int], list[CommitOutcome] | None]) -> list[object]:
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(WORKERS) as threads:
        return await asyncio.gather(*(loop.run_in_executor(threads, publish, n) for n in range(WORKERS)))


async def most_memory(process: psutil.Process, until: asyncio.Task[list[object]]) -> int:
    most = 0
    while not until.done():
        most = max(most, process.memory_full_info().uss)
        await asyncio.wait({until}, timeout=0.05)
    return most


async def test_a_sink_of_many_workers_stays_small_while_its_database_stands_still(
    ray_cluster: None, database: Database, scratch: Path
) -> None:
    settings = Settings(data_dir=scratch, lease_seconds=6.0, sink_queue_bytes=SINK_BYTES)
    once, again = threading.Event(), threading.Event()
    once.set()  # a worker that is told to stop tries once all the same
    async with open_pool(database, application_name="end-to-end test") as pool:
        recipe = ControlPlaneRecipe(settings, database, await take_generation(pool, "test"))
        named = {"name": sink_name(recipe.generation), "namespace": recipe.namespace}
        sink = create_actor(ResultSinkRemote, named, recipe)  # one without its name ends itself
        try:
            assert await sink.ready.remote(30.0) is None
            actor = psutil.Process(await sink.__ray_call__.remote(lambda _: os.getpid()))
            before = actor.memory_full_info().uss
            async with exclusively(pool, JOB_ID):
                trying = asyncio.create_task(by_all_workers(partial(published, sink, once)))
                grown = await most_memory(actor, trying) - before
            refused = trying.result()
            answered = await by_all_workers(partial(published, sink, again))
        finally:
            kill_actor(sink)

    assert refused == [None] * WORKERS
    assert answered == [[CommitOutcome.STALE]] * WORKERS
    assert grown < 4 * SINK_BYTES
    print(f"grew by {grown / MEBIBYTE:.0f} MiB while {WORKERS * EPISODE_BYTES / MEBIBYTE:.0f} waited")
