import io

import pytest
from rich.console import Console

from orchestrator.domain.lifecycle import JobStatus
from orchestrator.presentation import make_console
from orchestrator.progress import LINE_INTERVAL_SECONDS, JobProgress, ProgressView


class FakeTime:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def time() -> FakeTime:
    return FakeTime()


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


def running(done: int, successes: int = 0) -> JobProgress:
    return JobProgress(1, "metaworld/MT10", JobStatus.RUNNING, done=done, planned=20, successes=successes)


def test_without_a_terminal_each_change_of_status_is_a_line(stream: io.StringIO, time: FakeTime) -> None:
    with ProgressView(make_console(stream), monotonic=time) as view:
        view.update([JobProgress(1, "metaworld/MT10", JobStatus.QUEUED)])
        view.update([JobProgress(1, "metaworld/MT10", JobStatus.STARTING, detail="placing workers")])
        view.update([running(0)])

    assert stream.getvalue().splitlines() == [
        "metaworld/MT10: QUEUED",
        "metaworld/MT10: STARTING, placing workers",
        "metaworld/MT10: RUNNING, 0/20 episodes",
    ]


def test_without_a_terminal_progress_is_a_line_now_and_then(stream: io.StringIO, time: FakeTime) -> None:
    with ProgressView(make_console(stream), monotonic=time) as view:
        view.update([running(0)])
        for done in range(1, 6):
            time.advance(LINE_INTERVAL_SECONDS / 5)
            view.update([running(done, successes=done - 1)])
        time.advance(LINE_INTERVAL_SECONDS * 5)
        view.update([running(5, successes=4)])

    assert stream.getvalue().splitlines()[1:] == [
        "metaworld/MT10: RUNNING, 5/20 episodes, 80.0 % success, 30 episodes/min"
    ]


def test_the_pace_counts_from_when_the_job_was_first_seen_running(
    stream: io.StringIO, time: FakeTime
) -> None:
    with ProgressView(make_console(stream), monotonic=time) as view:
        view.update([JobProgress(1, "j", JobStatus.STARTING)])
        time.advance(600)
        view.update([running(8)])
        time.advance(30)
        view.update([running(10)])

    assert stream.getvalue().splitlines()[-1].endswith("4 episodes/min")


def test_on_a_terminal_it_redraws_and_clears_itself_in_the_end(stream: io.StringIO, time: FakeTime) -> None:
    console = Console(file=stream, force_terminal=True, width=100, color_system=None)

    with ProgressView(console, monotonic=time) as view:
        view.update([running(7, successes=7)])
        view._live.refresh()

    drawn = stream.getvalue()
    assert "7/20" in drawn
    assert "100.0 %" in drawn
    assert drawn.endswith("\x1b[2K")  # the last line is erased
    assert "\x1b[?25h" in drawn  # and the cursor is back


def test_a_narrow_terminal_keeps_the_numbers(stream: io.StringIO, time: FakeTime) -> None:
    console = Console(file=stream, force_terminal=True, width=60, color_system=None)

    with ProgressView(console, monotonic=time) as view:
        view.update([running(7, successes=7)])
        view._live.refresh()

    assert "RUNNING" in stream.getvalue()
    assert "7/20" in stream.getvalue()


def test_the_terminal_is_restored_after_an_error(stream: io.StringIO, time: FakeTime) -> None:
    console = Console(file=stream, force_terminal=True, width=100)

    def interrupted() -> None:
        with ProgressView(console, monotonic=time) as view:
            view.update([running(1)])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    assert "\x1b[?25h" in stream.getvalue()


def test_a_detail_cannot_drive_the_terminal(stream: io.StringIO, time: FakeTime) -> None:
    with ProgressView(make_console(stream), monotonic=time) as view:
        view.update([JobProgress(1, "j", JobStatus.FAILED, detail="\x1b[2J\r")])

    assert not set("\x1b\r") & set(stream.getvalue())
