"""Real consumers and reconcilers for interleavings; their supervisors claim, and do nothing more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.actors.queue_consumer import QueueConsumer
from orchestrator.adapters.postgres.pool import Database, open_pool
from orchestrator.ports import ClaimRefusal
from tests.job_fixtures import a_store
from tests.stepping import in_session
from tests.unit.actors.control_fakes import FakeSupervisors, a_reconciler

if TYPE_CHECKING:
    from tests.stepping import Stepper


@dataclass
class NewSupervisors(FakeSupervisors):
    """As where Ray has lost every actor: each call makes a new supervisor, which claims."""

    def __post_init__(self) -> None:
        self.answers: list[ClaimRefusal | None] = []

    async def ensure(self, job_id: int) -> ClaimRefusal | None:
        answer = await super().ensure(job_id)
        self.answers.append(answer)
        return answer

    async def revive(self, job_id: int) -> None:
        self.revived.append(job_id)
        await self.ensure(job_id)


@dataclass
class Place:
    """What Ray would tell of a consumer's place."""

    lost: str | None = None

    async def is_over(self) -> str | None:
        return self.lost


@asynccontextmanager
async def a_consumer(
    database: Database, steps: Stepper, session: str, place: Place | None = None
) -> AsyncIterator[tuple[QueueConsumer, NewSupervisors, asyncio.Task[None]]]:
    """A consumer at work in a session of its own, on its own connections."""
    async with open_pool(database, application_name=session, max_size=6) as pool:
        store = a_store(pool)
        supervisors = NewSupervisors(store)
        consumer = QueueConsumer(
            pool,
            store,
            supervisors,
            a_reconciler(pool, store, supervisors=supervisors),
            max_concurrent_jobs=2,
            reconcile_interval_seconds=600.0,
            superseded=(place or Place()).is_over,
        )
        work = in_session(session, consumer.work())
        try:
            yield consumer, supervisors, work
        finally:
            steps.let_go(session)
            consumer.stop()
            await asyncio.wait({work}, timeout=30)
