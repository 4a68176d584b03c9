"""Many jobs through the kubernetes adapter, while the API server and the node do their worst."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from orchestrator.adapters.postgres.pool import Database
from orchestrator.domain.lifecycle import JobStatus
from tests.in_process_plane import in_process_plane
from tests.kubernetes.adapters import settings_of_cluster, settings_of_double, settings_on
from tests.kubernetes_double import ApiDouble, PodControl
from tests.kubernetes_double.fault_proxy import Chance, FaultProxy

CARTPOLE = Path(__file__).resolve().parents[2] / "examples" / "cartpole"
QUIET_SECONDS = 60.0
CONCURRENT_JOBS = 8
PLAYED = "SELECT count(*) FROM episodes WHERE finished"
DISTURBANCES = (
    PodControl.evict_by_kubelet,
    PodControl.evict_by_api,
    PodControl.preempt,
    PodControl.delete_by_taint_manager,
    PodControl.delete_by_another,
    PodControl.kill_node,
)


@pytest.fixture
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="orc-jobs-") as directory:
        yield Path(directory)


@contextlib.asynccontextmanager
async def disturbed(double: ApiDouble, chance: random.Random, counts: Counter[str]) -> AsyncIterator[None]:
    """Each running pod is met every eight seconds or so, and the API server forgets its history in between.

    A pod that is alone is met no more often than one of many: on a slow machine the last job would never end.
    """

    async def disturb() -> None:
        while True:
            await asyncio.sleep(1)
            running = [pod for pod in double.pods() if pod.object["status"].get("phase") == "Running"]
            slots = running + [None] * (CONCURRENT_JOBS - len(running))
            if (pod := chance.choice(slots)) is not None:
                disturbance = chance.choice(DISTURBANCES)
                disturbance(pod)
                counts[disturbance.__name__] += 1
            if chance.random() < 0.2:
                double.store.compact()
                counts["compact"] += 1

    task = asyncio.create_task(disturb())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])
async def test_every_job_has_one_result_and_nothing_is_left(
    database: Database, scratch: Path, count: int
) -> None:
    seed = int(os.environ.get("SEED") or random.SystemRandom().randrange(2**32))
    print(f"SEED={seed}")
    chance, counts = random.Random(seed), Counter[str]()
    async with ApiDouble() as double, FaultProxy(double.url, Chance(seed, 0.05), hang_seconds=20) as proxy:
        settings = settings_on(double.write_kubeconfig(scratch / "kubeconfig", proxy.url))
        # Its pods are disturbed more often than a job must stand.
        settings |= {
            "max_concurrent_jobs": 8,
            "max_containers_per_job": 100,
            "max_claims_without_progress": 100,
        }
        async with in_process_plane(database, scratch, **settings) as plane:
            jobs = plane.jobs(CARTPOLE, count, config={"episodes_per_task": 2})
            began = time.monotonic()
            await plane.submit(jobs)
            async with disturbed(double, chance, counts):
                results = await plane.results(jobs, seconds=120 + 6 * count)
            seconds = time.monotonic() - began
            async with asyncio.timeout(QUIET_SECONDS):
                while double.names("pods") or double.names("configmaps"):
                    await double.store.next_change.wait()
        faults = Counter(str(fault) for _, fault in proxy.fired.elements())
        print(f"{count} jobs in {seconds:.0f} s; faults: {dict(faults)}; done to pods: {dict(counts)}")

    assert Counter(result.status for result in results) == {JobStatus.COMPLETED: count}
    assert {result.total_episodes for result in results} == {2}
    assert sum(faults.values()) >= count / 4
    assert sum(counts.values()) > 0


@pytest.mark.timeout(300)
async def test_rollouts_do_not_notice_that_the_api_server_is_away_and_nobody_is_judged_meanwhile(
    database: Database, scratch: Path
) -> None:
    async with ApiDouble() as double, FaultProxy(double.url) as proxy:
        settings = settings_on(double.write_kubeconfig(scratch / "kubeconfig", proxy.url))
        async with in_process_plane(database, scratch, max_claims_without_progress=1, **settings) as plane:
            jobs = plane.jobs(CARTPOLE, 1, config={"episodes_per_task": 300})

            async def played(at_least: int) -> int:
                while (count := await plane.pool.fetchval(PLAYED)) < at_least:
                    await asyncio.sleep(0.02)
                return int(count)

            async with asyncio.timeout(200):
                await plane.submit(jobs)
                await played(1)
                with proxy.outage():
                    before = await played(0)
                    await played(before + 20)
                    [pod] = double.pods()
                    pod.evict_by_kubelet()
                    await pod.reaches("Failed")
                    refused = proxy.refused
                    while proxy.refused < refused + 10:
                        await asyncio.sleep(0.02)
                    state = await plane.pool.fetchrow("SELECT status, epoch FROM jobs")
                    created = len([call for call in double.calls if call.right == ("", "pods", "create")])
                [result] = await plane.results(jobs, seconds=120)

    assert (state["status"], state["epoch"], created) == ("RUNNING", 1, 1)
    assert (result.status, result.total_episodes, result.success_rate) == (JobStatus.COMPLETED, 300, 1.0)


CRASHING = """
import os

class Agent:
    def act(self, observation):
        print("last words", flush=True)
        os._exit(3)
"""


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "where",
    [settings_of_double, pytest.param(settings_of_cluster, marks=pytest.mark.kubernetes)],
    ids=["double", "cluster"],
)
async def test_submissions_are_judged_in_pods_by_what_they_did(
    database: Database, scratch: Path, where: Callable[[Path], AbstractAsyncContextManager[dict[str, Any]]]
) -> None:
    crashing = scratch / "crashing"
    crashing.mkdir()
    (crashing / "agent.py").write_text(CRASHING)

    async with (
        where(scratch) as settings,
        in_process_plane(database, scratch, max_concurrent_jobs=1, **settings) as plane,
    ):
        [sound] = plane.jobs(CARTPOLE, 1, config={"episodes_per_task": 3})
        [broken] = plane.jobs(crashing, 1, first_id=2, config={"episodes_per_task": 1})
        await plane.submit([sound, broken])
        good, bad = await plane.results([sound, broken], seconds=600)
        async with asyncio.timeout(QUIET_SECONDS):
            while await plane.recipe.outside.list_owned(plane.recipe.installation.installation_id):
                await asyncio.sleep(0.5)

    assert (good.status, good.total_episodes, good.success_rate) == (JobStatus.COMPLETED, 3, 1.0)
    assert "exit code 3" in str(bad.extra_data)
    assert bad.success_rate == 0.0
