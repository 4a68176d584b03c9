"""The API on a real database, asked as over HTTP; no socket is needed for that."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import httpx
import pytest

from orchestrator.adapters.postgres.api_tokens import Scope, create_token
from orchestrator.adapters.postgres.pool import Database
from orchestrator.api.access import ApiAccess
from orchestrator.api.app import create_api
from orchestrator.settings import Settings

if TYPE_CHECKING:
    import asyncpg

    Pool: TypeAlias = asyncpg.Pool[asyncpg.Record]

JOB = {
    "submission_id": "policy-7",
    "env_provider": "gymnasium",
    "benchmark_name": "CartPole-v1",
    "artifact_url": "https://example.org/policy.tar.gz",
}
MAX_BODY_BYTES = 4096


@dataclass
class Asked:
    """The API, and what its clients use of it."""

    access: ApiAccess
    http: httpx.AsyncClient
    pool: Pool
    secret: str

    async def __call__(self, method: str, path: str, **options: Any) -> httpx.Response:
        """A request with a token that may do everything; `headers` go on top."""
        headers = {"Authorization": f"Bearer {self.secret}"} | options.pop("headers", {})
        return await self.http.request(method, path, headers=headers, **options)

    async def jobs(self) -> int:
        """How many jobs there are in the database."""
        return int(await self.pool.fetchval("SELECT count(*) FROM jobs"))


@pytest.fixture
def http_of() -> Callable[[ApiAccess], httpx.AsyncClient]:
    def make(access: ApiAccess) -> httpx.AsyncClient:
        app = create_api(access, max_body_bytes=MAX_BODY_BYTES)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://api")

    return make


@pytest.fixture
async def asked(
    database: Database, pool: Pool, tmp_path: Path, http_of: Callable[[ApiAccess], httpx.AsyncClient]
) -> AsyncIterator[Asked]:
    access = ApiAccess()
    made = await create_token(pool, "all", {Scope.READ, Scope.WRITE})
    settings = Settings(database_url=database.dsn, data_dir=tmp_path)  # type: ignore[arg-type]
    async with access.serving(settings), http_of(access) as http:
        yield Asked(access, http, pool, made.secret)
