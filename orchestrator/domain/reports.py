"""How jobs stand, for people and programs that ask: plain values, read in one moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.messages import EvalJobMessage
from orchestrator.domain.statistics import Interval, wilson_interval


@dataclass(frozen=True, slots=True)
class EpisodeCounts:
    """Episodes of a job or a task. `planned` is None until the plan is stored."""

    planned: int | None = None
    finished: int = 0
    succeeded: int = 0

    @property
    def success_rate(self) -> float | None:
        """Successes among the finished ones; None before the first."""
        return self.succeeded / self.finished if self.finished else None

    @property
    def interval(self) -> Interval | None:
        """The 95 % Wilson interval of `success_rate`; None before the first finished episode."""
        return wilson_interval(self.succeeded, self.finished) if self.finished else None


@dataclass(frozen=True, slots=True)
class TaskCounts:
    """How one task of a job stands."""

    task_id: str
    episodes: EpisodeCounts


@dataclass(frozen=True, slots=True)
class StatusChange:
    """A change of status or detail, committed `at` in database time.

    Numbers ascend; one that is missing was dropped, as of a job with very many changes only the first and the
    latest are kept.
    """

    number: int
    at: datetime
    status: JobStatus
    detail: str | None
    epoch: int


@dataclass(frozen=True, slots=True)
class ClaimReport:
    """A supervisor's hold on a job. `ended_because` is None while it lasts, or where it died silently."""

    epoch: int
    holder: UUID
    claimed_at: datetime
    outcomes_at_claim: int
    ended_because: str | None


@dataclass(frozen=True, slots=True)
class Lease:
    """Who holds the job until when; `is_live` by the database's clock."""

    holder: UUID
    expires_at: datetime
    is_live: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSummary:
    """One job in a list. `detail` says in words how it stands, or why it ended so."""

    job_id: int
    status: JobStatus
    detail: str | None
    env_provider: str
    benchmark_name: str
    submission_id: str
    priority: int
    tags: dict[str, str]
    created_at: datetime
    claimed_at: datetime | None
    running_at: datetime | None
    finished_at: datetime | None
    cancel_requested_at: datetime | None
    cancel_reason: str | None
    episodes: EpisodeCounts

    @property
    def benchmark(self) -> str:
        return f"{self.env_provider}/{self.benchmark_name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobInfo(JobSummary):
    """All that there is to know of one job.

    `waits_for` says what has to happen next, None once it is final; `history` holds its changes in order,
    and `claims` who has held it.
    """

    message: EvalJobMessage = field(repr=False)
    local: bool
    epoch: int
    deadline_at: datetime | None
    client_lease_expires_at: datetime | None
    lease: Lease | None
    tasks: tuple[TaskCounts, ...]
    history: tuple[StatusChange, ...]
    claims: tuple[ClaimReport, ...]
    waits_for: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFilter:
    """Which jobs to list: those that meet all that is given, the newest `limit` of them.

    `benchmark` is a PROVIDER/NAME, a provider or a name; a job has to have every one of the `tags`.
    """

    statuses: frozenset[JobStatus] = frozenset(JobStatus)
    benchmark: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    limit: int = 50

    def admits(self, message: EvalJobMessage) -> bool:
        """Whether a job with this message belongs to the list, whatever its status."""
        names = (
            f"{message.env_provider}/{message.benchmark_name}",
            message.env_provider,
            message.benchmark_name,
        )
        return (self.benchmark is None or self.benchmark in names) and all(
            message.tags.get(name) == value for name, value in self.tags.items()
        )


@dataclass(frozen=True, slots=True)
class HeldRow:
    """An `add_job` queue row that was set aside, for it can never become a job as it is.

    `payload` is its beginning as a terminal can show it, `job_id` what it names.
    """

    row_id: int
    queued_at: datetime
    held_at: datetime
    reason: str
    payload: str
    job_id: int | None


@dataclass(frozen=True, slots=True)
class QueueStanding:
    """What stands between a QUEUED job and its start."""

    control_plane_is_live: bool
    jobs_ahead: int
    jobs_held: int


def waits_for(job: JobInfo, standing: QueueStanding) -> str | None:
    """What has to happen next, in words; None for a job that has ended."""
    if job.status.is_final:
        return None
    if job.cancel_requested_at is not None:
        return "its cancellation" + _without_control_plane(standing)
    if not standing.control_plane_is_live:
        return "a control plane: none works on this database, `orchestrator up` starts one"
    if job.status is JobStatus.QUEUED:
        return _place_in_queue(standing)
    if job.lease is None or not job.lease.is_live:
        return "a new supervisor: the last one has given it up or died"
    if job.status is JobStatus.STARTING:
        return job.detail
    left = (job.episodes.planned or 0) - job.episodes.finished
    return f"{_counted(left, 'episode')} to finish" if left else "its result"


def _without_control_plane(standing: QueueStanding) -> str:
    return "" if standing.control_plane_is_live else ", though no control plane works on this database"


def _place_in_queue(standing: QueueStanding) -> str:
    held = f"{_counted(standing.jobs_held, 'job')} at work"
    if standing.jobs_ahead:
        return f"its turn: {held}, {standing.jobs_ahead} more before it in the queue"
    return f"a free place: {held}" if standing.jobs_held else "the control plane to take it"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
