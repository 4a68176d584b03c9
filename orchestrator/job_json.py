"""What programs see of jobs by `--json`; docs/client.md lists the keys, which stay."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from orchestrator.domain.reports import EpisodeCounts, HeldRow, JobInfo, JobSummary, StatusChange


def summary_json(job: JobSummary) -> dict[str, Any]:
    """The keys of a job in `orchestrator jobs --json`; times are ISO 8601 in UTC, what is unknown is null."""
    return {
        "job_id": job.job_id,
        "status": job.status.value,
        "detail": job.detail,
        "env_provider": job.env_provider,
        "benchmark_name": job.benchmark_name,
        "submission_id": job.submission_id,
        "priority": job.priority,
        "tags": job.tags,
        "created_at": iso(job.created_at),
        "claimed_at": iso(job.claimed_at),
        "running_at": iso(job.running_at),
        "finished_at": iso(job.finished_at),
        "cancel_requested_at": iso(job.cancel_requested_at),
        "cancel_reason": job.cancel_reason,
        "episodes": counts_json(job.episodes),
    }


def job_json(job: JobInfo) -> dict[str, Any]:
    """The keys of `orchestrator status --json`: those of a list, and what only one job is asked for."""
    return summary_json(job) | {
        "waits_for": job.waits_for,
        "epoch": job.epoch,
        "local": job.local,
        "deadline_at": iso(job.deadline_at),
        "lease_expires_at": iso(job.lease.expires_at) if job.lease else None,
        "client_lease_expires_at": iso(job.client_lease_expires_at),
        "tasks": [{"task_id": task.task_id, "episodes": counts_json(task.episodes)} for task in job.tasks],
        "history": [change_json(change) for change in job.history],
        "claims": [
            {
                "epoch": claim.epoch,
                "holder": str(claim.holder),
                "claimed_at": iso(claim.claimed_at),
                "outcomes_at_claim": claim.outcomes_at_claim,
                "ended_because": claim.ended_because,
            }
            for claim in job.claims
        ],
    }


def change_json(change: StatusChange) -> dict[str, Any]:
    return {
        "number": change.number,
        "at": iso(change.at),
        "status": change.status.value,
        "detail": change.detail,
        "epoch": change.epoch,
    }


def held_json(row: HeldRow) -> dict[str, Any]:
    """The keys of `orchestrator jobs --held --json`; `payload` as text, for it need not be JSON."""
    return {
        "row_id": row.row_id,
        "queued_at": iso(row.queued_at),
        "held_at": iso(row.held_at),
        "reason": row.reason,
        "payload": row.payload,
        "job_id": row.job_id,
    }


def counts_json(episodes: EpisodeCounts) -> dict[str, Any]:
    interval = episodes.interval
    return {
        "planned": episodes.planned,
        "finished": episodes.finished,
        "succeeded": episodes.succeeded,
        "success_rate": episodes.success_rate,
        "interval": None if interval is None else [interval.low, interval.high],
    }


def iso(at: datetime | None) -> str | None:
    return None if at is None else at.astimezone(UTC).isoformat()
