"""The QueueConsumer: takes `add_job` rows while there is capacity, and makes sure that each has a supervisor.

It never claims a job itself: the supervisor does, and the queue row is acknowledged once that is known.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import timedelta

import asyncpg
import structlog
from pgqueuer.adapters.persistence.queries import Queries
from pgqueuer.core import buffers, executors
from pgqueuer.core.qm import QueueManager
from pgqueuer.domain import models, types
from pgqueuer.domain.errors import RetryRequested

from orchestrator.actors.reconciler import FORESEEN, Reconciler, Supervisors
from orchestrator.adapters.postgres.job_store import PostgresJobStore
from orchestrator.adapters.postgres.pool import retrying
from orchestrator.domain.errors import InfrastructureError, InvalidJob, UsageError
from orchestrator.domain.job_documents import printable
from orchestrator.domain.messages import QUEUE_ADD_JOB, EvalJobMessage
from orchestrator.ports import ClaimRefusal

log = structlog.get_logger(__name__)

# Together how long a picked row waits for another consumer after ours died.
HEARTBEAT_TIMEOUT = timedelta(seconds=10)
DEQUEUE_TIMEOUT = timedelta(seconds=5)
REFUSED_AGAIN_AFTER = timedelta(seconds=1)
LONGEST_BACKOFF = timedelta(seconds=30)
CAPACITY_POLL_SECONDS = 0.25
FAILED_AGAIN_SECONDS = 2.0
DATABASE_PATIENCE_SECONDS = 20.0
STOP_SECONDS = 20.0
MAX_REASON_CHARS = 2000


class RowHeld(UsageError):
    """No supervisor can ever be found for this row: it stays in the queue as failed, with the reason."""


class PlaceLost(InfrastructureError):
    """Another consumer has this one's place: it takes nothing more, and ends."""


@dataclass
class BoundedQueueManager(QueueManager):
    """pgqueuer's manager with backpressure: it dequeues nothing while `free_slots` is used up.

    pgqueuer dispatches without awaiting its handlers, so those in flight count against capacity.
    """

    free_slots: int = field(default=0, init=False)

    def entrypoints_below_capacity_limits(self) -> set[types.QueueEntrypoint]:
        if len(self.job_context) >= self.free_slots:
            return set()
        return super().entrypoints_below_capacity_limits()

    async def log_failure(
        self,
        job: models.Job,
        executor: executors.AbstractEntrypointExecutor,
        exc: Exception,
        jbuff: buffers.JobStatusLogBuffer,
    ) -> None:
        """Hold the row only for a fault of its own.

        Everything else is ours, such as a retry that could not be written: the row stays picked, and is taken
        again when its heartbeat is old.
        """
        if isinstance(exc, RowHeld):
            await super().log_failure(job, executor, exc, jbuff)
        else:
            log.error("add_job_left_picked", row=job.id, exc_info=exc)


async def _by_nobody() -> str | None:
    return None


