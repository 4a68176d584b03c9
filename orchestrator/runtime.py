"""Brings up what a command needs (database, Ray, control plane), and takes down what it brought up."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import asyncpg

from orchestrator import failpoints
from orchestrator.adapters.postgres.clients import CONSUMER_APPLICATION
from orchestrator.adapters.postgres.embedded import embedded_postgres
from orchestrator.adapters.postgres.installation import (
    Installation,
    current_installation,
    has_client,
    take_generation,
)
from orchestrator.adapters.postgres.migrate import check_schema, migrate
from orchestrator.adapters.postgres.pool import Database, open_pool, retrying
from orchestrator.cluster_containers import open_preflight_parts
from orchestrator.domain.errors import InfrastructureError
from orchestrator.logging import get_logger
from orchestrator.preflight import require_safe
from orchestrator.ray_session import keep_standard_output, make_session_directory, remove_session
from orchestrator.ray_signals import settled
from orchestrator.settings import Settings
from orchestrator.waiting import DaemonThread, uninterrupted

log = get_logger()

RAY_ADDRESS_SECONDS = 10.0
RAY_START_SECONDS = 180.0
RAY_STOP_SECONDS = 60.0
DATABASE_PATIENCE_SECONDS = 60.0
LOOK_EVERY_SECONDS = 3.0
GONE_SECONDS = 45.0


@asynccontextmanager
async def open_database(settings: Settings) -> AsyncIterator[Database]:
    """The database of the settings, or the embedded one, for the block.

    The embedded one is migrated; another one has to be migrated by its operator.

    Raises:
        SchemaMismatch: the given database needs `orchestrator db migrate`, or a newer orchestrator.
        InfrastructureError: it cannot be reached or started.
    """
    if settings.database_url is not None:
        database = Database(settings.database_url.get_secret_value())
        async with open_pool(database, application_name="orchestrator check", max_size=1) as pool:
            await check_schema(pool)
        yield database
        return
    async with embedded_postgres(settings.data_dir) as database:
        await migrate(database.dsn)
        yield database


@asynccontextmanager
async def joined_or_local_ray(cpus: int) -> AsyncIterator[bool]:
    """The cluster of `RAY_ADDRESS`, or a local one of `cpus` CPUs, for the block; yields whether it is ours.

    Raises:
        InfrastructureError: it could not be reached or started in time.
    """
    address = os.environ.get("RAY_ADDRESS")
    if address:
        await _check_address(address)
        # Actors of a cluster that runs already have its variables, not ours.
        options = {"runtime_env": {"env_vars": failpoints.inherited()}} if failpoints.inherited() else {}
        async with _ray(
            lambda ray: ray.init(address=address, log_to_driver=False, logging_level="ERROR", **options)
        ):
            yield False
        return
    directory = make_session_directory()
    try:
        async with _ray(
            lambda ray: ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",  # it warns of not running in the main thread
                _node_ip_address="127.0.0.1",
                _temp_dir=str(directory),
            ),
            lambda: remove_session(directory),
        ):
            yield True
    finally:
        await uninterrupted(asyncio.to_thread(remove_session, directory))


async def _check_address(address: str) -> None:
    """Return silently if somebody listens there: `ray.init` would try for ever, and say so in its own words.

    Raises:
        InfrastructureError: nobody does.
    """
    place = re.fullmatch(r"(?:ray://)?(\[[^\]]+\]|[^:/]+):(\d+)", address)
    if place is None:  # such as "auto": Ray knows where to look
        return
    try:
        async with asyncio.timeout(RAY_ADDRESS_SECONDS):
            _, writer = await asyncio.open_connection(place[1].strip("[]"), int(place[2]))
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error) or f"no answer in {RAY_ADDRESS_SECONDS:g} s"
        raise InfrastructureError(f"no Ray cluster can be reached at RAY_ADDRESS={address}: {why}") from error
    writer.close()


@asynccontextmanager
async def _ray(init: Callable[[Any], Any], clear: Callable[[], None] | None = None) -> AsyncIterator[None]:
    """Ray for the block. `clear` removes what a start left; None where nothing is started, but joined."""
    given_up = threading.Event()
    thread = DaemonThread()  # Ray's processes end with the thread that started them
    starting = thread.call(partial(_init_twice, init, clear or (lambda: None), given_up))
    starting.add_done_callback(lambda start: start.cancelled() or start.exception())  # seen, if nobody waits
    try:
        if not await settled(starting, RAY_START_SECONDS):
            given_up.set()
            raise InfrastructureError(f"Ray was not up within {RAY_START_SECONDS:g} s")
        starting.result()
    except asyncio.CancelledError:
        given_up.set()
        if clear is not None:  # `ray.init` cannot be interrupted, and its processes must not outlive us
            await uninterrupted(settled(starting, RAY_START_SECONDS))
        if starting.done():
            await uninterrupted(_shut_down(thread))
        raise
    try:
        yield
    finally:
        await uninterrupted(_shut_down(thread))


def _init_twice(init: Callable[[Any], Any], clear: Callable[[], None], given_up: threading.Event) -> None:
    """`ray.init`, once more if it fails: its fixed waits are too short for a busy machine.

    What comes up once nobody waits for it any more is taken down here.
    """
    import ray

    keep_standard_output()
    for attempt in (1, 2):
        try:
            init(ray)
            if given_up.is_set():
                raise InfrastructureError("up, but too late")
            return
        except Exception as error:
            # Ray raises bare `Exception` where a start takes too long.
            ray.shutdown()
            clear()
            if attempt == 2 or given_up.is_set():
                raise InfrastructureError(f"Ray does not start or cannot be reached: {error}") from error
            log.warning("ray_not_up", why=str(error), next="tries once more")


async def _shut_down(thread: DaemonThread) -> None:
    import ray

    stopping = thread.call(ray.shutdown)
    thread.end()
    if await settled(stopping, RAY_STOP_SECONDS):
        stopping.result()
    else:
        log.warning("ray_still_stopping", seconds=RAY_STOP_SECONDS)


@dataclass(frozen=True)
class ControlPlane:
    """A control plane that works on `database`; `ours` if this process brought it up."""

    database: Database
    installation: Installation
    ours: bool


@asynccontextmanager
async def control_plane(settings: Settings, database: Database, *, cpus: int) -> AsyncIterator[ControlPlane]:
    """Consumer and sink of this code on Ray for the block; stopped afterwards where we started them."""
    from orchestrator.actors.control_plane import start_control_plane, stop_control_plane
    from orchestrator.app import ControlPlaneRecipe, fingerprint, remove_leftovers

    async with open_pool(database, application_name="orchestrator start", max_size=1) as pool:
        installation = await take_generation(pool, fingerprint(settings))
    if settings.containers == "kubernetes":
        await require_safe(settings, open_preflight_parts, installation.installation_id)
    recipe = ControlPlaneRecipe(settings, database, installation, actor_log_level=settings.log_level)
    ray_is_ours = False
    try:
        async with joined_or_local_ray(cpus) as ray_is_ours:
            try:
                await start_control_plane(recipe)
                yield ControlPlane(database, installation, ours=ray_is_ours)
            finally:
                await uninterrupted(stop_control_plane(recipe))
    finally:
        if ray_is_ours:
            await uninterrupted(remove_leftovers(settings, installation))


async def stop_what_runs(settings: Settings, database: Database) -> bool:
    """Stop this database's control plane on the cluster of `RAY_ADDRESS`; False where none ran.

    Raises:
        InfrastructureError: the cluster cannot be reached.
    """
    from orchestrator.actors.control_plane import newest_generation, stop_control_plane
    from orchestrator.app import ControlPlaneRecipe

    async with open_pool(database, application_name="orchestrator stop", max_size=1) as pool:
        installation = await current_installation(pool)
    recipe = ControlPlaneRecipe(settings, database, installation, actor_log_level=settings.log_level)
    async with joined_or_local_ray(0):
        if await newest_generation(recipe) < 0:
            return False
        await stop_control_plane(recipe)
    return True


async def is_live(pool: asyncpg.Pool[asyncpg.Record]) -> bool:
    """Whether a consumer works on this database now."""
    return await retrying(
        lambda: has_client(pool, CONSUMER_APPLICATION),
        deadline_seconds=DATABASE_PATIENCE_SECONDS,
        what="looking for a control plane",
    )


class Liveness:
    """Tells whether a control plane has worked lately; a restart of its consumer is no reason to give up.

    It works while a consumer is connected to the database and, where this process belongs to its cluster, a
    node lives: actors outlast their node's manager, but nothing can be started any more.
    """

    def __init__(self, pool: asyncpg.Pool[asyncpg.Record]) -> None:
        self._pool = pool
        self._looked_at = self._seen_at = time.monotonic()

    async def is_gone(self) -> bool:
        """Whether none was seen for `GONE_SECONDS`; asks the database and Ray every now and then only."""
        now = time.monotonic()
        if now - self._looked_at >= LOOK_EVERY_SECONDS:
            self._looked_at = now
            if await is_live(self._pool) and await _some_node_lives():
                self._seen_at = time.monotonic()
        return time.monotonic() - self._seen_at > GONE_SECONDS


async def _some_node_lives() -> bool:
    """Whether this process's Ray cluster has a living node; True where it belongs to none."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return True
    from orchestrator.actors.ray_calls import cluster_nodes, off_loop

    try:
        nodes = await off_loop(cluster_nodes)
    except InfrastructureError as error:
        log.warning("cluster_does_not_answer", why=str(error))
        return False
    return any(node["Alive"] for node in nodes)
