"""The whole path against a plain loop that knows nothing of us: equal bit for bit, whatever the workers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

import pytest

from orchestrator.domain.lifecycle import JobStatus
from tests.end_to_end import reference
from tests.end_to_end.conftest import EXAMPLES, Plane

pytestmark = pytest.mark.ray


def played_directly(
    benchmark: str, submission: str, rows: Iterable[Any], tasks: Iterable[str]
) -> list[tuple[Any, ...]]:
    """The same episodes in a plain loop: (task, episode, return, steps, success) in plan order."""
    rows = list(rows)
    found = []
    for task in tasks:
        episodes = [
            reference.Episode(row["episode_id"], row["seed"], row["policy_seed"])
            for row in rows
            if row["task_id"] == task
        ]
        for played in reference.play(benchmark, task, episodes, EXAMPLES / submission / "agent.py"):
            found.append((task, played.episode_id, played.episode_return, played.steps, played.success))
    return found


@pytest.mark.parametrize("submission", ["cartpole", "stateful_cartpole", "stochastic_cartpole"])
async def test_cartpole_equals_a_plain_loop_with_one_worker_and_with_four(
    plane: Plane, submission: str
) -> None:
    config = {"seed": 5, "episodes_per_task": 12}
    jobs = [
        plane.job(EXAMPLES / submission, config=config, resources={"workers": workers}) for workers in (1, 4)
    ]

    results = [await plane.evaluate(job) for job in jobs]

    assert [result.status for result in results] == [JobStatus.COMPLETED] * 2
    rows = await plane.episodes(jobs[0])
    expected = played_directly("gymnasium/CartPole-v1", submission, rows, ["CartPole-v1"])
    assert await plane.outcomes(jobs[0]) == expected
    assert await plane.outcomes(jobs[1]) == expected


@pytest.mark.timeout(900)
async def test_mt10_equals_a_plain_loop_with_one_worker_and_with_four(plane: Plane) -> None:
    config = {"seed": 5, "episodes_per_task": 1}
    jobs = [
        plane.job(
            EXAMPLES / "metaworld_experts", "metaworld/MT10", config=config, resources={"workers": workers}
        )
        for workers in (1, 4)
    ]

    await plane.submit(*jobs)
    results = [await plane.result(job, seconds=600) for job in jobs]

    assert [result.status for result in results] == [JobStatus.COMPLETED] * 2
    rows = await plane.episodes(jobs[0])
    tasks = list(dict.fromkeys(row["task_id"] for row in rows))
    assert len(tasks) == 10
    expected = played_directly("metaworld/MT10", "metaworld_experts", rows, tasks)
    assert await plane.outcomes(jobs[0]) == expected
    assert await plane.outcomes(jobs[1]) == expected


def test_the_reference_imports_nothing_of_ours() -> None:
    import subprocess

    code = "import json, sys; import tests.end_to_end.reference; print(json.dumps(sorted(sys.modules)))"
    modules = json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)

    assert not [name for name in modules if name.split(".")[0] == "orchestrator"]
