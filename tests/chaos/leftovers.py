"""What is left of jobs once all of them have their results."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil

from orchestrator.adapters.kubernetes.canaries import is_expired
from tests.chaos.faults import ACTORS
from tests.chaos.world import Installation, World

QUIET_SECONDS = 60.0
POLL_SECONDS = 1.0

QUERIES = {
    "rows of containers": "SELECT count(*) FROM containers",
    "staged parts of episodes": "SELECT count(*) FROM episode_parts",
    "rows of queues": "SELECT count(*) FROM pgqueuer",
    "leases": "SELECT count(*) FROM jobs WHERE lease_holder IS NOT NULL",
    "database sessions of supervisors": """SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND application_name LIKE 'orchestrator job%'""",
    "advisory locks": """SELECT count(*) FROM pg_locks
        WHERE locktype = 'advisory'
          AND database = (SELECT oid FROM pg_database WHERE datname = current_database())""",
    "transactions that stand open": """SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND state LIKE 'idle in transaction%'""",
}


async def leftovers(world: World) -> tuple[list[str], float]:
    """What is there after `QUIET_SECONDS` at the latest, and after how many seconds nothing was any more."""
    began = time.monotonic()
    while (found := await _found(world)) and time.monotonic() - began < QUIET_SECONDS:
        await asyncio.sleep(POLL_SECONDS)
    return found, time.monotonic() - began


async def _found(world: World) -> list[str]:
    found = [*await _on_ray(world), *_in_the_cluster(world)]
    for installation in world.installations:
        found += await _in_the_database(installation)
        left = await asyncio.to_thread(directories_left, installation.directory / "data")
        found += [f"directory {path.relative_to(installation.directory)}" for path in left]
    return found + await asyncio.to_thread(_processes, world)


async def _on_ray(world: World) -> list[str]:
    try:
        actors, groups = await world.cluster.actors(), await world.cluster.placement_groups()
    except TimeoutError:
        return ["the GCS does not answer"]
    of_jobs = (ACTORS["supervisor"], ACTORS["worker"])
    left = [f"actor {actor.kind} {actor.name}" for actor in actors if actor.kind in of_jobs]
    return left + [f"placement group {group}" for group in groups]


def _in_the_cluster(world: World) -> list[str]:
    """Of preflight's canaries, whose command may have been killed, only those that should have expired."""
    found = [
        (plural, key.name, stored)
        for plural in ("pods", "configmaps")
        for key, stored in world.double.store.select(plural, world.double.namespace)
    ]
    return [f"{plural} {name}" for plural, name, stored in found if not _is_live_canary(name, stored)]


def _is_live_canary(name: str, stored: dict[str, Any]) -> bool:
    return name.startswith("canary-") and not is_expired(stored)


async def _in_the_database(installation: Installation) -> list[str]:
    found = []
    for what, query in QUERIES.items():
        count = await installation.line.ask(lambda connection, query=query: connection.fetchval(query))
        if count:
            found.append(f"{installation.name}: {count} {what}")
    return found


def directories_left(data: Path) -> list[Path]:
    """Those of jobs and of containers in a data directory."""
    return [*data.glob("scratch/*/*/*"), *(path for path in data.glob("*/*/*") if _is_container(path))]


def _is_container(path: Path) -> bool:
    with suppress(ValueError):
        UUID(path.name), UUID(path.parent.name)
        return path.is_dir()
    return False


def _processes(world: World) -> list[str]:
    """Shims, submissions and what they started: all work in a directory of the run."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if "submission" in line and (
                str(world.directory) in line or str(world.directory) in process.cwd()
            ):
                found.append(f"process {process.pid}: {line[:120]}")
    return found