class QueueConsumer:
    """Consumes `add_job`, and runs the reconciler beside it.

    `superseded` says why another consumer has this one's place now, or None. It is asked before each row and
    each round: after a standstill nothing is begun for jobs that others look after.
    """

    def __init__(
        self,
        pool: asyncpg.Pool[asyncpg.Record],
        store: PostgresJobStore,
        supervisors: Supervisors,
        reconciler: Reconciler,
        *,
        max_concurrent_jobs: int,
        reconcile_interval_seconds: float,
        superseded: Callable[[], Awaitable[str | None]] = _by_nobody,
    ) -> None:
        self._store = store
        self._superseded = superseded
        self._supervisors = supervisors
        self._reconciler = reconciler
        self._max_concurrent_jobs = max_concurrent_jobs
        self._capacity_asked = self._capacity_known = 0
        self._reconcile_interval_seconds = reconcile_interval_seconds
        self._manager = BoundedQueueManager(Queries.from_asyncpg_pool(pool))
        self._manager.entrypoint(QUEUE_ADD_JOB, on_failure="hold")(self._take)
        # With a backlog and no capacity pgqueuer polls this often.
        self._manager.min_dequeue_poll_interval = timedelta(seconds=CAPACITY_POLL_SECONDS)

    async def work(self) -> None:
        """Consume until `stop`; what ends the queue manager is raised, to start anew with fresh connections.

        The queue manager is never cancelled: pgqueuer deletes the rows of cancelled handlers.
        """
        await self._refresh_capacity()
        beside = [asyncio.create_task(self._watch_capacity()), asyncio.create_task(self._reconcile())]
        consuming = asyncio.create_task(self._consume())
        try:
            await asyncio.shield(consuming)
        finally:
            self.stop()
            for task in beside:
                task.cancel()
            await asyncio.wait({consuming, *beside}, timeout=STOP_SECONDS)
            await self._reconciler.close()

    def stop(self) -> None:
        """Take no more rows; `work` returns when the handlers in flight are done."""
        self._manager.shutdown.set()

    async def _consume(self) -> None:
        await self._manager.run(
            dequeue_timeout=DEQUEUE_TIMEOUT,
            batch_size=1,
            heartbeat_timeout=HEARTBEAT_TIMEOUT,
            log_aggregation_interval=timedelta(0),
            shutdown_on_listener_failure=True,
        )
        if not self._manager.shutdown.is_set():
            raise InfrastructureError("the queue manager ended by itself")

    async def _watch_capacity(self) -> None:
        while True:
            await asyncio.sleep(CAPACITY_POLL_SECONDS)
            try:
                await self._refresh_capacity()
            except Exception:
                # Without a watcher the capacity of this moment would hold for ever.
                log.exception("capacity_unknown")
                await asyncio.sleep(FAILED_AGAIN_SECONDS)

    async def _reconcile(self) -> None:
        """Rounds for as long as the consumer works; the first at once, for what was killed with the last."""
        while True:
            try:
                await self._require_place()
                await self._reconciler.reconcile()
            except PlaceLost as error:
                log.warning("consumer_is_superseded", why=str(error))
                self.stop()
            except Exception:
                # The next round may succeed, and without rounds nothing is ever repaired.
                log.exception("reconciler_round_failed")
            await asyncio.sleep(self._reconcile_interval_seconds)

    async def _refresh_capacity(self) -> None:
        self._capacity_asked += 1
        asked = self._capacity_asked
        held = await retrying(self._store.held_count, deadline_seconds=DATABASE_PATIENCE_SECONDS)
        # Answers overtake each other, and an older one may not know of the job that was claimed in between:
        # the next row would be taken for a place that is not there, and be overtaken while it is put back.
        if asked > self._capacity_known:
            self._capacity_known = asked
            self._manager.free_slots = self._max_concurrent_jobs - held

    async def _take(self, row: models.Job) -> None:
        """Handle one `add_job` row; returning acknowledges it.

        pgqueuer stores the text of what is raised, with all that it was raised from, in a JSONB column, and
        tries again for ever, together with all later acknowledgements, where Postgres refuses it. So only
        fresh errors with clean text go there.

        Raises:
            RowHeld: the row itself is at fault.
            PlaceLost: it is not ours to take; nothing is written of it.
            RetryRequested: we are, or there is no capacity; it is taken again after the delay.
        """
        try:
            refusal = await self._bring_to_supervisor(row)
        except RowHeld as error:
            log.warning("add_job_held", row=row.id, why=str(error))
            failure: Exception = RowHeld(_clean(error))
        except PlaceLost as error:
            log.warning("consumer_is_superseded", why=str(error))
            self.stop()
            failure = PlaceLost(_clean(error))  # the row stays picked, for the other one to take
        except Exception as error:
            delay = min(REFUSED_AGAIN_AFTER * 2 ** min(row.attempts, 10), LONGEST_BACKOFF)
            log.warning(
                "add_job_put_back",
                row=row.id,
                again_in_seconds=delay.total_seconds(),
                why=_clean(error),
                exc_info=not isinstance(error, FORESEEN),
            )
            failure = RetryRequested(delay, _clean(error))
        else:
            if refusal is not ClaimRefusal.CAPACITY:
                return
            failure = RetryRequested(REFUSED_AGAIN_AFTER, "no capacity")
        raise failure

    async def _bring_to_supervisor(self, row: models.Job) -> ClaimRefusal | None:
        """What the claim of the row's job gave; None if a supervisor holds it now."""
        await self._require_place()
        job_id = await self._enter(row.payload or b"")
        if job_id is None:
            return ClaimRefusal.FINAL
        refusal = await self._supervisors.ensure(job_id)
        await self._refresh_capacity()
        log.info("add_job_taken", job_id=job_id, claim=refusal.value if refusal else "held")
        return refusal

    async def _require_place(self) -> None:
        """
        Raises:
            PlaceLost: another consumer looks after the queue now.
        """
        why = await self._superseded()
        if why is not None:
            raise PlaceLost(why)

    async def _enter(self, payload: bytes) -> int | None:
        """The job of the payload, which is in `jobs` from now on; None if it is invalid, and FAILED.

        Raises:
            RowHeld: the payload names no job, or one that exists with other content.
        """
        try:
            message = EvalJobMessage.parse(payload)
        except InvalidJob as error:
            if error.job_id is None:
                raise RowHeld(error.reason) from error
            reason = f"{error.reason}. Send it corrected, under another job_id"
            await self._enter_invalid(error.job_id, payload, reason)
            return None
        await _hold_if_refused(lambda: self._store.insert(message, enqueue=False))
        return message.job_id

    async def _enter_invalid(self, job_id: int, payload: bytes, reason: str) -> None:
        log.warning("job_invalid", job_id=job_id, why=reason)
        await _hold_if_refused(lambda: self._store.insert_invalid(job_id, payload, reason))


async def _hold_if_refused(insert: Callable[[], Awaitable[bool]]) -> None:
    """Insert the job of a row.

    Raises:
        RowHeld: another job has its id.
    """
    try:
        await retrying(insert, deadline_seconds=DATABASE_PATIENCE_SECONDS)
    except UsageError as error:
        raise RowHeld(str(error)) from error


def _clean(error: Exception) -> str:
    return printable(str(error) or type(error).__name__)[:MAX_REASON_CHARS]
