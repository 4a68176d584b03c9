"""Jobs, claims, leases and results in Postgres; every status change queues its message with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import groupby
from typing import Any
from uuid import UUID

import asyncpg

from orchestrator.adapters.postgres import ledger as ledger_sql
from orchestrator.adapters.postgres.fence import (
    JOB_COLUMNS,
    Connection,
    check_epoch,
    exclusively,
    only_row,
    storable,
)
from orchestrator.adapters.postgres.job_events import record_event
from orchestrator.adapters.postgres.queue import enqueue_job, enqueue_message
from orchestrator.domain.errors import Fenced, InfrastructureError, JobIdTaken, UsageError
from orchestrator.domain.lifecycle import JobStatus, check_transition
from orchestrator.domain.messages import (
    QUEUE_RESULT,
    QUEUE_STATUS,
    EvalJobMessage,
    EvalResultMessage,
    JobStatusUpdateMessage,
)
from orchestrator.ports import (
    Claim,
    ClaimRefusal,
    ContainerRecord,
    Job,
    RenewedLease,
    ResultBuilder,
    UnheldResultBuilder,
)

MAX_BACKOFF_SECONDS = 60.0
MAX_REASON_CHARS = 500
TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"

SELECT_JOB = f"""
    SELECT {JOB_COLUMNS}, coalesce(lease_expires_at > clock_timestamp(), false) AS lease_is_live,
           extract(epoch FROM deadline_at - clock_timestamp())::float8 AS deadline_seconds_left
    FROM jobs WHERE job_id = $1"""  # noqa: S608 - a constant


@dataclass(frozen=True, slots=True)
class JobClient:
    """Who asked for a job and follows it: `process` names it, its lease has to be renewed in time."""

    process: str
    lease_seconds: float


@dataclass(frozen=True, slots=True)
class JobRules:
    """The settings that decide about claims. Seconds."""

    max_concurrent_jobs: int = 2
    lease_seconds: float = 30.0
    job_timeout_seconds: float = 3600.0
    max_claims_without_progress: int = 5
    validator_hotkey: str = "local"


def job_from_row(row: asyncpg.Record) -> Job:
    """A row of `SELECT_JOB` as the domain sees it."""
    return Job(
        job_id=row["job_id"],
        message=EvalJobMessage.model_validate_json(row["message"]),
        status=JobStatus(row["status"]),
        detail=row["detail"],
        epoch=row["epoch"],
        lease_holder=row["lease_holder"],
        lease_is_live=row["lease_is_live"],
        deadline_seconds_left=row["deadline_seconds_left"],
        cancel_requested=row["cancel_requested_at"] is not None,
        container_id=row["container_id"],
        outcomes_at_claim=row["outcomes_at_claim"],
        error=row["error"],
        created_at=row["created_at"],
        finished_at=row["finished_at"],
        local=row["local"],
    )


@dataclass(frozen=True)
class PostgresJobStore:
    """`ports.JobStore` on a pool; `failed_result` builds the result of a job that a claim ends."""

    pool: asyncpg.Pool = field(repr=False)
    rules: JobRules
    failed_result: UnheldResultBuilder = field(repr=False)

    # ------------------------------------------------------------------------------------- entering

    async def insert(
        self, message: EvalJobMessage, *, enqueue: bool, local: bool = False, client: JobClient | None = None
    ) -> bool:
        """Insert the job QUEUED, with its `add_job` row if `enqueue`; False where the same job is there.

        With a `client` the job is cancelled when that has been silent for longer than its lease.

        Raises:
            JobIdTaken: another job has this id.
        """
        async with self.pool.acquire() as connection, connection.transaction():
            inserted = await connection.fetchval(
                """INSERT INTO jobs (job_id, message, priority, status, local, detail, client,
                       client_lease_expires_at)
                   VALUES ($1, $2::json, $3, 'QUEUED', $4, 'waits in the queue', $5, clock_timestamp() + $6)
                   ON CONFLICT DO NOTHING RETURNING job_id""",
                message.job_id,
                message.to_json().decode(),
                message.priority,
                local,
                None if client is None else client.process,
                None if client is None else timedelta(seconds=client.lease_seconds),
            )
            if inserted is None:
                await self._check_same_content(connection, message)
                return False
            await self._announce(connection, message.job_id, JobStatus.QUEUED, "waits in the queue")
            if enqueue:
                await enqueue_job(connection, message)
        return True

    async def _check_same_content(self, connection: Connection, message: EvalJobMessage) -> None:
        stored = json.loads(
            await connection.fetchval("SELECT message FROM jobs WHERE job_id = $1", message.job_id)
        )
        given = json.loads(message.to_json())
        for content in (stored, given):
            content.pop("timestamp", None)
        if stored != given:
            raise JobIdTaken(message.job_id)

    async def insert_invalid(self, job_id: int, payload: bytes, reason: str) -> bool:
        """A job whose message does not validate, FAILED at once; False where this very one is there.

        Raises:
            UsageError: another job has this id.
        """
        message = EvalJobMessage.salvage(job_id, payload)
        async with exclusively(self.pool, job_id) as connection:
            inserted = await connection.fetchval(
                """INSERT INTO jobs (job_id, message, status, detail)
                   VALUES ($1, $2::json, 'QUEUED', 'invalid') ON CONFLICT DO NOTHING RETURNING job_id""",
                job_id,
                message.to_json().decode(),
            )
            if inserted is None:
                await self._check_same_refusal(connection, message, reason)
                return False
            await self._finish_row(connection, job_id, JobStatus.FAILED, reason, self.failed_result)
        return True

    async def _check_same_refusal(self, connection: Connection, message: EvalJobMessage, reason: str) -> None:
        error = await connection.fetchval("SELECT error FROM jobs WHERE job_id = $1", message.job_id)
        if error != storable(reason):
            raise UsageError(f"job {message.job_id} exists with other content; and {reason}")
        await self._check_same_content(connection, message)

    # --------------------------------------------------------------------------------------- reading

    async def get(self, job_id: int) -> Job | None:
        row = await self.pool.fetchrow(SELECT_JOB, job_id)
        return None if row is None else job_from_row(row)

    async def result(self, job_id: int) -> EvalResultMessage | None:
        """The one result of a job, or None while there is none."""
        text = await self.pool.fetchval("SELECT message FROM results WHERE job_id = $1", job_id)
        return None if text is None else EvalResultMessage.model_validate_json(text)

    async def benchmark(self, job_id: int) -> str:
        """The job's PROVIDER/NAME; empty where there is no such job."""
        name = await self.pool.fetchval(
            """SELECT (message ->> 'env_provider') || '/' || (message ->> 'benchmark_name')
               FROM jobs WHERE job_id = $1""",
            job_id,
        )
        return str(name or "")

    async def held_count(self) -> int:
        """How many jobs are STARTING or RUNNING."""
        return int(
            await self.pool.fetchval("SELECT count(*) FROM jobs WHERE status IN ('STARTING', 'RUNNING')")
        )

    # ------------------------------------------------------------------------------ claim and lease

    async def claim(self, job_id: int, holder: UUID) -> Claim | ClaimRefusal:
        async with exclusively(self.pool, job_id) as connection:
            # One claim at a time in the whole installation: the count below must not be raced.
            await connection.execute("SELECT FROM installation FOR UPDATE")
            row = await connection.fetchrow(SELECT_JOB + " FOR UPDATE", job_id)
            refusal = await self._refusal(connection, row, holder)
            if refusal is not None:
                return refusal
            return await self._take(connection, only_row(row), holder)

    async def _refusal(
        self, connection: Connection, row: asyncpg.Record | None, holder: UUID
    ) -> ClaimRefusal | None:
        if row is None:
            return ClaimRefusal.UNKNOWN
        status = JobStatus(row["status"])
        if status.is_final:
            return ClaimRefusal.FINAL
        if row["lease_is_live"] and row["lease_holder"] != holder:
            return ClaimRefusal.LEASED
        # A job that was held already has its place: after a restart with fewer places, those without a live
        # lease would otherwise keep each other out for ever.
        others = await connection.fetchval(
            """SELECT count(*) FROM jobs WHERE status IN ('STARTING', 'RUNNING') AND job_id <> $1
                 AND (NOT $2 OR lease_expires_at > clock_timestamp())""",
            row["job_id"],
            status.is_held,
        )
        if others >= self.rules.max_concurrent_jobs:
            return ClaimRefusal.CAPACITY
        if status is JobStatus.QUEUED and row["cancel_requested_at"] is not None:
            reason = row["cancel_reason"] or "cancelled"
            await self._finish_row(connection, row["job_id"], JobStatus.CANCELLED, reason, self.failed_result)
            return ClaimRefusal.CANCELLED
        return None

    async def _take(self, connection: Connection, row: asyncpg.Record, holder: UUID) -> Claim | ClaimRefusal:
        job_id = row["job_id"]
        outcomes = await connection.fetchval(
            "SELECT count(*) FROM episodes WHERE job_id = $1 AND finished", job_id
        )
        progressed = row["epoch"] == 0 or outcomes > row["outcomes_at_claim"]
        handed_over = await connection.fetchval(
            "SELECT handed_over FROM claims WHERE job_id = $1 AND epoch = $2", job_id, row["epoch"]
        )
        fruitless = 0 if progressed else row["claims_without_progress"] + (0 if handed_over else 1)
        if fruitless >= self.rules.max_claims_without_progress:
            reason = await self._poison_history(connection, job_id, fruitless)
            await self._finish_row(connection, job_id, JobStatus.FAILED, reason, self.failed_result)
            return ClaimRefusal.POISONED
        check_transition(job_id, JobStatus(row["status"]), JobStatus.STARTING)
        message = EvalJobMessage.model_validate_json(row["message"])
        await connection.execute(
            """UPDATE jobs SET status = 'STARTING', epoch = epoch + 1, lease_holder = $2,
                   detail = 'claimed', claimed_at = clock_timestamp(),
                   lease_expires_at = clock_timestamp() + $3, outcomes_at_claim = $4,
                   claims_without_progress = $5,
                   deadline_at = coalesce(deadline_at, clock_timestamp() + $6)
               WHERE job_id = $1""",
            job_id,
            holder,
            timedelta(seconds=self.rules.lease_seconds),
            outcomes,
            fruitless,
            timedelta(seconds=message.timeout_seconds or self.rules.job_timeout_seconds),
        )
        claimed = job_from_row(only_row(await connection.fetchrow(SELECT_JOB, job_id)))
        await connection.execute(
            "INSERT INTO claims (job_id, epoch, holder, outcomes) VALUES ($1, $2, $3, $4)",
            job_id,
            claimed.epoch,
            holder,
            outcomes,
        )
        await self._announce(connection, job_id, JobStatus.STARTING, f"claimed, epoch {claimed.epoch}")
        return Claim(job=claimed, epoch=claimed.epoch, holder=holder)

    async def _poison_history(self, connection: Connection, job_id: int, fruitless: int) -> str:
        rows = await connection.fetch(
            """SELECT epoch, claimed_at, outcomes, coalesce(ended_because, 'died without a word') AS why
               FROM claims WHERE job_id = $1 ORDER BY epoch DESC LIMIT 10""",
            job_id,
        )
        # The same end again and again is said once.
        ends = groupby(reversed(rows), key=lambda row: (row["outcomes"], row["why"]))
        history = "; ".join(
            f"{_epochs(list(claims))} with {outcomes} outcomes: {why}" for (outcomes, why), claims in ends
        )
        return f"given up after {fruitless} claims in a row without a new outcome: {history}"

    async def renew(self, claim: Claim) -> RenewedLease:
        """Prolong the lease.

        Raises:
            Fenced: another epoch is current, or the job has ended.
        """
        async with exclusively(self.pool, claim.job.job_id) as connection:
            await check_epoch(connection, claim, for_update=True)
            row = await connection.fetchrow(
                """UPDATE jobs SET lease_expires_at = clock_timestamp() + $2 WHERE job_id = $1
                   RETURNING cancel_requested_at, cancel_reason,
                       extract(epoch FROM deadline_at - clock_timestamp())::float8 AS seconds_left""",
                claim.job.job_id,
                timedelta(seconds=self.rules.lease_seconds),
            )
        return _renewed(only_row(row))

    async def watch(self, claim: Claim) -> RenewedLease:
        """What a renewal would tell, without one.

        Raises:
            Fenced: another epoch is current, or the job has ended.
        """
        row = await self.pool.fetchrow(
            """SELECT epoch, status, cancel_requested_at, cancel_reason,
                   extract(epoch FROM deadline_at - clock_timestamp())::float8 AS seconds_left
               FROM jobs WHERE job_id = $1""",
            claim.job.job_id,
        )
        if row is None or row["epoch"] != claim.epoch or row["status"] not in ("STARTING", "RUNNING"):
            raise Fenced(claim.job.job_id, claim.epoch)
        return _renewed(only_row(row))

    async def release(self, claim: Claim, why: str | None) -> None:
        """A hand-over (`why` None) is claimable at once; after a failure the lease lapses later each time."""
        job_id = claim.job.job_id
        reason = storable(why or "handed over", limit=MAX_REASON_CHARS)
        detail = f"will be taken up again: {reason}"
        async with exclusively(self.pool, job_id) as connection:
            row = await check_epoch(connection, claim, for_update=True)
            seconds = 0.0 if why is None else min(2.0 ** row["claims_without_progress"], MAX_BACKOFF_SECONDS)
            await connection.execute(
                """UPDATE jobs SET lease_expires_at = clock_timestamp() + $2, detail = $3,
                       lease_holder = gen_random_uuid() WHERE job_id = $1""",
                job_id,
                timedelta(seconds=seconds),
                detail,
            )
            await record_event(connection, job_id, JobStatus(row["status"]), detail)
            await connection.execute(
                "UPDATE claims SET ended_because = $3, handed_over = $4 WHERE job_id = $1 AND epoch = $2",
                job_id,
                claim.epoch,
                reason,
                why is None,
            )

    # ---------------------------------------------------------------------------- status and result

    async def set_status(self, claim: Claim, status: JobStatus, detail: str | None = None) -> None:
        """Change status or detail; an unchanged status only changes the detail, and is announced with it."""
        job_id = claim.job.job_id
        async with exclusively(self.pool, job_id) as connection:
            row = await check_epoch(connection, claim, for_update=True)
            current = JobStatus(row["status"])
            if (current, row["detail"]) == (status, storable(detail)):
                return  # repeated after a lost answer: announced already
            if current is not status:
                check_transition(job_id, current, status)
            await connection.execute(
                """UPDATE jobs SET status = $2, detail = $3,
                       running_at = CASE WHEN $2 = 'RUNNING' THEN clock_timestamp() ELSE running_at END
                   WHERE job_id = $1""",
                job_id,
                status.value,
                storable(detail),
            )
            await self._announce(connection, job_id, status, detail)

    async def finish(self, claim: Claim, status: JobStatus, build: ResultBuilder) -> EvalResultMessage:
        job_id = claim.job.job_id
        async with exclusively(self.pool, job_id) as connection:
            stored = await self._stored_by(connection, claim)
            if stored is not None:
                return stored
            await check_epoch(connection, claim, for_update=True)
            if status is JobStatus.COMPLETED:
                await _check_ledger_is_full(connection, job_id)
            result = await self._finish_row(
                connection, job_id, status, None, lambda _job, outcomes, planned: build(outcomes, planned)
            )
            await connection.execute(
                "UPDATE claims SET ended_because = 'finished' WHERE job_id = $1 AND epoch = $2",
                job_id,
                claim.epoch,
            )
            return result

    async def _stored_by(self, connection: Connection, claim: Claim) -> EvalResultMessage | None:
        """The result that this very claim stored, where the answer was lost after the commit."""
        text = await connection.fetchval(
            """SELECT r.message FROM results r JOIN jobs j USING (job_id) JOIN claims c USING (job_id)
               WHERE j.job_id = $1 AND j.epoch = $2 AND c.epoch = $2 AND c.ended_because = 'finished'""",
            claim.job.job_id,
            claim.epoch,
        )
        return None if text is None else EvalResultMessage.model_validate_json(text)

    async def finish_unheld(
        self, job_id: int, status: JobStatus, reason: str, build: UnheldResultBuilder
    ) -> bool:
        async with exclusively(self.pool, job_id) as connection:
            row = await connection.fetchrow(SELECT_JOB + " FOR UPDATE", job_id)
            if row is None or JobStatus(row["status"]).is_final or row["lease_is_live"]:
                return False
            await self._finish_row(connection, job_id, status, reason, build)
        return True

    async def _finish_row(
        self,
        connection: Connection,
        job_id: int,
        status: JobStatus,
        reason: str | None,
        build: UnheldResultBuilder,
    ) -> EvalResultMessage:
        """Result, final status and both queue rows, in the caller's transaction under its exclusive lock."""
        row = only_row(await connection.fetchrow(SELECT_JOB + " FOR UPDATE", job_id))
        check_transition(job_id, JobStatus(row["status"]), status)
        ended = {**dict(row), "status": status.value, "error": reason or row["error"]}
        outcomes = await ledger_sql.read_outcomes(connection, job_id)
        planned = await connection.fetchval("SELECT count(*) FROM episodes WHERE job_id = $1", job_id)
        result = build(_job_from_mapping(ended), outcomes, planned)
        error = storable(reason or result.error)
        await connection.execute(
            "INSERT INTO results (job_id, message) VALUES ($1, $2::json)", job_id, result.to_json().decode()
        )
        await connection.execute(
            """UPDATE jobs SET status = $2, detail = $3, error = $3, finished_at = clock_timestamp(),
                   lease_holder = NULL, lease_expires_at = NULL WHERE job_id = $1""",
            job_id,
            status.value,
            error,
        )
        await connection.execute("DELETE FROM episode_parts WHERE job_id = $1", job_id)
        await enqueue_message(connection, QUEUE_RESULT, result)
        await self._announce(connection, job_id, status, error)
        return result

    async def request_cancel(self, job_id: int, reason: str) -> JobStatus | None:
        async with exclusively(self.pool, job_id) as connection:
            row = await connection.fetchrow(
                """UPDATE jobs SET cancel_requested_at = coalesce(cancel_requested_at, clock_timestamp()),
                       cancel_reason = coalesce(cancel_reason, $2)
                   WHERE job_id = $1 AND status IN ('QUEUED', 'STARTING', 'RUNNING') RETURNING status""",
                job_id,
                storable(reason, limit=MAX_REASON_CHARS),
            )
            if row is not None:
                return JobStatus(row["status"])
            status = await connection.fetchval("SELECT status FROM jobs WHERE job_id = $1", job_id)
            return None if status is None else JobStatus(status)

    async def _announce(
        self, connection: Connection, job_id: int, status: JobStatus, detail: str | None
    ) -> None:
        update = JobStatusUpdateMessage(
            job_id=job_id, validator_hotkey=self.rules.validator_hotkey, status=status, detail=detail
        )
        await enqueue_message(connection, QUEUE_STATUS, update)
        await record_event(connection, job_id, status, detail)

    # ----------------------------------------------------------------------------------- containers

    async def register_container(self, claim: Claim, record: ContainerRecord) -> None:
        """Note the container before it is created, as the job's current one."""
        async with exclusively(self.pool, claim.job.job_id) as connection:
            await check_epoch(connection, claim, for_update=True)
            await connection.execute(
                """INSERT INTO containers (container_id, job_id, attempt) VALUES ($1, $2, $3)
                   ON CONFLICT DO NOTHING""",
                record.container_id,
                record.job_id,
                record.attempt,
            )
            await connection.execute(
                "UPDATE jobs SET container_id = $2 WHERE job_id = $1", record.job_id, record.container_id
            )

    async def set_container_handle(self, claim: Claim, container_id: UUID, handle: str) -> None:
        async with exclusively(self.pool, claim.job.job_id) as connection:
            await check_epoch(connection, claim)
            await connection.execute(
                "UPDATE containers SET handle = $2 WHERE container_id = $1", container_id, handle
            )

    async def current_container(self, claim: Claim) -> ContainerRecord | None:
        """The job's container, unless someone has begun to remove it."""
        row = await self.pool.fetchrow(
            """SELECT c.container_id, c.job_id, c.attempt, c.handle, c.removing
               FROM containers c JOIN jobs j ON j.container_id = c.container_id
               WHERE j.job_id = $1 AND NOT c.removing""",
            claim.job.job_id,
        )
        return None if row is None else _container(row)

    async def last_attempt(self, job_id: int) -> int:
        """The number of the job's latest container attempt; 0 where there was none."""
        value = await self.pool.fetchval("SELECT max(attempt) FROM containers WHERE job_id = $1", job_id)
        return int(value or 0)

    async def mark_container_removing(self, claim: Claim, container_id: UUID) -> None:
        """From now on nobody adopts it, and its end is no evidence against the submission."""
        async with exclusively(self.pool, claim.job.job_id) as connection:
            await check_epoch(connection, claim, for_update=True)
            await _mark_removing(connection, container_id)

    async def mark_unclaimed_removing(self, container_id: UUID) -> bool:
        """Mark a container that no unfinished job claims; False where one does. Unknown ones are nobody's."""
        job_id = await self.pool.fetchval(
            "SELECT job_id FROM containers WHERE container_id = $1", container_id
        )
        if job_id is None:
            return True
        async with exclusively(self.pool, job_id) as connection:
            claimed = await connection.fetchval(
                """SELECT EXISTS (SELECT FROM jobs j JOIN containers c ON c.container_id = j.container_id
                       WHERE j.job_id = $1 AND j.container_id = $2 AND NOT c.removing
                         AND j.status IN ('STARTING', 'RUNNING'))""",
                job_id,
                container_id,
            )
            if claimed:
                return False
            await _mark_removing(connection, container_id)
        return True

    async def forget_container(self, container_id: UUID) -> None:
        """Delete the row of a container that is gone."""
        await self.pool.execute("DELETE FROM containers WHERE container_id = $1 AND removing", container_id)


