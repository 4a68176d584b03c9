"""Submissions with packages or a server of their own, through the whole path."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

from orchestrator.domain.lifecycle import JobStatus
from tests.end_to_end.conftest import EXAMPLES, Plane
from tests.wheels import write_wheel

pytestmark = pytest.mark.ray

AGENT = """
import controller, typer

assert typer.__version__ == "99.0"

class Agent:
    def act(self, observation):
        return controller.push(observation)
"""
CONTROLLER = """
def push(observation):
    return int(sum(w * float(o) for w, o in zip((0.1, 0.35, 3.0, 1.0), observation)) > 0)
"""


def submission(directory: Path, **files: str) -> Path:
    directory.mkdir()
    for name, text in files.items():
        (directory / name.replace("_", ".")).write_text(text)
    return directory


async def test_a_submission_plays_with_the_packages_that_it_brings_and_says_so_meanwhile(
    plane: Plane, scratch: Path
) -> None:
    packaged = submission(scratch / "packaged", agent_py=AGENT, requirements_txt="controller\ntyper\n")
    write_wheel(packaged / "wheels", "controller", "1.0", body=CONTROLLER)
    write_wheel(packaged / "wheels", "typer", "99.0")
    jobs = [plane.job(packaged, config={"seed": 7, "episodes_per_task": 2}) for _ in range(2)]

    results = [await plane.evaluate(job) for job in jobs]

    assert [(result.status, result.score) for result in results] == [(JobStatus.COMPLETED, 1.0)] * 2
    assert await plane.outcomes(jobs[0]) == await plane.outcomes(jobs[1])
    assert version("typer") != "99.0"
    assert len([path for path in (scratch / "environments").iterdir() if path.is_dir()]) == 1
    updates = await plane.queued_messages("job_status_update")
    details = [(update["job_id"], update.get("detail") or "") for update in updates]
    words = "makes the submission's environment: "  # what follows depends on when it was asked
    told = [job_id for job_id, detail in details if detail.startswith(words)]
    assert jobs[0].job_id in told
    assert jobs[1].job_id not in told  # it was there


async def test_a_server_of_its_own_plays_as_the_agent_does(plane: Plane) -> None:
    config = {"seed": 7, "episodes_per_task": 4}
    jobs = [
        plane.job(EXAMPLES / name, config=config, resources={"workers": 2})
        for name in ("cartpole_server", "cartpole")
    ]

    await plane.submit(*jobs)
    results = [await plane.result(job) for job in jobs]

    assert [(result.status, result.score) for result in results] == [(JobStatus.COMPLETED, 1.0)] * 2
    assert await plane.outcomes(jobs[0]) == await plane.outcomes(jobs[1])


async def test_a_server_of_its_own_that_ends_early_fails_the_job_with_its_exit_code_and_last_words(
    plane: Plane, scratch: Path
) -> None:
    ends = submission(scratch / "ends", main_py="import sys\nprint('no weights here')\nsys.exit(3)\n")

    result = await plane.evaluate(plane.job(ends))

    assert result.status is JobStatus.FAILED
    assert "main.py ended with exit code 3 before it served" in (result.error or "")
    assert "no weights here" in (result.logs or "")


async def test_a_server_of_its_own_that_dies_in_an_episode_is_charged_for_that_one_alone(
    plane: Plane, scratch: Path
) -> None:
    source = (EXAMPLES / "cartpole_server" / "main.py").read_text()
    source = source.replace("import argparse\n", "import argparse\nimport os\n\nobservations = 0\n")
    counts = "        global observations\n        observations += 1\n"
    dies_at = "        if observations == 45:\n            os._exit(9)\n"
    push = "        lean = sum("
    assert push in source
    dies = submission(scratch / "dies", main_py=source.replace(push, counts + dies_at + push))
    job = plane.job(dies, config={"seed": 7, "episodes_per_task": 4, "max_episode_steps": 20})

    result = await plane.evaluate(job)

    assert result.status is JobStatus.COMPLETED, result.error
    assert [row["fault"] for row in await plane.episodes(job)] == [None, None, "crash", None]
