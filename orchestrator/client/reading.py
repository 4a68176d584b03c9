"""What a client reads: how jobs stand, their results, their logs, and what happens to them meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace

from orchestrator.adapters.postgres.clients import CONSUMER_APPLICATION
from orchestrator.adapters.postgres.held_rows import held_rows
from orchestrator.client.connection import DatabaseClient
from orchestrator.client.following import JobStream, Pace, Progress
from orchestrator.client.submission_logs import DEFAULT_TAIL_BYTES, running_log
from orchestrator.domain.episodes import EpisodeOutcome
from orchestrator.domain.errors import InfrastructureError
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.messages import EvalResultMessage
from orchestrator.domain.reports import HeldRow, JobFilter, JobInfo, JobSummary, TaskCounts, waits_for
from orchestrator.runtime import Liveness, is_live
from orchestrator.stores import ledger, open_containers


class ReadingClient(DatabaseClient):
    """The half of a client that changes nothing."""

    async def get(self, job_id: int) -> JobInfo:
        """All that there is to know of the job: status, times, history, claims, what it waits for."""
        info = await self._ask(lambda now: now.reports.info(job_id))
        if info is None:
            raise self._unknown(job_id)
        standing = await self._ask(lambda now: now.reports.standing(info, CONSUMER_APPLICATION))
        return replace(info, waits_for=waits_for(info, standing))

    async def jobs(
        self,
        *,
        statuses: Iterable[JobStatus] | None = None,
        benchmark: str | None = None,
        tags: Mapping[str, str] | None = None,
        limit: int = 50,
    ) -> list[JobSummary]:
        """The newest jobs that meet all that is given, newest first.

        `benchmark` is a PROVIDER/NAME, a provider or a name.
        """
        wanted = JobFilter(
            statuses=frozenset(JobStatus if statuses is None else statuses),
            benchmark=benchmark,
            tags=tags or {},
            limit=limit,
        )
        return await self._ask(lambda now: now.reports.jobs(wanted))

    async def summaries(self, job_ids: Sequence[int]) -> list[JobSummary]:
        """How these jobs stand, in this order; what does not exist is left out."""
        return await self._ask(lambda now: now.reports.summaries(job_ids))

    async def tasks(self, job_id: int) -> list[TaskCounts]:
        """How each task of the job stands, in the order of the plan; empty before there is one."""
        return await self._ask(lambda now: now.reports.tasks(job_id))

    async def held_rows(self, limit: int = 50) -> list[HeldRow]:
        """The `add_job` rows that can never become a job as they are, the latest first."""
        return await self._ask(lambda now: held_rows(now.pool, limit))

    async def result(self, job_id: int) -> EvalResultMessage | None:
        """The job's one result; None while there is none."""
        await self._job(job_id)
        return await self._ask(lambda now: now.store.result(job_id))

    async def outcomes(self, job_id: int) -> list[EpisodeOutcome]:
        """The outcomes of the job's episodes so far, in the order of the plan."""
        return await self._ask(lambda now: ledger(now.pool, self.settings).outcomes(job_id))

    async def log(self, job_id: int, *, tail_bytes: int = DEFAULT_TAIL_BYTES) -> str:
        """The end of what the submission printed: of a running one so far, where it can be reached.

        Raises:
            UsageError: nothing of it has run yet.
            InfrastructureError: it runs where its log cannot be read from here.
        """
        result = await self.result(job_id)
        if result is not None:
            return (result.logs or "").encode()[-tail_bytes:].decode(errors="ignore")
        job = await self._job(job_id)
        handle = await self._ask(lambda now: now.reports.container_handle(job_id))
        async with open_containers(self.settings) as containers:
            return await running_log(job, handle, containers, tail_bytes)

    async def unfinished_artifacts(self) -> set[str]:
        """The archive URLs of the jobs that have not ended."""
        return await self._ask(lambda now: now.reports.unfinished_artifacts())

    async def is_served(self) -> bool:
        """Whether a control plane works on the database now."""
        return await is_live(self._now.pool)

    def liveness(self) -> Liveness:
        """Tells whether the control plane has gone for good; asked every now and then."""
        return Liveness(self._now.pool)

    # ------------------------------------------------------------------------------------- following

    async def wait(self, job_id: int, timeout_seconds: float | None = None) -> EvalResultMessage:
        """The job's result, once it is there.

        Raises:
            JobNotFinished: it is not, after `timeout_seconds`; without them the wait has no end.
        """
        pace = Pace(job_id, timeout_seconds)
        while not (job := await self._job(job_id)).status.is_final:
            await pace.pause(job.status)
        return await self._final_result(job_id)

    async def results(
        self, job_ids: Sequence[int], timeout_seconds: float | None = None
    ) -> list[EvalResultMessage]:
        """The results of all the jobs, in this order, once they are there; as `wait`."""
        return list(await asyncio.gather(*(self.wait(job_id, timeout_seconds) for job_id in job_ids)))

    async def stream(
        self, job_id: int, timeout_seconds: float | None = None
    ) -> AsyncGenerator[Progress, None]:
        """Every change of the job's status and every outcome, from its beginning, as they are committed.

        Each comes once; the final status comes last. Nothing is gathered: a slow reader is waited for.

        Raises:
            JobNotFinished: it has not ended after `timeout_seconds`.
        """
        await self._job(job_id)
        stream = JobStream(
            lambda number: self._ask(lambda now: now.reports.changes(job_id, after=number)),
            lambda ordinal: self._ask(lambda now: now.reports.finished_from(job_id, ordinal)),
            Pace(job_id, timeout_seconds),
        )
        async with aclosing(stream.events()) as events:
            async for progress in events:
                yield progress

    async def _final_result(self, job_id: int) -> EvalResultMessage:
        result = await self._ask(lambda now: now.store.result(job_id))
        if result is None:
            raise InfrastructureError(f"job {job_id} is final without a result")
        return result
