"""A job in the hands of its client, on a live control plane: watched, read, cancelled, tried again."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from pydantic import SecretStr

from orchestrator.actors.control_plane import supervisor_name
from orchestrator.adapters.artifacts.pack import pack_directory
from orchestrator.client import AsyncClient, EpisodeOutcome, JobStatus
from tests.end_to_end.command_processes import ORCHESTRATOR, environment, start, wait_until
from tests.end_to_end.conftest import EXAMPLES, ROOT, GatedSubmission, Plane

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.ray

CONFIG = {"episodes_per_task": 8, "max_episode_steps": 20, "score": "avg_reward"}


@pytest.fixture
async def client(plane: Plane) -> AsyncIterator[AsyncClient]:
    url = SecretStr(plane.recipe.database.dsn)
    async with AsyncClient(settings=plane.recipe.settings.model_copy(update={"database_url": url})) as client:
        yield client


async def test_a_job_is_watched_read_cancelled_and_tried_again_with_the_same_seeds(
    plane: Plane, client: AsyncClient, gated: GatedSubmission
) -> None:
    agent = gated.directory / "agent.py"
    agent.write_text(f"print('policy loaded', flush=True)\n{agent.read_text()}")
    first = await client.submit(plane.job(gated.directory, config=CONFIG), local=True)
    await gated.reached()

    job = await client.get(first)
    log = await client.log(first)
    await check_that_ctrl_c_stops_only_the_watching(plane, first)
    cancelled = await client.cancel(first, "enough")
    gated.open()
    second = await client.retry(first)
    events = [event async for event in client.stream(second, timeout_seconds=180)]

    assert job.status is JobStatus.RUNNING
    assert re.fullmatch(r"\d episodes to finish", job.waits_for or "")
    assert log.endswith("policy loaded\n")
    assert (cancelled.status, cancelled.detail) == (JobStatus.CANCELLED, "enough")
    result = await client.result(first)
    assert result is not None
    assert (result.error, result.logs) == ("enough", log)
    outcomes = [event for event in events if isinstance(event, EpisodeOutcome)]
    assert (await client.get(second)).status is JobStatus.COMPLETED
    assert sorted(outcome.episode_id for outcome in outcomes) == list(range(8))
    seeds = await plane.pool.fetch("SELECT job_id, seed, policy_seed FROM episodes ORDER BY ordinal")
    assert [row[1:] for row in seeds if row[0] == first] == [row[1:] for row in seeds if row[0] == second]


async def check_that_ctrl_c_stops_only_the_watching(plane: Plane, job_id: int) -> None:
    command = await asyncio.create_subprocess_exec(
        *(*ORCHESTRATOR, "watch", str(job_id), "--database-url", plane.recipe.database.dsn),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=environment(),
    )
    assert command.stdout is not None
    async with asyncio.timeout(60):
        lines = [(await command.stdout.readline()).decode() for _ in range(2)]
        command.send_signal(signal.SIGINT)
        rest = (await command.stdout.read()).decode()
        code = await command.wait()

    assert re.search(r"waits for \d episodes to finish", lines[0])
    assert re.search(r"RUNNING, \d/8 episodes", lines[1])
    assert f"stops watching; job {job_id} goes on" in rest
    assert code == 130
    assert await plane.pool.fetchval("SELECT status FROM jobs WHERE job_id = $1", job_id) == "RUNNING"


async def test_a_job_whose_eval_was_killed_is_cancelled_and_nothing_of_it_is_left(
    plane: Plane, gated: GatedSubmission, scratch: Path
) -> None:
    import ray

    options = ("--database-url", plane.recipe.database.dsn, "--data-dir", scratch / "client")
    log = scratch / "log"
    command = start("eval", gated.directory, "-b", "gymnasium/CartPole-v1", *options, log=log)
    await gated.reached()
    job_id = await plane.pool.fetchval("SELECT job_id FROM jobs")

    command.kill()
    command.wait(30)

    async with asyncio.timeout(120):
        while (result := await plane.store.result(job_id)) is None:
            await asyncio.sleep(0.1)
    assert (result.status, result.error) == (JobStatus.CANCELLED, "its client has gone away")
    assert await plane.pool.fetchval("SELECT count(*) FROM containers") == 0
    assert not any((scratch / "containers").rglob("status.json"))
    actors = lambda: [each["name"] for each in ray.util.list_named_actors(all_namespaces=True)]  # noqa: E731
    await asyncio.to_thread(
        wait_until, lambda: supervisor_name(job_id) not in actors(), "its supervisor's end"
    )


async def test_the_example_of_the_documentation_runs(plane: Plane, scratch: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "client.md").read_text(), re.DOTALL)[:1]
    pack_directory(EXAMPLES / "cartpole", scratch).path.rename(scratch / "policy.tar.gz")

    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", example],
        cwd=scratch,
        env=environment(ORCHESTRATOR_DATABASE_URL=plane.recipe.database.dsn),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "COMPLETED 1.0"
    assert os.fspath(scratch) not in done.stderr
