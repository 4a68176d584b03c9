"""The QueueConsumer: takes `add_job` rows while there is capacity, and makes sure that each has a supervisor.

It never claims a job itself: the supervisor does, and the queue row is acknowledged once that is known.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import timedelta

import asyncpg
import structlog
from pgqueuer.adapters.persistence.queries import Queries
from pgqueuer.core.qm import QueueManager
from pgqueuer.domain import models, types
from pgqueuer.domain.errors import RetryRequested

from orchestrator.actors.reconciler import Reconciler, Supervisors
from orchestrator.adapters.postgres.job_store import PostgresJobStore
from orchestrator.adapters.postgres.pool import retrying
from orchestrator.domain.errors import InfrastructureError, InvalidJob
from orchestrator.domain.messages import QUEUE_ADD_JOB, EvalJobMessage
from orchestrator.ports import ClaimRefusal

log = structlog.get_logger(__name__)

# Together how long a picked row waits for another consumer after ours died.
HEARTBEAT_TIMEOUT = timedelta(seconds=10)
DEQUEUE_TIMEOUT = timedelta(seconds=5)
REFUSED_AGAIN_AFTER = timedelta(seconds=1)
CAPACITY_POLL_SECONDS = 0.25
DATABASE_PATIENCE_SECONDS = 20.0
STOP_SECONDS = 20.0


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


class QueueConsumer:
    """Consumes `add_job`, and runs the reconciler beside it."""

    def __init__(
        self,
        pool: asyncpg.Pool[asyncpg.Record],
        store: PostgresJobStore,
        supervisors: Supervisors,
        reconciler: Reconciler,
        *,
        max_concurrent_jobs: int,
        reconcile_interval_seconds: float,
    ) -> None:
        self._store = store
        self._supervisors = supervisors
        self._reconciler = reconciler
        self._max_concurrent_jobs = max_concurrent_jobs
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
        await self._reconciler.reconcile()
        beside = [asyncio.create_task(self._watch_capacity()), asyncio.create_task(self._reconcile())]
        consuming = asyncio.create_task(self._consume())
        try:
            await asyncio.shield(consuming)
        finally:
            self.stop()
            for task in beside:
                task.cancel()
            await asyncio.wait({consuming, *beside}, timeout=STOP_SECONDS)

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
            except InfrastructureError as error:
                log.warning("capacity_unknown", why=str(error))

    async def _reconcile(self) -> None:
        while True:
            await asyncio.sleep(self._reconcile_interval_seconds)
            try:
                await self._reconciler.reconcile()
            except Exception:
                # The next round may succeed, and without rounds nothing is ever repaired.
                log.exception("reconciler_round_failed")

    async def _refresh_capacity(self) -> None:
        held = await retrying(self._store.held_count, deadline_seconds=DATABASE_PATIENCE_SECONDS)
        self._manager.free_slots = self._max_concurrent_jobs - held

    async def _take(self, row: models.Job) -> None:
        """Handle one `add_job` row: returning acknowledges it, raising holds it with the reason."""
        payload = row.payload or b""
        try:
            message = EvalJobMessage.parse(payload)
        except InvalidJob as error:
            if error.job_id is None:
                log.warning("queue_row_held", row=row.id, why=str(error))
                raise
            log.warning("job_invalid", job_id=error.job_id, why=error.reason)
            await self._store.insert_invalid(error.job_id, payload, error.reason)
            return
        try:
            await self._bring_to_supervisor(message)
        except (InfrastructureError, TimeoutError, OSError) as error:
            log.warning("add_job_put_back", job_id=message.job_id, why=str(error))
            raise RetryRequested(REFUSED_AGAIN_AFTER, str(error)) from error

    async def _bring_to_supervisor(self, message: EvalJobMessage) -> None:
        await retrying(
            lambda: self._store.insert(message, enqueue=False), deadline_seconds=DATABASE_PATIENCE_SECONDS
        )
        refusal = await self._supervisors.ensure(message.job_id)
        await self._refresh_capacity()
        if refusal is ClaimRefusal.CAPACITY:
            raise RetryRequested(REFUSED_AGAIN_AFTER, "no capacity")
        log.info("add_job_taken", job_id=message.job_id, claim=refusal.value if refusal else "held")
