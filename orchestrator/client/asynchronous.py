"""The client itself: jobs of one database, from a program's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

from orchestrator.adapters.postgres.client_leases import CLIENT_GONE, followed_jobs
from orchestrator.adapters.postgres.held_rows import requeue_held_row
from orchestrator.adapters.postgres.job_store import JobClient
from orchestrator.adapters.process.client_process import is_known_dead, this_process
from orchestrator.client.job_messages import make_message, new_job_id, retry_message
from orchestrator.client.leases import kept_alive
from orchestrator.client.reading import ReadingClient
from orchestrator.domain.errors import InfrastructureError, JobIdTaken, JobNotFinished, UsageError
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.messages import EvalJobMessage
from orchestrator.domain.reports import JobSummary

CANCEL_SECONDS = 120.0
CANCEL_POLL_SECONDS = 0.25
FRESH_ID_TRIES = 10
CANCELLED_ON_REQUEST = "cancelled on request"


class AsyncClient(ReadingClient):
    """Jobs of one database: `async with AsyncClient(database_url) as client: ...`.

    Every call outlasts a restart of Postgres for `patience_seconds`, and raises nothing but
    OrchestratorErrors: UnknownJob where there is no such job, InfrastructureError where the database does
    not answer.
    """

    # ------------------------------------------------------------------------------------ submitting

    async def submit(
        self,
        message: EvalJobMessage | Mapping[str, Any] | None = None,
        /,
        *,
        local: bool = False,
        **fields: Any,
    ) -> int:
        """Enqueue a job and return its id: a message, or its fields. Without `job_id` it gets a fresh one.

        The same job twice is one job. A `local` one is trusted as the command line's are: its archive may be
        a file of the machine that it runs on, or a policy server by its address.

        Raises:
            InvalidJob: the fields describe no job; says which and why.
            JobIdTaken: another job has this id.
        """
        if isinstance(message, EvalJobMessage):
            await self.enqueue(message.model_copy(update=fields), local=local)
            return message.job_id
        content = {**(message or {}), **fields}
        if "job_id" in content:
            made = make_message(content)
            await self.enqueue(made, local=local)
            return made.job_id
        return await self._enqueue_fresh(make_message(content | {"job_id": new_job_id()}), local=local)

    async def enqueue(self, message: EvalJobMessage, *, local: bool = False, followed: bool = False) -> bool:
        """Enqueue a job; False where the very same one is there already.

        A `followed` one is cancelled once this process is gone: keep it alive with `keeping_alive`.

        Raises:
            JobIdTaken: another job has this id.
        """
        client = JobClient(this_process(), self.settings.client_lease_seconds) if followed else None
        return await self._ask(
            lambda now: now.store.insert(message, enqueue=True, local=local, client=client)
        )

    async def _enqueue_fresh(self, message: EvalJobMessage, *, local: bool) -> int:
        for _ in range(FRESH_ID_TRIES):
            try:
                await self.enqueue(message, local=local)
                return message.job_id
            except JobIdTaken:
                message = message.model_copy(update={"job_id": new_job_id()})
        raise InfrastructureError("no free job_id was found: try again")

    def keeping_alive(self, job_ids: Iterable[int]) -> AbstractAsyncContextManager[None]:
        """Renews this client's leases on the jobs for the block; see `enqueue`."""
        return kept_alive(self._now.pool, list(job_ids), self.settings.client_lease_seconds)

    async def retry(self, job_id: int, *, force: bool = False) -> int:
        """Submit an ended job once more, under a new id, which is returned; the seeds are the same.

        Raises:
            UsageError: it has not ended, or COMPLETED and not `force`, or its archive is gone.
        """
        job = await self._job(job_id)
        return await self._enqueue_fresh(retry_message(job, force=force), local=job.local)

    async def retry_held(self, row_id: int) -> None:
        """Let the control plane take a held `add_job` row once more.

        Raises:
            UsageError: there is no held row of this id.
        """
        if not await self._ask(lambda now: requeue_held_row(now.pool, row_id)):
            raise UsageError(f"no held queue row has the id {row_id}: `orchestrator jobs --held` lists them")

    # ------------------------------------------------------------------------------------ cancelling

    async def cancel(
        self,
        job_id: int,
        reason: str = CANCELLED_ON_REQUEST,
        *,
        wait: bool = True,
        timeout_seconds: float = CANCEL_SECONDS,
    ) -> JobSummary:
        """Cancel the job, and return how it stands once it has ended; of one that has ended nothing changes.

        Its supervisor ends it; where none does, this call. With `wait` False it may go on for a moment.

        Raises:
            JobNotFinished: it has not ended in time; it will, as soon as its supervisor sees the request.
        """
        await self._request_cancel(job_id, reason)
        try:
            async with asyncio.timeout(timeout_seconds):
                while True:
                    (summary,) = await self.summaries([job_id])
                    if summary.status.is_final:
                        return summary
                    # Somebody may have asked before, for another reason.
                    ended = await self._end_unheld(job_id, summary.cancel_reason or reason)
                    if not (ended or wait):
                        return summary
                    await asyncio.sleep(0 if ended else CANCEL_POLL_SECONDS)
        except TimeoutError:
            raise JobNotFinished(job_id, (await self._job(job_id)).status.value, timeout_seconds) from None

    async def _end_unheld(self, job_id: int, reason: str) -> bool:
        """End the job unless a supervisor holds it, which then does so."""
        return await self._ask(
            lambda now: now.store.finish_unheld(job_id, JobStatus.CANCELLED, reason, now.store.failed_result)
        )

    async def cancel_orphans(self) -> list[int]:
        """Ask for the end of the jobs whose client is known to be dead, and return their ids."""
        followed = await self._ask(lambda now: followed_jobs(now.pool))
        orphans = [job.job_id for job in followed if is_known_dead(job.client)]
        for job_id in orphans:
            await self._request_cancel(job_id, CLIENT_GONE)
        return orphans

    async def _request_cancel(self, job_id: int, reason: str) -> None:
        if await self._ask(lambda now: now.store.request_cancel(job_id, reason)) is None:
            raise self._unknown(job_id)
