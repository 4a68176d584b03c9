"""What an author reads of a submission: real processes, real episodes, the report word for word."""

from __future__ import annotations

import asyncio
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import gymnasium.envs.classic_control  # noqa: F401 - at once: several threads must not be the first to
import psutil
import pytest

from orchestrator.authoring.containers import SCRATCH_PREFIX, make_scratch_directory
from orchestrator.authoring.findings import Mark, Report
from orchestrator.authoring.scaffold import first_submission, write_submission
from orchestrator.authoring.submission_check import check_submission
from orchestrator.authoring.task_runs import CheckPlan
from orchestrator.domain.episodes import open_secret, plan_episodes
from orchestrator.domain.errors import UsageError
from orchestrator.domain.messages import EvalJobMessage
from orchestrator.settings import Settings
from tests.conftest import run_in_own_loop
from tests.golden_texts import check_golden
from tests.unit.authoring.reports import as_text
from tests.unit.authoring.submissions import (
    CARTPOLE,
    DOES_NOT_PLAY,
    DOES_NOT_REPEAT,
    HAS_WARNINGS,
    NOT_LOADED,
    RIGHT,
    Case,
)

CASES = NOT_LOADED | DOES_NOT_PLAY | DOES_NOT_REPEAT | HAS_WARNINGS | RIGHT
AT_ONCE = 4
MEASURED = re.compile(r"\d+(\.\d+)? m?s\b")
DRAWN = (
    (re.compile(r"(?<=returns )-?[\d.e-]+, -?[\d.e-]+"), "X, Y"),
    (re.compile(r"first \[[^\]]+\], then \[[^\]]+\]"), "first X, then Y"),
)


def plan(benchmark: str = CARTPOLE, *, all_tasks: bool = False, **config: Any) -> CheckPlan:
    provider, _, name = benchmark.partition("/")
    job = EvalJobMessage(
        job_id=0,
        env_provider=provider,
        benchmark_name=name,
        config={"score": "avg_reward"} | config,
    )
    return CheckPlan(job, all_tasks=all_tasks)


async def report_of(directory: Path, plan: CheckPlan, **settings: Any) -> Report:
    report = Report("my-policy")
    await check_submission(directory, plan, Settings(**settings), report)
    return report


async def report_of_case(case: Case, directory: Path) -> Report:
    (directory / "agent.py").write_text(case.source.lstrip("\n"))
    return await report_of(directory, plan(case.benchmark, **case.config), **case.settings)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report | BaseException]:
    """The report of every case, a few at a time: most of them wait for a process to start, or to answer."""

    async def report_in_turn(case: Case, turn: asyncio.Semaphore) -> Report:
        async with turn:
            return await report_of_case(case, tmp_path_factory.mktemp("case"))

    async def report_all() -> list[Report | BaseException]:
        turn = asyncio.Semaphore(AT_ONCE)
        reports = (report_in_turn(case, turn) for case in CASES.values())
        return await asyncio.gather(*reports, return_exceptions=True)

    return dict(zip(CASES, run_in_own_loop(report_all), strict=True))


@pytest.fixture
def report_on(reports: dict[str, Report | BaseException]) -> Callable[[str], Report]:
    def report_on(name: str) -> Report:
        report = reports[name]
        if isinstance(report, BaseException):
            raise report
        return report

    return report_on


def normalised(report: Report, case: Case) -> str:
    lines = []
    for line in as_text(report).splitlines():
        if re.fullmatch(r"\s*[~^]+", line):
            continue  # Python versions mark other parts of a line
        line = re.sub(r"packed: \d+ bytes", "packed: N bytes", line)
        if re.match(r"  . (speed|loads: in)", line):
            line = MEASURED.sub("N ms", line)
        for pattern, word in DRAWN if case.varies else ():
            line = pattern.sub(word, line)
        lines.append(line)
    return "\n".join(lines)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No process of a container, and no scratch directory of ours, is there after a check."""
    yield
    own = f"{SCRATCH_PREFIX}{os.getpid()}-"
    assert not list(Path(tempfile.gettempdir()).glob(f"{own}*"))
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            assert own not in " ".join(process.cmdline())


@pytest.mark.parametrize("name", [*NOT_LOADED, *DOES_NOT_PLAY, *DOES_NOT_REPEAT])
def test_the_author_is_told_what_is_wrong_and_where(name: str, report_on: Callable[[str], Report]) -> None:
    report = report_on(name)

    check_golden("check", name, normalised(report, CASES[name]))
    assert report.count(Mark.WRONG) == 1


@pytest.mark.parametrize("name", HAS_WARNINGS)
def test_what_works_but_is_doubtful_is_a_warning(name: str, report_on: Callable[[str], Report]) -> None:
    report = report_on(name)

    check_golden("check", name, normalised(report, CASES[name]))
    assert (report.count(Mark.WRONG), report.count(Mark.WARNING)) == (0, 1)


def test_a_right_submission_is_told_so(report_on: Callable[[str], Report]) -> None:
    report = report_on("right")

    check_golden("check", "right", normalised(report, CASES["right"]))
    assert {finding.mark for finding in report.findings} == {Mark.OK}


async def test_what_the_archive_cannot_hold_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "agent.py").write_text(RIGHT["right"].source)
    (tmp_path / "weights.npz").symlink_to("/nowhere/weights.npz")

    report = await report_of(tmp_path, plan())

    check_golden("check", "link_to_weights", normalised(report, RIGHT["right"]))
    assert report.is_right


async def test_every_task_is_played_when_asked_for(tmp_path: Path) -> None:
    write_submission(tmp_path, first_submission("metaworld/ML10"))

    report = await report_of(tmp_path, plan("metaworld/ML10", all_tasks=True, max_episode_steps=10))

    names = [finding.name for finding in report.findings]
    assert report.is_right
    assert names == ["packed", "loads", *["plays"] * 5, "actions", "speed", "forgets", "repeats"]
    assert report.findings[-1].text.startswith("in each of 5 tasks: ")


async def test_an_episode_has_the_seeds_that_an_evaluation_gives_it() -> None:
    """So that what a check shows of `--seed 7` is what `eval --seed 7` plays."""
    (task,) = plan(seed=7).tasks(["CartPole-v1"])

    assert task.episodes == plan_episodes(["CartPole-v1"], 2, secret=open_secret(7), seed_group="open")


@pytest.mark.parametrize("name", ["nowhere", "notes.txt", "empty"])
async def test_what_is_no_submission_is_wrong_usage(name: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no archive")
    (tmp_path / "empty").mkdir()

    with pytest.raises(UsageError):
        await report_of(tmp_path / name, plan())


def test_what_a_killed_check_left_behind_is_removed_by_the_next(tmp_path: Path) -> None:
    gone = Path(tempfile.mkdtemp(prefix=f"{SCRATCH_PREFIX}{2**22 + 1}-"))  # above every process id

    own = make_scratch_directory()

    own.rmdir()
    assert not gone.exists()
