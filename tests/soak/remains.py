"""What is there once all jobs have ended: rows, directories and connections, and how large the tables are."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.adapters.postgres.clients import (
    CONSUMER_APPLICATION,
    CONSUMER_CONNECTIONS,
    SINK_CONNECTIONS,
)
from tests.chaos.clients import Line
from tests.chaos.leftovers import QUERIES, directories_left

QUIET_SECONDS = 60.0
CONNECTIONS = """SELECT application_name, count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND backend_type = 'client backend' GROUP BY 1 ORDER BY 1"""
TABLES = """SELECT c.oid::regclass::text AS relname, pg_total_relation_size(c.oid) AS bytes
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind = 'r' AND n.nspname NOT IN ('pg_catalog', 'information_schema') ORDER BY 2 DESC"""
ALLOWED_CONNECTIONS = {CONSUMER_APPLICATION: CONSUMER_CONNECTIONS, "orchestrator sink": SINK_CONNECTIONS}


@dataclass(frozen=True, slots=True)
class Remains:
    """What should not be there, and figures for people."""

    faults: list[str]
    lines: list[str]


async def remains(line: Line, data: Path, jobs: int) -> Remains:
    """What is left after `QUIET_SECONDS` at the latest; `jobs` have ended."""
    began = time.monotonic()
    while (faults := await _faults(line, data)) and time.monotonic() - began < QUIET_SECONDS:
        await asyncio.sleep(0.5)
    seconds = time.monotonic() - began
    connections = await line.ask(lambda connection: connection.fetch(CONNECTIONS))
    faults += [
        f"{name}: {count} connections, {ALLOWED_CONNECTIONS[name]} allowed"
        for name, count in connections
        if count > ALLOWED_CONNECTIONS.get(name, count)
    ]
    named = ", ".join(f"{name or 'the soak itself'} {count}" for name, count in connections)
    tables = []
    for name, size in await line.ask(lambda connection: connection.fetch(TABLES)):
        rows = await line.ask(
            lambda connection, name=name: connection.fetchval(f"SELECT count(*) FROM {name}")
        )
        tables.append((name, size, rows))
    return Remains(
        faults, [f"quiet after {seconds:.1f} s; connections at the end: {named}", *_sizes(tables, jobs)]
    )


async def _faults(line: Line, data: Path) -> list[str]:
    found = []
    for what, query in QUERIES.items():
        if count := await line.ask(lambda connection, query=query: connection.fetchval(query)):
            found.append(f"{count} {what}")
    return found + [f"directory {path}" for path in await asyncio.to_thread(directories_left, data)]


def _sizes(tables: Sequence[Any], jobs: int) -> list[str]:
    lines = [f"{'table':<28}{'rows':>8}{'KiB':>9}{'KiB a job':>11}"]
    for name, size, rows in tables:
        lines.append(f"{name:<28}{rows:>8}{size / 1024:>9.0f}{size / 1024 / max(jobs, 1):>11.2f}")
    return lines
