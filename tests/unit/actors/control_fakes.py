"""Stand-ins for what consumer and reconciler act on outside of Postgres: supervisors and containers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from orchestrator.actors.queue_consumer import QueueConsumer
from orchestrator.actors.reconciler import Reconciler
from orchestrator.adapters.postgres.job_store import PostgresJobStore
from orchestrator.adapters.postgres.reconciliation import ReconciliationQueries
from orchestrator.adapters.postgres.retention import Retention, RetentionRules
from orchestrator.ports import Claim, ClaimRefusal, OwnedContainer

if TYPE_CHECKING:
    from tests.conftest import Pool

INSTALLATION = UUID(int=1)


@dataclass
class FakeSupervisors:
    """Supervisors that claim, and do nothing else. `troubles` are raised, or awaited, for their job."""

    store: PostgresJobStore
    troubles: dict[int, Exception | asyncio.Event] = field(default_factory=dict)
    ensured: list[int] = field(default_factory=list)
    revived: list[int] = field(default_factory=list)
    present: list[int] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    claims: dict[int, Claim] = field(default_factory=dict)
    told_missing: list[tuple[int, UUID]] = field(default_factory=list)

    async def ensure(self, job_id: int) -> ClaimRefusal | None:
        self.ensured.append(job_id)
        await self._trouble(job_id)
        claim = await self.store.claim(job_id, uuid4())
        if isinstance(claim, ClaimRefusal):
            return claim
        self.claims[job_id] = claim
        return None

    async def revive(self, job_id: int) -> None:
        self.revived.append(job_id)
        await self._trouble(job_id)

    async def report_missing(self, job_id: int, container_id: UUID) -> None:
        self.told_missing.append((job_id, container_id))

    async def jobs(self) -> list[int]:
        return self.present

    async def end(self, job_id: int) -> None:
        await self._trouble(job_id)
        self.ended.append(job_id)
        self.present.remove(job_id)

    async def _trouble(self, job_id: int) -> None:
        trouble = self.troubles.get(job_id)
        if isinstance(trouble, Exception):
            raise trouble
        if trouble is not None:
            await trouble.wait()


@dataclass
class FakeContainers:
    """Containers of which only the names exist."""

    owned: dict[UUID, OwnedContainer] = field(default_factory=dict)
    troubles: dict[UUID, Exception | asyncio.Event] = field(default_factory=dict)

    def add(self, container_id: UUID | None = None, *, expired: bool = False) -> UUID:
        container_id = container_id or uuid4()
        self.owned[container_id] = OwnedContainer(container_id, str(container_id), None, expired)
        return container_id

    async def list_owned(self, installation_id: UUID) -> list[OwnedContainer]:
        assert installation_id == INSTALLATION
        return list(self.owned.values())

    async def remove(self, handle: str) -> None:
        trouble = self.troubles.get(UUID(handle))
        if isinstance(trouble, Exception):
            raise trouble
        if trouble is not None:
            await trouble.wait()
        del self.owned[UUID(handle)]


def a_reconciler(pool: Pool, store: PostgresJobStore, **parts: Any) -> Reconciler:
    """A reconciler with fakes outside of the database; `parts` replace its fields."""
    fields: dict[str, Any] = {
        "store": store,
        "queries": ReconciliationQueries(pool),
        "supervisors": FakeSupervisors(store),
        "containers": FakeContainers(),
        "installation_id": INSTALLATION,
        "max_concurrent_jobs": store.rules.max_concurrent_jobs,
        "retention": Retention(pool),
        "retention_rules": RetentionRules(age_seconds=3600.0, rows_per_queue=1000),
        "unheld_result": store.failed_result,
        "patience_seconds": 20.0,  # it waits so long only for what hangs
        "client_grace_seconds": 0.0,
    }
    return Reconciler(**fields | parts)


@asynccontextmanager
async def consuming(
    pool: Pool, store: PostgresJobStore, supervisors: FakeSupervisors, *, max_concurrent_jobs: int = 2
) -> AsyncIterator[QueueConsumer]:
    """A consumer at work for the block."""
    reconciler = a_reconciler(pool, store, supervisors=supervisors)
    consumer = QueueConsumer(
        pool,
        store,
        supervisors,
        reconciler,
        max_concurrent_jobs=max_concurrent_jobs,
        reconcile_interval_seconds=60.0,
    )
    work = asyncio.create_task(consumer.work())
    try:
        yield consumer
    finally:
        consumer.stop()
        await asyncio.wait_for(work, 20)


async def eventually(condition: Callable[[], Awaitable[bool]], seconds: float = 20.0) -> None:
    """Return once the condition, which only another process of the loop or the database decides, holds."""
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.02)
