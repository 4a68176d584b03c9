"""The messages of jobs that a client makes: from fields, with an id of their own, or from an earlier job."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from orchestrator.client.archives import local_archive
from orchestrator.domain.errors import InvalidJob, UsageError
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.messages import EvalJobMessage
from orchestrator.ports import Job

RETRY_TAG = "retry_of"
UNREADABLE = "unknown"  # the provider and benchmark of a job whose message never validated


def new_job_id() -> int:
    """An id that nobody else is likely to have, ascending with time, and exact in every JSON reader."""
    return time.time_ns() // 1_000_000 * 1000 + random.randrange(1000)  # noqa: S311 - an id, no secret


def with_job_id(payload: bytes, job_id: int | None = None) -> bytes:
    """The payload, with `job_id` or else a fresh one where it is an object that names none."""
    try:
        content = json.loads(payload)
    except (ValueError, RecursionError):
        return payload  # which will be refused with the reason
    if not isinstance(content, dict) or "job_id" in content:
        return payload
    return json.dumps({"job_id": job_id or new_job_id()} | content).encode()


def make_message(content: Mapping[str, Any]) -> EvalJobMessage:
    """The job that the fields describe.

    Raises:
        InvalidJob: they do not describe one; says which field and why.
    """
    try:
        text = json.dumps(dict(content))
    except (TypeError, ValueError) as error:
        raise InvalidJob(None, f"the job cannot be written as JSON: {error}") from error
    return EvalJobMessage.parse(text)


def retry_message(job: Job, *, force: bool) -> EvalJobMessage:
    """The job once more, under a new id, and with the seeds that it had.

    Raises:
        UsageError: it has not ended, or COMPLETED and `force` is not given, or its archive is gone.
    """
    _check_can_be_retried(job, force)
    message = job.message
    return message.model_copy(
        update={
            "job_id": new_job_id(),
            "timestamp": datetime.now(UTC),
            # Its own group would be named after the new id otherwise, and give other seeds.
            "seed_group": message.effective_seed_group,
            "tags": {**message.tags, RETRY_TAG: str(job.job_id)},
        }
    )


def _check_can_be_retried(job: Job, force: bool) -> None:
    message = job.message
    if not job.status.is_final:
        raise UsageError(
            f"job {job.job_id} is {job.status}: only a job that has ended can be retried; "
            f"`orchestrator cancel {job.job_id}` ends it"
        )
    if job.status is JobStatus.COMPLETED and not force:
        raise UsageError(f"job {job.job_id} is COMPLETED: to evaluate it once more all the same, use --force")
    if message.env_provider == message.benchmark_name == UNREADABLE:
        raise UsageError(f"job {job.job_id} never had a valid message: submit it anew, mended")
    expires_at = message.artifact_expires_at
    if expires_at is not None and expires_at <= datetime.now(UTC):
        raise UsageError(
            f"job {job.job_id} cannot be retried: the URL of its archive expired at "
            f"{expires_at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC; submit it anew with a fresh one"
        )
    archive = local_archive(message)
    if archive is not None and not archive.exists():
        raise UsageError(
            f"job {job.job_id} cannot be retried: its archive {archive} is gone (`orchestrator eval` removes "
            "those that it packs); evaluate the submission again"
        )
