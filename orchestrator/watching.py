"""The live view of `orchestrator watch`: one job with its tasks, its pace and the time that is left."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator.domain.reports import JobSummary, TaskCounts
from orchestrator.job_views import gist, interval_text, percent, status_text, tasks_table
from orchestrator.logging import escape_control_characters
from orchestrator.progress import BAR_COLUMNS, JobProgress, ProgressView, progress_of


class WatchView(ProgressView):
    """As `ProgressView`, for a single job that somebody looks at closely."""

    def show(self, job: JobSummary, tasks: Sequence[TaskCounts]) -> None:
        """Show the job as it stands now."""
        self._job = job
        self._tasks = tasks
        self.update([progress_of(job)])

    def _renderable(self, jobs: Sequence[JobProgress]) -> RenderableType:
        (job,) = jobs
        parts: list[RenderableType] = [self._heading(job), self._bar(job)]
        if pace := ", ".join(self._pace(job)):
            parts.append(Text(pace))
        if len(self._tasks) > 1:
            parts.append(tasks_table(self._tasks))
        return Group(*parts)

    def _heading(self, job: JobProgress) -> Text:
        heading = Text(f"job {job.job_id}  {escape_control_characters(job.label)}  ", style="bold")
        heading.append(status_text(job.status))
        heading.append(f"  {escape_control_characters(self._what_happens(job))}", style="dim")
        heading.no_wrap, heading.overflow = True, "ellipsis"
        return heading

    def _bar(self, job: JobProgress) -> Table:
        table = Table.grid(padding=(0, 2, 0, 0))
        bar = ProgressBar(total=job.planned, completed=job.done, width=BAR_COLUMNS, pulse=job.planned is None)
        table.add_row(bar, *(Text(part, no_wrap=True) for part in self._counts(job)))
        return table

    def _parts(self, job: JobProgress) -> list[str]:
        return [job.status.value, *self._counts(job), *self._pace(job), self._what_happens(job)]

    def _what_happens(self, job: JobProgress) -> str:
        """The detail, until there is a pace to show; of a final job the result says more."""
        return "" if job.status.is_final or self._pace_text(job) else gist(job.detail or "")

    def _counts(self, job: JobProgress) -> list[str]:
        if job.planned is None:
            return []
        episodes = self._job.episodes
        success = f"success {percent(episodes.success_rate)} ({interval_text(episodes)})"
        return [f"{job.done}/{job.planned} episodes", *([success] if job.done else [])]

    def _pace(self, job: JobProgress) -> list[str]:
        return [part for part in (self._pace_text(job), self._time_left(job)) if part]

    def _time_left(self, job: JobProgress) -> str:
        per_minute = self._paces[job.job_id].per_minute
        if not per_minute or job.planned is None or job.status.is_final:
            return ""
        return f"about {duration((job.planned - job.done) / per_minute * 60)} left"


def duration(seconds: float) -> str:
    """Roughly how long, in the unit that fits."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
