"""Fixtures that start something: one Postgres for the session, a fresh migrated database for each test."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar
from urllib.parse import urlsplit

import hypothesis
import pytest
import structlog
from xdist.scheduler import LoadScopeScheduling

from orchestrator.ray_environment import prepare_ray_environment

prepare_ray_environment()  # before anything imports ray
os.environ.pop("COLUMNS", None)  # a test's own processes set it, as wide as they think a terminal is

from orchestrator.adapters.postgres.embedded import embedded_postgres  # noqa: E402
from orchestrator.adapters.postgres.migrate import migrate  # noqa: E402
from orchestrator.adapters.postgres.pool import Database, open_connection, open_pool  # noqa: E402

if TYPE_CHECKING:
    import asyncpg

    Pool: TypeAlias = asyncpg.Pool[asyncpg.Record]

T = TypeVar("T")

ON_RAY = "tests/end_to_end/"

# A deadline for each example fails on a machine that is busy with something else for a moment.
hypothesis.settings.register_profile(
    "orchestrator", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("orchestrator")

TEMPLATE_DATABASE = "template_orchestrator"


class OneClusterScheduling(LoadScopeScheduling):
    """Two processes: all tests with a Ray cluster in one of them, the others file by file.

    One cluster is enough for two cores, and each file's fixtures are made once.
    """

    def _split_scope(self, nodeid: str) -> str:
        file: str = nodeid.partition("::")[0]
        return ON_RAY if file.startswith(ON_RAY) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneClusterScheduling:
    return OneClusterScheduling(config, log)


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A command that a test runs sets up logging for its process, here the one of all tests."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


def run_in_own_loop(operation: Callable[[], Awaitable[T]]) -> T:
    """Run it in a loop that leaves the one of the tests alone, and ends with it."""

    async def call() -> T:
        return await operation()

    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        return runner.run(call())


async def execute(database: Database, *statements: str) -> None:
    async with open_connection(database.dsn) as connection:
        for statement in statements:
            await connection.execute(statement)


def on_same_server(database: Database, name: str) -> Database:
    return replace(database, dsn=urlsplit(database.dsn)._replace(path=f"/{name}").geturl())


def memory_directory() -> Path | None:
    """A file system in memory where there is a roomy one: a database is then made in no time."""
    shared_memory = Path("/dev/shm")
    if os.access(shared_memory, os.W_OK) and shutil.disk_usage(shared_memory).free > 2 * 2**30:
        return shared_memory
    return None


@pytest.fixture(scope="session")
def server_directory() -> Iterator[Path]:
    """A data directory that the account of the server can reach; gone after the session."""
    parent = Path(tempfile.mkdtemp(prefix="orchestrator-tests-", dir=memory_directory()))
    parent.chmod(0o755)
    try:
        yield parent / "postgres"
    finally:
        shutil.rmtree(parent)


@pytest.fixture(scope="session")
def postgres_server(server_directory: Path) -> Iterator[Database]:
    """One embedded server for the whole session, on its database `orchestrator`, which is empty."""
    # A runner of its own keeps the context open between set-up and tear-down, and leaks no loop into tests.
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        server = embedded_postgres(server_directory)
        database = runner.run(server.__aenter__())
        try:
            yield database
        finally:
            runner.run(server.__aexit__(None, None, None))


@pytest.fixture(scope="session")
def migrated_template(postgres_server: Database) -> Database:
    """A migrated database to copy from; nobody may stay connected to it."""
    template = on_same_server(postgres_server, TEMPLATE_DATABASE)
    run_in_own_loop(lambda: execute(postgres_server, f"CREATE DATABASE {TEMPLATE_DATABASE}"))
    run_in_own_loop(lambda: migrate(template.dsn))
    return template


@contextlib.contextmanager
def temporary_database(server: Database, options: str = "") -> Iterator[Database]:
    """A database of its own name for the block, dropped whoever is still connected."""
    name = f"test_{uuid.uuid4().hex}"
    run_in_own_loop(lambda: execute(server, f"CREATE DATABASE {name} {options}"))
    try:
        yield on_same_server(server, name)
    finally:
        run_in_own_loop(lambda: execute(server, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
def empty_database(postgres_server: Database) -> Iterator[Database]:
    """A fresh database without any table."""
    with temporary_database(postgres_server) as empty:
        yield empty


@contextlib.contextmanager
def installed_database(server: Database) -> Iterator[Database]:
    """A fresh copy of the migrated template for the block."""
    with temporary_database(server, f"TEMPLATE {TEMPLATE_DATABASE}") as fresh:
        # An installation of its own: names of Ray actors and containers of different tests must not meet.
        renew = ("DELETE FROM installation", "INSERT INTO installation DEFAULT VALUES")
        run_in_own_loop(lambda: execute(fresh, *renew))
        yield fresh


@pytest.fixture
def database(postgres_server: Database, migrated_template: Database) -> Iterator[Database]:
    """A fresh, migrated database for one test."""
    with installed_database(postgres_server) as fresh:
        yield fresh


@pytest.fixture
async def pool(database: Database) -> AsyncIterator[Pool]:
    async with open_pool(database, application_name="tests", max_size=10) as pool:
        yield pool
