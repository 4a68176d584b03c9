"""Jobs through the whole path: real Postgres, real Ray actors, real submissions over real TCP."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pgqueuer.adapters.persistence.queries import Queries

from orchestrator.actors.control_plane import supervisor_name
from orchestrator.domain.lifecycle import JobStatus
from tests.end_to_end.conftest import EXAMPLES, PATIENCE_SECONDS, Plane
from tests.unit.actors.control_fakes import eventually

if TYPE_CHECKING:
    from tests.end_to_end.conftest import GatedSubmission

pytestmark = pytest.mark.ray


async def test_a_bare_add_job_row_gives_one_result_and_telemetry_of_every_step(plane: Plane) -> None:
    job = plane.job(EXAMPLES / "cartpole", config={"seed": 7, "episodes_per_task": 3})
    await plane.store.insert(job, enqueue=False, local=True)  # the archive is a local file
    await Queries.from_asyncpg_pool(plane.pool).enqueue("add_job", job.to_json())

    result = await plane.result(job)

    assert result.status is JobStatus.COMPLETED
    assert (result.score, result.total_episodes, result.avg_reward) == (1.0, 3, 500.0)
    (queued_result,) = await plane.queued_messages("eval_result")
    assert queued_result["job_id"] == job.job_id
    episodes = await plane.queued_messages("episode_data")
    assert [episode["episode_id"] for episode in episodes] == [0, 1, 2]
    steps = await plane.queued_messages("episode_step_data")
    assert len(steps) == sum(episode["steps"] for episode in episodes) == 1500
    assert len({(step["episode_id"], step["step"]) for step in steps}) == 1500
    statuses = [update["status"] for update in await plane.queued_messages("job_status_update")]
    assert list(dict.fromkeys(statuses)) == ["QUEUED", "STARTING", "RUNNING", "COMPLETED"]


async def test_nothing_of_a_finished_job_is_left(plane: Plane) -> None:
    import ray
    from ray.util.placement_group import placement_group_table

    result = await plane.evaluate(plane.job(EXAMPLES / "cartpole", config={"episodes_per_task": 1}))

    assert result.status is JobStatus.COMPLETED
    assert await plane.pool.fetchval("SELECT count(*) FROM containers") == 0
    assert not any((plane.scratch / "containers").rglob("status.json"))
    groups = [group["state"] for group in placement_group_table().values() if group["name"] == "job-1"]
    assert groups
    assert set(groups) <= {"REMOVED"}

    async def no_supervisor() -> bool:
        named = await asyncio.to_thread(ray.util.list_named_actors, all_namespaces=True)
        ours = [actor["name"] for actor in named if actor["namespace"] == plane.recipe.namespace]
        assert any(name.startswith("queue-consumer") for name in ours)  # the right place to look
        return supervisor_name(1) not in ours

    await eventually(no_supervisor, PATIENCE_SECONDS)  # it ends itself once the result is stored


async def test_a_job_that_never_validates_fails_with_the_reason(plane: Plane) -> None:
    await Queries.from_asyncpg_pool(plane.pool).enqueue("add_job", b'{"job_id": 5, "env_provider": 1}')

    job = plane.job(EXAMPLES / "cartpole").model_copy(update={"job_id": 5})
    result = await plane.result(job)

    assert result.status is JobStatus.FAILED
    assert "env_provider" in (result.error or "")


async def test_a_row_that_names_no_job_is_held_and_the_next_one_runs(plane: Plane) -> None:
    await Queries.from_asyncpg_pool(plane.pool).enqueue("add_job", b"not json")

    result = await plane.evaluate(plane.job(EXAMPLES / "cartpole", config={"episodes_per_task": 1}))

    assert result.status is JobStatus.COMPLETED
    assert (
        await plane.pool.fetchval("SELECT status::text FROM pgqueuer WHERE entrypoint = 'add_job'")
        == "failed"
    )


async def test_a_submission_that_does_not_load_fails_the_job_with_its_traceback(
    plane: Plane, scratch: Path
) -> None:
    broken = scratch / "broken"
    broken.mkdir()
    (broken / "agent.py").write_text("import no_such_package\n\nclass Agent:\n    pass\n")

    result = await plane.evaluate(plane.job(broken))

    assert result.status is JobStatus.FAILED
    assert "No module named 'no_such_package'" in (result.error or "")


async def test_an_unknown_benchmark_fails_the_job_and_names_the_nearest(plane: Plane) -> None:
    result = await plane.evaluate(plane.job(EXAMPLES / "cartpole", "gymnasium/CartPol-v1"))

    assert result.status is JobStatus.FAILED
    assert "CartPole-v1" in (result.error or "")


async def test_a_job_that_asks_for_more_than_the_cluster_has_fails_at_once(plane: Plane) -> None:
    result = await plane.evaluate(plane.job(EXAMPLES / "cartpole", resources={"workers": 100}))

    assert result.status is JobStatus.FAILED
    assert "100 workers" in (result.error or "")
    assert "8 CPU" in (result.error or "")


async def test_a_running_job_that_is_cancelled_ends_cancelled_with_the_outcomes_so_far(
    plane: Plane, gated: GatedSubmission
) -> None:
    job = plane.job(gated.directory, config={"episodes_per_task": 10, "max_episode_steps": 20})
    await plane.submit(job)
    await gated.reached()

    await plane.store.request_cancel(job.job_id, "enough")
    result = await plane.result(job)

    assert result.status is JobStatus.CANCELLED
    assert result.score is None
    assert result.total_episodes is not None
    assert result.total_episodes >= 1
    assert await plane.pool.fetchval("SELECT count(*) FROM containers") == 0


async def test_a_job_whose_time_is_over_ends_timeout_with_the_outcomes_so_far(
    plane: Plane, gated: GatedSubmission
) -> None:
    job = plane.job(gated.directory, timeout_seconds=3600, config={"max_episode_steps": 20})
    await plane.submit(job)
    await gated.reached()

    await plane.pool.execute("UPDATE jobs SET deadline_at = clock_timestamp()")
    result = await plane.result(job)

    assert result.status is JobStatus.TIMEOUT
    assert result.total_episodes is not None
    assert 1 <= result.total_episodes < 10


async def test_a_crash_in_an_episode_is_charged_to_it_alone_whatever_the_number_of_workers(
    plane: Plane, scratch: Path
) -> None:
    crashing = scratch / "crashing"
    crashing.mkdir()
    (crashing / "agent.py").write_text(
        "import os\n\nclass Agent:\n    def reset(self, episode, seed):\n        self.episode = episode\n\n"
        "    def act(self, observation):\n        if self.episode == 3:\n            os._exit(9)\n"
        "        return int(observation[2] + 0.5 * observation[3] > 0)\n"
    )
    config = {"seed": 3, "episodes_per_task": 6, "max_episode_steps": 30, "score": "avg_reward"}
    jobs = [plane.job(crashing, config=config, resources={"workers": workers}) for workers in (1, 3)]

    results = [await plane.evaluate(job) for job in jobs]

    assert [result.status for result in results] == [JobStatus.COMPLETED] * 2
    faults = [[row["fault"] for row in await plane.episodes(job)] for job in jobs]
    assert faults == [[None, None, None, "crash", None, None]] * 2
    assert await plane.outcomes(jobs[0]) == await plane.outcomes(jobs[1])
