"""How jobs stand, as clients read it."""

from __future__ import annotations

from uuid import uuid4

from orchestrator.adapters.postgres.job_reports import JobReports
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.ports import ClaimRefusal
from tests.job_fixtures import a_job, a_result, a_store


async def test_the_archives_of_local_jobs_that_have_not_ended_are_needed_whatever_others_send(pool) -> None:
    store = a_store(pool)
    await store.insert(a_job(1, artifact_url="file:///over"), enqueue=False, local=True)
    claim = await store.claim(1, uuid4())
    assert not isinstance(claim, ClaimRefusal)
    await store.finish(claim, JobStatus.CANCELLED, a_result("CANCELLED"))
    await store.insert(a_job(2, artifact_url="file:///needed"), enqueue=False, local=True)
    await store.insert(a_job(3, artifact_url="file:///\0"), enqueue=False, local=True)
    await store.insert(a_job(4), enqueue=False, local=True)
    await store.insert(a_job(5, artifact_url="https://elsewhere/\0"), enqueue=False)

    assert await JobReports(pool).unfinished_artifacts() == {"file:///needed", "file:///\0"}
