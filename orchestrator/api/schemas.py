"""What the API answers: plain shapes, with the names of the messages and of the command line's JSON."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Self

from pydantic import BaseModel, Field

from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.reports import EpisodeCounts, JobInfo, JobSummary


class EpisodesBody(BaseModel):
    """Episodes of a job: `planned` is null until the plan is stored, the rates until one has finished."""

    planned: int | None
    finished: int
    succeeded: int
    success_rate: float | None
    interval_low: Annotated[float | None, Field(description="of the 95 % Wilson interval")]
    interval_high: float | None

    @classmethod
    def of(cls, counts: EpisodeCounts) -> Self:
        interval = counts.interval
        return cls(
            planned=counts.planned,
            finished=counts.finished,
            succeeded=counts.succeeded,
            success_rate=counts.success_rate,
            interval_low=None if interval is None else interval.low,
            interval_high=None if interval is None else interval.high,
        )


class JobBody(BaseModel):
    """How a job stands. Times are UTC."""

    job_id: int
    status: JobStatus
    detail: Annotated[str | None, Field(description="how it stands, or why it ended so")]
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
    episodes: EpisodesBody

    @classmethod
    def of(cls, job: JobSummary) -> Self:
        plain = {name: getattr(job, name) for name in cls.model_fields if name != "episodes"}
        return cls(**plain, episodes=EpisodesBody.of(job.episodes))


class ChangeBody(BaseModel):
    """A change of status or detail, at database time."""

    at: datetime
    status: JobStatus
    detail: str | None


class TaskBody(BaseModel):
    """How one task of the job stands."""

    task_id: str
    episodes: EpisodesBody


class JobDetailsBody(JobBody):
    """All that there is to know of one job: also its tasks, its history, and what it waits for."""

    waits_for: str | None
    deadline_at: datetime | None
    tasks: list[TaskBody]
    history: list[ChangeBody]

    @classmethod
    def of(cls, job: JobSummary) -> Self:
        assert isinstance(job, JobInfo)
        return cls(
            **JobBody.of(job).model_dump(exclude={"episodes"}),
            episodes=EpisodesBody.of(job.episodes),
            waits_for=job.waits_for,
            deadline_at=job.deadline_at,
            tasks=[
                TaskBody(task_id=task.task_id, episodes=EpisodesBody.of(task.episodes)) for task in job.tasks
            ],
            history=[ChangeBody(at=one.at, status=one.status, detail=one.detail) for one in job.history],
        )


class JobsBody(BaseModel):
    """The newest jobs that meet what was asked for, newest first."""

    jobs: list[JobBody]


class CancelRequest(BaseModel):
    """Why a job is cancelled; shown in its history."""

    reason: Annotated[str, Field(min_length=1, max_length=1000)] = "cancelled by HTTP"


class HealthBody(BaseModel):
    """This replica answers."""

    status: str = "ok"


class CheckBody(BaseModel):
    """One thing that has to be right for jobs to run."""

    name: str
    ready: bool
    detail: str


class ReadinessBody(BaseModel):
    """Whether jobs that are submitted now would run."""

    ready: bool
    checks: list[CheckBody]
