"""Submit jobs, follow them and read their results from Python; the command line does no more than this.

Everything that can go wrong is an `OrchestratorError`. See docs/client.md.
"""

from orchestrator.client.asynchronous import AsyncClient
from orchestrator.client.synchronous import Client
from orchestrator.domain.episodes import EpisodeOutcome
from orchestrator.domain.errors import (
    InfrastructureError,
    InvalidJob,
    JobIdTaken,
    JobNotFinished,
    OrchestratorError,
    UnknownJob,
    UsageError,
)
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.messages import EvalJobMessage, EvalResultMessage
from orchestrator.domain.reports import (
    ClaimReport,
    EpisodeCounts,
    HeldRow,
    JobInfo,
    JobSummary,
    Lease,
    StatusChange,
    TaskCounts,
)

__all__ = [
    "AsyncClient",
    "ClaimReport",
    "Client",
    "EpisodeCounts",
    "EpisodeOutcome",
    "EvalJobMessage",
    "EvalResultMessage",
    "HeldRow",
    "InfrastructureError",
    "InvalidJob",
    "JobIdTaken",
    "JobInfo",
    "JobNotFinished",
    "JobStatus",
    "JobSummary",
    "Lease",
    "OrchestratorError",
    "StatusChange",
    "TaskCounts",
    "UnknownJob",
    "UsageError",
]