async def _mark_removing(connection: Connection, container_id: UUID) -> None:
    await connection.execute("UPDATE containers SET removing = true WHERE container_id = $1", container_id)
    await connection.execute("UPDATE jobs SET container_id = NULL WHERE container_id = $1", container_id)


async def _check_ledger_is_full(connection: Connection, job_id: int) -> None:
    planned, missing = only_row(
        await connection.fetchrow(
            "SELECT count(*), count(*) FILTER (WHERE NOT finished) FROM episodes WHERE job_id = $1", job_id
        )
    )
    if planned == 0 or missing > 0:
        raise InfrastructureError(
            f"job {job_id} may not be COMPLETED: {missing} of {planned} episodes have no outcome"
        )


def _epochs(claims: Sequence[asyncpg.Record]) -> str:
    first, last = claims[0], claims[-1]
    if first is last:
        return f"epoch {first['epoch']} at {first['claimed_at']:{TIME_FORMAT}}"
    times = f"from {first['claimed_at']:{TIME_FORMAT}} to {last['claimed_at']:{TIME_FORMAT}}"
    return f"epochs {first['epoch']} to {last['epoch']}, {times},"


def _container(row: asyncpg.Record) -> ContainerRecord:
    return ContainerRecord(
        container_id=row["container_id"],
        job_id=row["job_id"],
        attempt=row["attempt"],
        handle=row["handle"],
        removing=row["removing"],
    )


def _renewed(row: asyncpg.Record) -> RenewedLease:
    return RenewedLease(
        cancel_requested=row["cancel_requested_at"] is not None,
        deadline_seconds_left=row["seconds_left"],
        cancel_reason=row["cancel_reason"],
    )


def _job_from_mapping(row: dict[str, Any]) -> Job:
    return job_from_row(row)  # type: ignore[arg-type]  # read by key only
