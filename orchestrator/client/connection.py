"""A client's connection to one database: the settings, the pool, and questions that outlast a restart."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import asyncpg

from orchestrator.adapters.postgres.job_reports import JobReports
from orchestrator.adapters.postgres.job_store import PostgresJobStore
from orchestrator.adapters.postgres.pool import Database, open_pool, retrying
from orchestrator.domain.errors import InfrastructureError, UnknownJob, UsageError
from orchestrator.ports import Job
from orchestrator.runtime import open_database
from orchestrator.settings import Settings, load_settings
from orchestrator.stores import job_store

T = TypeVar("T")

PATIENCE_SECONDS = 60.0
CONNECTIONS = 4


@dataclass(frozen=True)
class Opened:
    """What a client works with while it is open."""

    stack: AsyncExitStack
    database: Database
    pool: asyncpg.Pool[asyncpg.Record]
    store: PostgresJobStore
    reports: JobReports


class DatabaseClient:
    """Opens the database for an `async with` block; what asks it is below.

    Without a URL the settings decide: `ORCHESTRATOR_DATABASE_URL`, else the embedded database of `data_dir`,
    which is up for as long as somebody uses it.
    """

    def __init__(
        self,
        database_url: str | None = None,
        *,
        data_dir: Path | None = None,
        settings: Settings | None = None,
        patience_seconds: float = PATIENCE_SECONDS,
        application_name: str = "orchestrator client",
    ) -> None:
        if settings is not None and (database_url is not None or data_dir is not None):
            raise UsageError("give the client a database URL or a data directory, or settings that say them")
        self.settings = settings or load_settings(database_url=database_url, data_dir=data_dir)
        self._patience_seconds = patience_seconds
        self._application_name = application_name
        self._opened: Opened | None = None

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            database = await stack.enter_async_context(open_database(self.settings))
            pool = await stack.enter_async_context(
                open_pool(database, application_name=self._application_name, max_size=CONNECTIONS)
            )
            store = job_store(pool, self.settings)
            self._opened = Opened(stack.pop_all(), database, pool, store, JobReports(pool))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        opened, self._opened = self._now, None
        await opened.stack.__aexit__(kind, error, trace)

    @property
    def database(self) -> Database:
        """The database that is open; prints as its place, without secrets."""
        return self._now.database

    @property
    def _now(self) -> Opened:
        if self._opened is None:
            raise UsageError("the client is not open: use it in a `with` or `async with` block")
        return self._opened

    async def _ask(self, operation: Callable[[Opened], Awaitable[T]]) -> T:
        """What the database answers; `operation` is repeated where the answer is lost."""
        opened = self._now
        try:
            return await retrying(lambda: operation(opened), deadline_seconds=self._patience_seconds)
        except asyncpg.PostgresError as error:
            raise InfrastructureError(f"{opened.database} refused: {error}") from error

    async def _job(self, job_id: int) -> Job:
        job = await self._ask(lambda now: now.store.get(job_id))
        if job is None:
            raise self._unknown(job_id)
        return job

    def _unknown(self, job_id: int) -> UnknownJob:
        return UnknownJob(job_id, str(self.database))
