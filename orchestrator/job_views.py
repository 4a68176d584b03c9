"""What a person sees of jobs: lists, one job's state and history, held queue rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.reports import (
    EpisodeCounts,
    HeldRow,
    JobInfo,
    JobSummary,
    StatusChange,
    TaskCounts,
)
from orchestrator.logging import escape_control_characters
from orchestrator.presentation import NOTHING, STATUS_STYLES

PAYLOAD_COLUMNS = 40
SUBMISSION_COLUMNS = 24
LEAST_ROOM = 20
GAP = 2
TRACEBACK = "Traceback (most recent call last):"
NUMBERS = frozenset({"episodes", "success", "95 % interval", "epoch", "finished before"})
FREE_TEXT = frozenset({"detail", "ended"})


def jobs_table(jobs: Sequence[JobSummary]) -> RenderableType:
    """A row a job. A narrow terminal loses the time, then the submission, then the end of the detail."""
    return _FittingTable(
        ("job", "status", "benchmark", "submission", "episodes", "success", "created (UTC)", "detail"),
        [
            (
                str(job.job_id),
                status_text(job.status),
                _line(job.benchmark),
                _shortened(_line(job.submission_id), SUBMISSION_COLUMNS),
                counted(job.episodes),
                percent(job.episodes.success_rate),
                moment(job.created_at),
                _line(gist(job.detail or "")),
            )
            for job in jobs
        ],
        may_go=("created (UTC)", "submission"),
    )


def held_table(rows: Sequence[HeldRow]) -> RenderableType:
    """A row a held queue row, with the beginning of what it holds: nothing else names it."""
    return _FittingTable(
        ("row", "held (UTC)", "payload", "reason"),
        [
            (
                str(row.row_id),
                moment(row.held_at),
                _shortened(_line(row.payload), PAYLOAD_COLUMNS),
                _line(row.reason),
            )
            for row in rows
        ],
        may_go=("held (UTC)", "payload"),
    )


@dataclass(frozen=True)
class _FittingTable:
    """A table that leaves columns out, in the order of `may_go`, until its last one has some room.

    rich by itself takes from all columns alike, the ones with numbers first.
    """

    titles: Sequence[str]
    rows: Sequence[Sequence[str | Text]]
    may_go: Sequence[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for gone in range(len(self.may_go) + 1):
            shown = [title for title in self.titles[:-1] if title not in self.may_go[:gone]]
            unbounded = options.update(max_width=10_000)
            room = options.max_width - Measurement.get(console, unbounded, self._table(shown)).maximum
            if room >= LEAST_ROOM:
                break
        yield self._table([*shown, self.titles[-1]], last_columns=max(room - GAP, LEAST_ROOM))

    def _table(self, shown: Sequence[str], last_columns: int | None = None) -> Table:
        table = _table(*shown)
        table.columns[-1].max_width = last_columns
        places = [self.titles.index(title) for title in shown]
        for row in self.rows:
            table.add_row(*(row[place] for place in places))
        return table


def job_report(job: JobInfo) -> RenderableType:
    """How the job stands and why, then its history, then who has held it."""
    parts: list[RenderableType] = [_heading(job), _facts(job)]
    if job.status.is_final and job.detail:
        parts.append(Text(escape_control_characters(job.detail), style=STATUS_STYLES.get(job.status, "")))
    if len(job.tasks) > 1:
        parts += [Text(""), tasks_table(job.tasks)]
    parts += [Text(""), _history(job.history)]
    if job.claims:
        parts += [Text(""), _claims(job)]
    return Group(*parts)


def tasks_table(tasks: Sequence[TaskCounts]) -> Table:
    """A row a task: how many of its episodes have finished, and how many of these were successes."""
    table = _table("task", "episodes", "success", "95 % interval")
    for task in tasks:
        table.add_row(
            _line(task.task_id),
            counted(task.episodes),
            percent(task.episodes.success_rate),
            interval_text(task.episodes),
        )
    return table


def _heading(job: JobInfo) -> Text:
    heading = Text(f"job {job.job_id}  ", style="bold")
    heading.append(_line(job.benchmark))
    heading.append("  ")
    heading.append(status_text(job.status))
    return heading


def _facts(job: JobInfo) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _named_facts(job):
        table.add_row(name, Text(escape_control_characters(value)))
    return table


def _named_facts(job: JobInfo) -> Iterator[tuple[str, str]]:
    if job.waits_for:
        yield "waits for", job.waits_for
    if job.submission_id:
        yield "submission", job.submission_id
    if job.episodes.planned is not None:
        yield "episodes", f"{counted(job.episodes)}{_with_success(job.episodes)}"
    for name, value in sorted(job.tags.items()):
        yield f"tag {name}", value
    if job.priority:
        yield "priority", str(job.priority)
    if job.cancel_requested_at is not None and not job.status.is_final:
        yield "to cancel", f"since {moment(job.cancel_requested_at)} UTC: {job.cancel_reason}"
    if job.deadline_at is not None and not job.status.is_final:
        yield "deadline", f"{moment(job.deadline_at)} UTC"
    if job.client_lease_expires_at is not None and not job.status.is_final:
        yield "client", f"an eval follows it; its lease runs until {moment(job.client_lease_expires_at)} UTC"


def _history(changes: Sequence[StatusChange]) -> Table:
    table = _table("time (UTC)", "status", "epoch", "detail", whole=True)
    number = 0
    for change in changes:
        if change.number > number + 1:
            table.add_row("", "", "", Text(f"({change.number - number - 1} changes left out)", style="dim"))
        number = change.number
        table.add_row(
            moment(change.at),
            status_text(change.status),
            str(change.epoch),
            # The last one stands above in full.
            _line(gist(change.detail or "") if change.status.is_final else change.detail or ""),
        )
    return table


def _claims(job: JobInfo) -> Table:
    table = _table("epoch", "claimed (UTC)", "holder", "finished before", "ended", whole=True)
    for claim in job.claims:
        table.add_row(
            str(claim.epoch),
            moment(claim.claimed_at),
            str(claim.holder)[:8],
            str(claim.outcomes_at_claim),
            _line(claim.ended_because or _open_end(job, claim.epoch)),
        )
    return table


def _open_end(job: JobInfo, epoch: int) -> str:
    if epoch == job.epoch and job.lease is not None and job.lease.is_live:
        return f"holds the job; its lease runs until {moment(job.lease.expires_at)}"
    return "ended without a word"


def _table(*titles: str, whole: bool = False) -> Table:
    """A plain table; free text in it is cut to the width there is, or with `whole` takes more lines."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for title in titles:
        table.add_column(
            title,
            no_wrap=not (whole and title in FREE_TEXT),
            overflow="fold" if whole else "ellipsis",
            justify="right" if title in NUMBERS else "left",
        )
    return table


