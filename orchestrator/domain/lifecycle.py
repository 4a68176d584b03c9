"""The life of a job: which status may follow which, and why. SQL guards repeat this table."""

from __future__ import annotations

from enum import StrEnum

from orchestrator.domain.errors import IllegalTransition


class JobStatus(StrEnum):
    """Where a job is; the four last ones are final."""

    QUEUED = "QUEUED"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    TIMEOUT = "TIMEOUT"
    CANCELLED = "CANCELLED"

    @property
    def is_final(self) -> bool:
        return self in FINAL

    @property
    def is_held(self) -> bool:
        """Whether a supervisor holds (or held, until it died) a job in this status."""
        return self in HELD


# Why a job is TIMEOUT, for the person who reads its result.
TIME_IS_OVER = "the job's time is over: give it more by timeout_seconds"

FINAL = frozenset({JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.TIMEOUT, JobStatus.CANCELLED})
HELD = frozenset({JobStatus.STARTING, JobStatus.RUNNING})

# Key: (from, to). Value: what makes it happen.
TRANSITIONS: dict[tuple[JobStatus, JobStatus], str] = {
    (JobStatus.QUEUED, JobStatus.STARTING): "a supervisor claims it",
    (JobStatus.QUEUED, JobStatus.FAILED): "its message can never run",
    (JobStatus.QUEUED, JobStatus.CANCELLED): "it is cancelled before anyone claims it",
    (JobStatus.STARTING, JobStatus.STARTING): "a supervisor claims it again after the last one died",
    (JobStatus.RUNNING, JobStatus.STARTING): "a supervisor claims it again after the last one died",
    (JobStatus.STARTING, JobStatus.RUNNING): "the policy answers",
    (JobStatus.STARTING, JobStatus.COMPLETED): "a re-claim finds every outcome in the ledger",
    (JobStatus.STARTING, JobStatus.FAILED): "it cannot be evaluated",
    (JobStatus.STARTING, JobStatus.TIMEOUT): "its deadline passed",
    (JobStatus.STARTING, JobStatus.CANCELLED): "it is cancelled",
    (JobStatus.RUNNING, JobStatus.COMPLETED): "every planned episode has an outcome",
    (JobStatus.RUNNING, JobStatus.FAILED): "it cannot be evaluated any further",
    (JobStatus.RUNNING, JobStatus.TIMEOUT): "its deadline passed",
    (JobStatus.RUNNING, JobStatus.CANCELLED): "it is cancelled",
}


def may_become(current: JobStatus, requested: JobStatus) -> bool:
    """Whether the lifecycle allows the step."""
    return (current, requested) in TRANSITIONS


def check_transition(job_id: int, current: JobStatus, requested: JobStatus) -> None:
    """Pass silently if the step is allowed.

    Raises:
        IllegalTransition: the step is not in the table; final statuses allow none.
    """
    if not may_become(current, requested):
        raise IllegalTransition(job_id, current.value, requested.value)
