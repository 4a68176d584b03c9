"""What commands share: how they read their settings, speak to the person, and reach the database."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import asyncpg

from orchestrator.adapters.postgres.clients import COMMAND_CONNECTIONS
from orchestrator.adapters.postgres.pool import Database, open_pool
from orchestrator.client import AsyncClient
from orchestrator.settings import Settings

ReadSettings = Callable[[], Settings]

COMMAND_APPLICATION = "orchestrator cli"


def command_client(settings: Settings) -> AsyncClient:
    """The client that a command works through, open for an `async with` block."""
    return AsyncClient(settings=settings, application_name=COMMAND_APPLICATION)


@asynccontextmanager
async def command_pool(database: Database) -> AsyncIterator[asyncpg.Pool[asyncpg.Record]]:
    """The few connections that a command needs."""
    async with open_pool(
        database, application_name=COMMAND_APPLICATION, max_size=COMMAND_CONNECTIONS
    ) as pool:
        yield pool


def say(text: str) -> None:
    """A line for the person who waits; stdout is for results."""
    print(f"orchestrator: {text}", file=sys.stderr, flush=True)
