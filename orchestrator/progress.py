"""Live progress of jobs on stderr: a table that redraws on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.reports import JobSummary
from orchestrator.logging import escape_control_characters
from orchestrator.presentation import STATUS_STYLES, make_console

LINE_INTERVAL_SECONDS = 10.0
BAR_COLUMNS = 24
COLUMNS_FOR_BARS = 90


@dataclass(frozen=True, slots=True)
class JobProgress:
    """How a job stands. `label` names it to the reader; `planned` is None until the plan is stored."""

    job_id: int
    label: str
    status: JobStatus
    done: int = 0
    planned: int | None = None
    successes: int = 0
    detail: str | None = None


def progress_of(job: JobSummary) -> JobProgress:
    """How the job stands, as the live view takes it."""
    return JobProgress(
        job_id=job.job_id,
        label=job.benchmark,
        status=job.status,
        done=job.episodes.finished,
        planned=job.episodes.planned,
        successes=job.episodes.succeeded,
        detail=job.detail,
    )


@dataclass(slots=True)
class _Pace:
    """Where the count stood when the job was first seen running, and what was last printed of it."""

    since: float | None = None
    done_then: int = 0
    per_minute: float | None = None
    printed: JobProgress | None = None
    printed_at: float = field(default=float("-inf"))


class ProgressView:
    """A context manager; hand it all jobs each time something may have changed.

    What is on the terminal is gone when the block ends: the table of results takes its place.
    """

    def __init__(
        self, console: Console | None = None, *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console or make_console(sys.stderr)
        self._monotonic = monotonic
        self._paces: dict[int, _Pace] = {}
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, jobs: Sequence[JobProgress]) -> None:
        """Show `jobs` as they stand now."""
        now = self._monotonic()
        for job in jobs:
            self._measure(job, now)
        if self._live is not None:
            self._live.update(self._renderable(jobs))
        elif not self._console.is_terminal:
            self._print_lines(jobs, now)

    def _measure(self, job: JobProgress, now: float) -> None:
        pace = self._paces.setdefault(job.job_id, _Pace())
        if pace.since is None:
            if job.status is JobStatus.RUNNING:
                pace.since, pace.done_then = now, job.done
        elif not job.status.is_final and now > pace.since:
            # A final job keeps its last pace: it would only fade while others go on.
            pace.per_minute = (job.done - pace.done_then) / (now - pace.since) * 60

    def _renderable(self, jobs: Sequence[JobProgress]) -> RenderableType:
        with_bars = self._console.width >= COLUMNS_FOR_BARS
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("job", min_width=12)
        for title in ("status", *(("",) if with_bars else ()), "episodes", "success"):
            table.add_column(title, no_wrap=True)
        table.add_column("")
        for job in jobs:
            bar = ProgressBar(
                total=job.planned, completed=job.done, width=BAR_COLUMNS, pulse=_is_starting(job)
            )
            table.add_row(
                _cut(job.label),
                Text(job.status.value, style=STATUS_STYLES.get(job.status, "cyan")),
                *([bar] if with_bars else []),
                Text(_count(job)),
                Text(_success(job)),
                _cut(self._pace_text(job) or job.detail or "", style="dim"),
            )
        return table

    def _print_lines(self, jobs: Sequence[JobProgress], now: float) -> None:
        for job in jobs:
            pace = self._paces[job.job_id]
            changed = pace.printed is None or pace.printed.status is not job.status
            overdue = pace.printed != job and now - pace.printed_at >= LINE_INTERVAL_SECONDS
            if changed or overdue:
                pace.printed, pace.printed_at = job, now
                self._console.print(Text(self._line(job)), soft_wrap=True)

    def _line(self, job: JobProgress) -> str:
        parts = (part for part in self._parts(job) if part)
        return escape_control_characters(f"{job.label}: {', '.join(parts)}")

    def _parts(self, job: JobProgress) -> list[str]:
        """What a line says of the job; what is empty is left out."""
        parts = [job.status.value]
        if job.planned is not None:
            parts += [
                f"{_count(job)} episodes",
                _success(job) and f"{_success(job)} success",
                self._pace_text(job),
            ]
        return [*parts, job.detail or ""]

    def _pace_text(self, job: JobProgress) -> str:
        per_minute = self._paces[job.job_id].per_minute
        return "" if not per_minute else f"{per_minute:.3g} episodes/min"


def _is_starting(job: JobProgress) -> bool:
    return job.planned is None and not job.status.is_final


def _count(job: JobProgress) -> str:
    return "" if job.planned is None else f"{job.done}/{job.planned}"


def _success(job: JobProgress) -> str:
    return "" if not job.done else f"{job.successes / job.done * 100:.1f} %"


def _cut(text: str, style: str = "") -> Text:
    """Text that gives way where the terminal is too narrow, and never takes a second line."""
    return Text(escape_control_characters(text), style=style, no_wrap=True, overflow="ellipsis")
