"""What a request works with: the client of the database, once there is one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

from orchestrator.adapters.postgres.api_tokens import ApiToken, find_token
from orchestrator.adapters.postgres.idempotency import reserve_job_id
from orchestrator.adapters.postgres.installation import consumer_silence_seconds
from orchestrator.adapters.postgres.migrate import SCHEMA_VERSION, read_schema
from orchestrator.api.problems import Problem
from orchestrator.api.schemas import CheckBody, ReadinessBody
from orchestrator.client import AsyncClient
from orchestrator.domain.errors import InfrastructureError, SchemaMismatch
from orchestrator.settings import Settings

# Of a request: whoever sent it waits, and may send it again.
PATIENCE_SECONDS = 3.0
# A consumer goes over all jobs at each interval, and may take this long for it.
LATE_SECONDS = 45.0
API_APPLICATION = "orchestrator api"


class ApiClient(AsyncClient):
    """The client, and what only the API asks."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(
            settings=settings, patience_seconds=PATIENCE_SECONDS, application_name=API_APPLICATION
        )

    async def token(self, secret: str) -> ApiToken | None:
        """The valid token that the secret proves."""
        return await self._ask(lambda now: find_token(now.pool, secret))

    async def reserve_job_id(self, token_id: UUID, key: str, request: bytes, job_id: int) -> int:
        """See `idempotency.reserve_job_id`."""
        return await self._ask(lambda now: reserve_job_id(now.pool, token_id, key, request, job_id))

    async def readiness(self) -> ReadinessBody:
        """Whether a job that is submitted now would run: database, schema, consumer."""
        try:
            schema = await self._ask(lambda now: read_schema(now.pool))
            silence = await self._ask(lambda now: consumer_silence_seconds(now.pool))
        except InfrastructureError:
            return not_ready("the database does not answer")
        checks = [
            CheckBody(name="database", ready=True, detail="answers"),
            CheckBody(
                name="schema",
                ready=schema.works_here,
                detail=f"version {schema.version}"
                if schema.works_here
                else str(SchemaMismatch(schema.version, SCHEMA_VERSION)),
            ),
            self._consumer_check(silence),
        ]
        return ReadinessBody(ready=all(check.ready for check in checks), checks=checks)

    def _consumer_check(self, silence: float | None) -> CheckBody:
        limit = 2 * self.settings.reconcile_interval_seconds + LATE_SECONDS
        if silence is None:
            return CheckBody(name="consumer", ready=False, detail="none has worked on this database yet")
        return CheckBody(
            name="consumer",
            ready=silence <= limit,
            detail=f"went over all jobs {silence:.0f} s ago" + ("" if silence <= limit else ": too long ago"),
        )


class ApiAccess:
    """Gives requests the client of now; 503 while there is none."""

    def __init__(self) -> None:
        self._client: ApiClient | None = None
        self.why_not = "the control plane is starting"

    @asynccontextmanager
    async def serving(self, settings: Settings) -> AsyncIterator[ApiClient]:
        """Serve requests from the database of the settings for the block.

        Raises:
            UsageError: the settings name a database that cannot be used.
            InfrastructureError: it cannot be reached.
        """
        async with ApiClient(settings) as client:
            self._client = client
            try:
                yield client
            finally:
                if self._client is client:  # others may have come meanwhile
                    self._client = None
                    self.why_not = "the control plane is stopping"

    def client(self) -> ApiClient:
        """The client to work with.

        Raises:
            Problem: 503, there is none now.
        """
        if self._client is None:
            raise Problem(503, self.why_not)
        return self._client

    async def readiness(self) -> ReadinessBody:
        """As `ApiClient.readiness`, also while there is none."""
        return not_ready(self.why_not) if self._client is None else await self._client.readiness()


def not_ready(why: str) -> ReadinessBody:
    """There is no database to ask."""
    return ReadinessBody(ready=False, checks=[CheckBody(name="database", ready=False, detail=why)])
