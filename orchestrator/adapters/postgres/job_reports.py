"""How jobs stand, read for people and programs that ask; nothing here writes."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import asyncpg

from orchestrator.adapters.postgres.fence import JOB_COLUMNS, Connection, only_row
from orchestrator.adapters.postgres.installation import has_client
from orchestrator.adapters.postgres.job_events import read_events
from orchestrator.adapters.postgres.ledger import EPISODE_OUTCOME, outcome_from_row
from orchestrator.domain.episodes import EpisodeOutcome
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.messages import EvalJobMessage
from orchestrator.domain.reports import (
    ClaimReport,
    EpisodeCounts,
    JobFilter,
    JobInfo,
    JobSummary,
    Lease,
    QueueStanding,
    StatusChange,
    TaskCounts,
)

PAGE_JOBS = 500
PAGE_OUTCOMES = 1000
LATEST_CLAIMS = 100

SUMMARY = """job_id, message, status, detail, priority, created_at, claimed_at, running_at, finished_at,
    cancel_requested_at, cancel_reason"""


@dataclass(frozen=True)
class JobReports:
    """Each method reads one moment: what it returns fits together."""

    pool: asyncpg.Pool[asyncpg.Record] = field(repr=False)

    async def jobs(self, wanted: JobFilter) -> list[JobSummary]:
        """The newest jobs that the filter admits, newest first."""
        found: list[asyncpg.Record] = []
        async with self._one_moment() as connection:
            async with aclosing(_newest_first(connection, wanted.statuses)) as rows:
                async for row in rows:
                    if wanted.admits(_message(row)):
                        found.append(row)
                    if len(found) == wanted.limit:
                        break
            return await _summaries(connection, found)

    async def summaries(self, job_ids: Sequence[int]) -> list[JobSummary]:
        """A summary of each job that exists, in the order asked for."""
        async with self._one_moment() as connection:
            rows = await connection.fetch(
                f"SELECT {SUMMARY} FROM jobs WHERE job_id = ANY($1)",  # noqa: S608 - a constant
                list(job_ids),
            )
            found = {summary.job_id: summary for summary in await _summaries(connection, rows)}
        return [found[job_id] for job_id in job_ids if job_id in found]

    async def info(self, job_id: int) -> JobInfo | None:
        """Everything about one job but what it waits for; None where there is none of this id."""
        async with self._one_moment() as connection:
            row = await connection.fetchrow(
                f"""SELECT {JOB_COLUMNS}, client,
                        coalesce(lease_expires_at > clock_timestamp(), false) AS lease_is_live
                    FROM jobs WHERE job_id = $1""",  # noqa: S608 - a constant
                job_id,
            )
            if row is None:
                return None
            tasks = await _tasks(connection, job_id)
            return JobInfo(
                **_summary_fields(row, _total(tasks)),
                message=_message(row),
                local=row["local"],
                epoch=row["epoch"],
                deadline_at=row["deadline_at"],
                client_lease_expires_at=row["client_lease_expires_at"],
                lease=_lease(row),
                tasks=tuple(tasks),
                history=tuple(await read_events(connection, job_id)),
                claims=tuple(await _claims(connection, job_id)),
            )

    async def tasks(self, job_id: int) -> list[TaskCounts]:
        """How each task of the job stands, in the order of the plan; empty before it is stored."""
        async with self.pool.acquire() as connection:
            return await _tasks(connection, job_id)

    async def standing(self, job: JobSummary, consumer: str) -> QueueStanding:
        """What stands between the job and its start; `consumer` is the name that consumers connect by."""
        row = only_row(
            await self.pool.fetchrow(
                """SELECT count(*) FILTER (WHERE status <> 'QUEUED') AS held,
                       count(*) FILTER (WHERE status = 'QUEUED' AND cancel_requested_at IS NULL AND (
                           priority > $2 OR (priority = $2 AND (created_at, job_id) < ($3, $1)))) AS ahead
                   FROM jobs WHERE status IN ('QUEUED', 'STARTING', 'RUNNING') AND job_id <> $1""",
                job.job_id,
                job.priority,
                job.created_at,
            )
        )
        return QueueStanding(await has_client(self.pool, consumer), row["ahead"], row["held"])

    async def changes(self, job_id: int, *, after: int) -> list[StatusChange]:
        """The changes of the job with a higher number, in order."""
        async with self.pool.acquire() as connection:
            return await read_events(connection, job_id, after=after)

    async def finished_from(self, job_id: int, ordinal: int) -> list[tuple[int, EpisodeOutcome]]:
        """Up to `PAGE_OUTCOMES` finished episodes from that place in the plan on, each with its place."""
        rows = await self.pool.fetch(
            f"""SELECT ordinal, {EPISODE_OUTCOME} FROM episodes
                WHERE job_id = $1 AND finished AND ordinal >= $2 ORDER BY ordinal LIMIT $3""",  # noqa: S608
            job_id,
            ordinal,
            PAGE_OUTCOMES,
        )
        return [(row["ordinal"], outcome_from_row(row)) for row in rows]

    async def container_handle(self, job_id: int) -> str | None:
        """The handle of the container that the job's submission runs in now."""
        handle: str | None = await self.pool.fetchval(
            """SELECT c.handle FROM jobs j JOIN containers c ON c.container_id = j.container_id
               WHERE j.job_id = $1 AND NOT c.removing""",
            job_id,
        )
        return handle

    async def unfinished_artifacts(self) -> set[str]:
        """The archive URLs of unfinished local jobs: others may not name files of this machine."""
        rows = await self.pool.fetch(
            "SELECT message FROM jobs WHERE local AND status IN ('QUEUED', 'STARTING', 'RUNNING')"
        )
        # Not by SQL's ->>, which fails on a message that holds a \u0000 anywhere.
        urls = (json.loads(row["message"]).get("artifact_url") for row in rows)
        return {url for url in urls if url}

    @asynccontextmanager
    async def _one_moment(self) -> AsyncIterator[Connection]:
        async with (
            self.pool.acquire() as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            yield connection


async def _newest_first(
    connection: Connection, statuses: frozenset[JobStatus]
) -> AsyncGenerator[asyncpg.Record, None]:
    """The jobs of these statuses, read in pages: what a message says is looked at outside of SQL."""
    before: tuple[datetime | None, int | None] = (None, None)
    while True:
        rows = await connection.fetch(
            f"""SELECT {SUMMARY} FROM jobs
                WHERE status = ANY($1)
                  AND ($2::timestamptz IS NULL OR (created_at, job_id) < ($2, $3::bigint))
                ORDER BY created_at DESC, job_id DESC LIMIT $4""",  # noqa: S608 - a constant
            [status.value for status in statuses],
            *before,
            PAGE_JOBS,
        )
        for row in rows:
            yield row
        if len(rows) < PAGE_JOBS:
            return
        before = (rows[-1]["created_at"], rows[-1]["job_id"])


async def _summaries(connection: Connection, rows: Sequence[asyncpg.Record]) -> list[JobSummary]:
    counted = await connection.fetch(
        """SELECT job_id, count(*) AS planned, count(*) FILTER (WHERE finished) AS finished,
               count(*) FILTER (WHERE success) AS succeeded
           FROM episodes WHERE job_id = ANY($1) GROUP BY job_id""",
        [row["job_id"] for row in rows],
    )
    counts = {row["job_id"]: _counts(row) for row in counted}
    return [JobSummary(**_summary_fields(row, counts.get(row["job_id"], EpisodeCounts()))) for row in rows]


def _summary_fields(row: asyncpg.Record, episodes: EpisodeCounts) -> dict[str, Any]:
    message = _message(row)
    copied = ("job_id", "detail", "priority", "created_at", "claimed_at", "running_at", "finished_at")
    return {name: row[name] for name in (*copied, "cancel_requested_at", "cancel_reason")} | {
        "status": JobStatus(row["status"]),
        "env_provider": message.env_provider,
        "benchmark_name": message.benchmark_name,
        "submission_id": message.submission_id,
        "tags": dict(message.tags),
        "episodes": episodes,
    }


def _message(row: asyncpg.Record) -> EvalJobMessage:
    return EvalJobMessage.model_validate_json(row["message"])


def _lease(row: asyncpg.Record) -> Lease | None:
    if row["lease_holder"] is None:
        return None
    return Lease(row["lease_holder"], row["lease_expires_at"], row["lease_is_live"])


async def _tasks(connection: Connection, job_id: int) -> list[TaskCounts]:
    rows = await connection.fetch(
        """SELECT task_id, count(*) AS planned, count(*) FILTER (WHERE finished) AS finished,
               count(*) FILTER (WHERE success) AS succeeded
           FROM episodes WHERE job_id = $1 GROUP BY task_id ORDER BY min(ordinal)""",
        job_id,
    )
    return [TaskCounts(row["task_id"], _counts(row)) for row in rows]


def _counts(row: asyncpg.Record) -> EpisodeCounts:
    return EpisodeCounts(row["planned"], row["finished"], row["succeeded"])


def _total(tasks: Sequence[TaskCounts]) -> EpisodeCounts:
    if not tasks:
        return EpisodeCounts()
    return EpisodeCounts(
        sum(task.episodes.planned or 0 for task in tasks),
        sum(task.episodes.finished for task in tasks),
        sum(task.episodes.succeeded for task in tasks),
    )


async def _claims(connection: Connection, job_id: int) -> list[ClaimReport]:
    rows = await connection.fetch(
        """SELECT epoch, holder, claimed_at, outcomes, ended_because FROM claims
           WHERE job_id = $1 ORDER BY epoch DESC LIMIT $2""",
        job_id,
        LATEST_CLAIMS,
    )
    return [ClaimReport(*row) for row in reversed(rows)]
