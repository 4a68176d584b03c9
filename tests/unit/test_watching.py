"""The live view of one job: lines in a pipe, a picture on a terminal."""

from __future__ import annotations

import io
from datetime import UTC, datetime

import pytest
from rich.console import Console

from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.reports import EpisodeCounts, JobSummary, TaskCounts
from orchestrator.presentation import make_console
from orchestrator.progress import LINE_INTERVAL_SECONDS
from orchestrator.watching import WatchView, duration
from tests.golden_texts import check_golden

AT = datetime(2026, 1, 1, tzinfo=UTC)


class FakeTime:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def job(status: JobStatus, detail: str | None = None, episodes: EpisodeCounts | None = None) -> JobSummary:
    return JobSummary(
        job_id=7,
        status=status,
        detail=detail,
        env_provider="metaworld",
        benchmark_name="MT10",
        submission_id="experts",
        priority=0,
        tags={},
        created_at=AT,
        claimed_at=AT,
        running_at=AT,
        finished_at=None,
        cancel_requested_at=None,
        cancel_reason=None,
        episodes=episodes or EpisodeCounts(),
    )


def tasks(first: int, second: int) -> list[TaskCounts]:
    return [
        TaskCounts("reach-v3", EpisodeCounts(20, first, first)),
        TaskCounts("push-v3", EpisodeCounts(20, second, second // 2)),
    ]


def watch(view: WatchView, time: FakeTime) -> None:
    view.show(job(JobStatus.QUEUED, "waits in the queue"), [])
    view.show(job(JobStatus.STARTING, "waits for its workers"), [])
    view.show(job(JobStatus.RUNNING, "40 episodes to run", EpisodeCounts(40)), tasks(0, 0))
    time.now += 6 * LINE_INTERVAL_SECONDS
    view.show(job(JobStatus.RUNNING, "40 episodes to run", EpisodeCounts(40, 10, 8)), tasks(6, 4))


def test_in_a_pipe_it_prints_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    stream, time = io.StringIO(), FakeTime()

    with WatchView(make_console(stream), monotonic=time) as view:
        watch(view, time)
        view.show(job(JobStatus.FAILED, "Traceback\nOh no", EpisodeCounts(40, 10, 8)), tasks(6, 4))

    check_golden("jobs", "watch_lines", stream.getvalue())


def test_on_a_terminal_it_draws_tasks_pace_interval_and_time_left() -> None:
    stream, time = io.StringIO(), FakeTime()
    console = Console(file=stream, force_terminal=True, width=80, color_system=None)

    with WatchView(console, monotonic=time) as view:
        watch(view, time)
        picture = io.StringIO()
        Console(file=picture, width=80, color_system=None).print(view._live.get_renderable())  # type: ignore[union-attr]

    check_golden(
        "jobs", "watch_picture", "\n".join(line.rstrip() for line in picture.getvalue().splitlines())
    )
    assert stream.getvalue().endswith("\x1b[2K")


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (89, "89 s"), (91, "2 min"), (5399, "90 min"), (9000, "2.5 h")]
)
def test_a_duration_is_said_in_the_unit_that_fits(seconds: float, words: str) -> None:
    assert duration(seconds) == words
