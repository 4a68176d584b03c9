"""Two Ray clusters at once on one database: leases decide, and the live one clears what a dead one left."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from orchestrator.adapters.postgres.installation import take_generation
from orchestrator.adapters.postgres.pool import open_pool
from orchestrator.app import ControlPlaneRecipe
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.settings import Settings
from tests.end_to_end.command_processes import processes_naming, sessions_of, start, wait_until
from tests.end_to_end.conftest import EXAMPLES, GatedSubmission, Plane, running_plane
from tests.end_to_end.test_survival import assert_whole, finished_episodes, gated_job

if TYPE_CHECKING:
    from orchestrator.adapters.postgres.pool import Database
    from orchestrator.domain.messages import EvalJobMessage

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def kill_cluster(command: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the command and to everything of its Ray at once."""
    sessions = sessions_of(command.pid)
    assert sessions
    victims = {process.pid for session in sessions for process in processes_naming(f"{session}/")}
    for pid in victims | {command.pid}:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    command.wait(30)
    for session in sessions:
        subprocess.run(["rm", "-rf", str(session)], check=True)


@asynccontextmanager
async def onlooker(database: Database, scratch: Path) -> AsyncIterator[Plane]:
    """What a client does with a control plane that somebody else started."""
    async with open_pool(database, application_name="onlooker", max_size=2) as pool:
        installation = await take_generation(pool, "onlooker")
        settings = Settings(data_dir=scratch)
        yield Plane(pool, ControlPlaneRecipe(settings, database, installation), scratch)


async def test_a_job_moves_from_a_dead_cluster_to_the_live_one_which_clears_what_is_left(
    ray_cluster: None, database: Database, scratch: Path, gated: GatedSubmission
) -> None:
    variables = {
        "ORCHESTRATOR_DATABASE_URL": database.dsn,
        "ORCHESTRATOR_DATA_DIR": str(scratch),
        "ORCHESTRATOR_LEASE_SECONDS": "9",
        "ORCHESTRATOR_RECONCILE_INTERVAL_SECONDS": "1",
        "ORCHESTRATOR_STEP_TIMEOUT_SECONDS": "300",
    }
    log = scratch / "log"
    dead = start("up", log=log, **variables)
    try:
        wait_until(lambda: "ready:" in log.read_text(), "a control plane", seconds=120)
        async with onlooker(database, scratch) as client:
            job = gated_job(client, gated)
            await client.submit(job)
            await gated.reached()
            async with running_plane(database, scratch) as live:
                await jobs_are_done_by_whoever_takes_them(client)
                before = await finished_episodes(client, job)
                holder = await holder_of(client, job)
                processes = gated.processes()

                await asyncio.to_thread(kill_cluster, dead)
                gated.open()

                await assert_whole(live, job, gated, before)
                assert before
                assert await holder_of(client, job) != holder
                assert len(gated.processes() - processes) == 1  # the one of the dead cluster ended with it
                assert not any(psutil.pid_exists(pid) for pid in processes)
                assert sorted(scratch.glob("scratch/*/*/*")) == []
    finally:
        if dead.poll() is None:
            kill_cluster(dead)


async def jobs_are_done_by_whoever_takes_them(client: Plane) -> None:
    """Each has one result, though two consumers and two reconcilers see it."""
    jobs = [client.job(EXAMPLES / "cartpole", config={"episodes_per_task": 2}) for _ in range(4)]
    await client.submit(*jobs)
    for job in jobs:
        assert (await client.result(job)).status is JobStatus.COMPLETED
    results = await client.queued_messages("eval_result")
    assert sorted(result["job_id"] for result in results) == [job.job_id for job in jobs]


async def holder_of(client: Plane, job: EvalJobMessage) -> object:
    """Who claimed the job last."""
    query = "SELECT holder FROM claims WHERE job_id = $1 ORDER BY epoch DESC LIMIT 1"
    return await client.pool.fetchval(query, job.job_id)
