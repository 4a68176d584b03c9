"""What an author reads of a submission with packages, or a server, of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from orchestrator.authoring.findings import Mark, Report
from orchestrator.authoring.submission_check import check_submission
from orchestrator.authoring.task_runs import CheckPlan
from orchestrator.domain.messages import EvalJobMessage
from orchestrator.settings import Settings
from tests.golden_texts import check_golden
from tests.unit.authoring.reports import as_text
from tests.wheels import write_wheel

EXAMPLE = Path(__file__).parents[3] / "examples" / "cartpole_server"
AGENT = "import package\n\nclass Agent:\n    def act(self, observation):\n        return package.PUSH\n"


async def report_of(submission: Path, data: Path) -> Report:
    job = EvalJobMessage(
        job_id=0,
        env_provider="gymnasium",
        benchmark_name="CartPole-v1",
        config={"score": "avg_reward", "max_episode_steps": 50},
    )
    report = Report("my-policy")
    await check_submission(submission, CheckPlan(job), Settings(data_dir=data), report)
    return report


def text_of(report: Report) -> str:
    text = re.sub(r"\d+ bytes", "N bytes", as_text(report))
    return re.sub(r"cpython 3\.\d+ on \S+", "<this Python>", text)


@pytest.fixture
def submission(tmp_path: Path) -> Path:
    directory = tmp_path / "submission"
    directory.mkdir()
    return directory


async def test_an_environment_is_made_for_the_first_check_and_told(submission: Path, tmp_path: Path) -> None:
    (submission / "agent.py").write_text(AGENT)
    (submission / "requirements.txt").write_text("package\n")
    write_wheel(submission / "wheels", "package", "1.0", body="PUSH = 1\n")

    first = await report_of(submission, tmp_path / "data")
    second = await report_of(submission, tmp_path / "data")

    assert {finding.mark for report in (first, second) for finding in report.findings} == {Mark.OK}
    assert [finding.name for finding in first.findings][:3] == ["packed", "environment", "loads"]
    assert [finding.name for finding in second.findings][:2] == ["packed", "loads"]


async def test_requirements_that_cannot_be_met_are_told(submission: Path, tmp_path: Path) -> None:
    (submission / "agent.py").write_text(AGENT)
    (submission / "requirements.txt").write_text("package==2.0\n")
    write_wheel(submission / "wheels", "package", "1.0")

    check_golden("check", "requirements_unmet", text_of(await report_of(submission, tmp_path / "data")))


async def test_a_server_of_its_own_passes(tmp_path: Path) -> None:
    report = await report_of(EXAMPLE, tmp_path / "data")

    assert {finding.mark for finding in report.findings} == {Mark.OK}, text_of(report)


async def test_a_server_of_its_own_that_ends_early_is_told_with_its_last_words(
    submission: Path, tmp_path: Path
) -> None:
    (submission / "main.py").write_text("raise RuntimeError('no weights here')\n")

    check_golden("check", "main_py_ends_early", text_of(await report_of(submission, tmp_path / "data")))
