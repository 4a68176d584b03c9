"""What a submission printed: from the result, or from its container while it runs."""

from __future__ import annotations

from urllib.parse import urlsplit

from orchestrator.domain.errors import InfrastructureError, UsageError
from orchestrator.ports import Containers, Job
from orchestrator.stores import EXTERNAL_SCHEME

DEFAULT_TAIL_BYTES = 64 * 1024


async def running_log(job: Job, handle: str | None, containers: Containers, tail_bytes: int) -> str:
    """The end of what the submission of an unfinished job has printed so far.

    Raises:
        UsageError: nothing of it runs yet, or it is a policy server that somebody else runs.
        InfrastructureError: its container cannot be reached from here.
    """
    url = urlsplit(job.message.artifact_url or "")
    if url.scheme == EXTERNAL_SCHEME:
        raise UsageError(
            f"job {job.job_id} drives a policy server that runs already, at {url.netloc}: its log is there"
        )
    if handle is None:
        raise UsageError(
            f"job {job.job_id} is {job.status}: no container of its submission runs now, so there is no log; "
            f"`orchestrator status {job.job_id}` says what it waits for"
        )
    text = await containers.logs(handle, tail_bytes)
    if text or (await containers.evidence(handle)).running:
        return text
    raise InfrastructureError(
        f"the log of job {job.job_id} cannot be read from this machine while the job runs: "
        "it comes with the result"
    )