def status_text(status: JobStatus) -> Text:
    return Text(status.value, style=STATUS_STYLES.get(status, "cyan"))


def counted(episodes: EpisodeCounts) -> str:
    return NOTHING if episodes.planned is None else f"{episodes.finished}/{episodes.planned}"


def percent(rate: float | None) -> str:
    return NOTHING if rate is None else f"{rate * 100:.1f} %"


def interval_text(episodes: EpisodeCounts) -> str:
    interval = episodes.interval
    return NOTHING if interval is None else f"{interval.low * 100:.1f} to {interval.high * 100:.1f}"


def moment(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def _with_success(episodes: EpisodeCounts) -> str:
    if not episodes.finished:
        return ""
    return f", success {percent(episodes.success_rate)} ({interval_text(episodes)})"


def gist(text: str) -> str:
    """The first line and the last: of a traceback what it is about, and what happened."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) < 2:
        return text.strip()
    first = lines[0].removesuffix(TRACEBACK).strip()
    return f"{first} {lines[-1]}".strip() if first.endswith(":") or not first else f"{first} ... {lines[-1]}"


def _line(text: str) -> Text:
    """Text on one line, whatever it holds."""
    return Text(escape_control_characters(" ".join(text.split())))


def _shortened(text: Text, columns: int) -> Text:
    text.truncate(columns, overflow="ellipsis")
    return text
