"""docs/submissions.md: its examples pass the check that it describes, its numbers are those of the code."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import gymnasium.envs.classic_control  # noqa: F401 - at once: several threads must not be the first to
import pytest

from orchestrator.authoring.findings import Mark, Report
from orchestrator.authoring.submission_check import check_submission
from orchestrator.authoring.task_runs import CheckPlan
from orchestrator.domain.episodes import FaultClass
from orchestrator.domain.messages import EvalJobMessage
from orchestrator.settings import Settings
from orchestrator.submission.archive import ArchiveLimits
from tests.conftest import run_in_own_loop

PAGE = (Path(__file__).parents[2] / "docs" / "submissions.md").read_text()
EXAMPLES = re.findall(r"<!-- agent: (\S+?)(?:; (\S+))? -->\n```python\n(.+?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    """What `check` says of each example."""

    async def report(benchmark: str, option: str, source: str) -> Report:
        directory = tmp_path_factory.mktemp("example")
        (directory / "agent.py").write_text(source)
        provider, _, name = benchmark.partition("/")
        config = {"max_episode_steps": 50, **dict([option.split("=")] if option else [])}
        job = EvalJobMessage(job_id=0, env_provider=provider, benchmark_name=name, config=config)
        report = Report(benchmark)
        await check_submission(directory, CheckPlan(job), Settings(), report)
        return report

    async def report_all() -> list[Report]:
        return await asyncio.gather(*(report(*example) for example in EXAMPLES))

    return run_in_own_loop(report_all)


def test_every_example_passes_the_check(reports: list[Report]) -> None:
    assert len(reports) == 4
    for report in reports:
        assert {finding.mark for finding in report.findings} == {Mark.OK}, report.as_json()


def test_the_limits_of_the_page_are_the_defaults() -> None:
    rows = re.findall(r"\| (\d+) s \(`(\w+)`\) \|", PAGE)
    settings, limits = Settings(), ArchiveLimits()

    assert len(rows) == 5
    assert all(getattr(settings, name) == float(seconds) for seconds, name in rows)
    assert f"{settings.archive_max_bytes >> 30} GiB packed (`archive_max_bytes`)" in PAGE
    assert f"{limits.unpacked_bytes >> 30} GiB and {limits.files} files unpacked" in PAGE
    assert f"the last {settings.container_log_bytes >> 20} MiB" in PAGE
    assert f"in {settings.max_containers_per_job} episodes of a job" in PAGE


def test_every_fault_is_on_the_page() -> None:
    assert all(f"`{fault.value}`" in PAGE for fault in FaultClass)
