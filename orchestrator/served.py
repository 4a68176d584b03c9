"""Keeps the control plane of the newest settings on the cluster that this process belongs to.

What Ray Serve runs in each replica; it asks nothing of Serve itself.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog

from orchestrator.actors.control_plane import (
    control_plane_stands,
    start_control_plane,
    stop_control_plane,
)
from orchestrator.actors.ray_calls import cluster_nodes, off_loop
from orchestrator.adapters.postgres.installation import take_generation
from orchestrator.adapters.postgres.pool import open_pool
from orchestrator.api.access import ApiAccess
from orchestrator.app import ControlPlaneRecipe, fingerprint
from orchestrator.cluster_containers import open_preflight_parts
from orchestrator.domain.errors import InfrastructureError, Superseded, UsageError
from orchestrator.preflight import require_safe
from orchestrator.settings import Settings

log = structlog.get_logger(__name__)

# A deployment says within this time whether it can work; what takes longer goes on behind it.
FIRST_TRY_SECONDS = 90.0
LOOK_EVERY_SECONDS = 15.0
FIRST_BACKOFF_SECONDS = 1.0
LAST_BACKOFF_SECONDS = 30.0
KUBERNETES_VARIABLE = "KUBERNETES_SERVICE_HOST"


@dataclass
class _Keeping:
    """The settings that count, the task that keeps to them, and what it has reached."""

    settings: Settings
    decided: asyncio.Future[None]
    task: asyncio.Task[None] | None = None
    recipe: ControlPlaneRecipe | None = None

    def keeps_to(self, settings: Settings) -> bool:
        return self.settings == settings and self.task is not None and not self.task.done()


class ServedControlPlane:
    """Consumer and sink of the newest settings run while this does, and `access` has their database.

    Several of them, in several replicas, make sure of the same actors.
    """

    def __init__(self, access: ApiAccess) -> None:
        self._access = access
        self._keeping: _Keeping | None = None

    async def apply(self, settings: Settings) -> None:
        """Go on with these settings; the actors of other ones are drained and replaced.

        Returns when they run, or after `FIRST_TRY_SECONDS`: a database that is away is waited for.

        Raises:
            UsageError: these settings can never work here; says why. What ran before is left as it is.
        """
        if self._keeping is not None and self._keeping.keeps_to(settings):
            return
        await check_database(settings)
        await self._end_task()
        keeping = self._keeping = _Keeping(settings, asyncio.get_running_loop().create_future())
        keeping.task = asyncio.create_task(self._keep(keeping))
        await asyncio.wait({keeping.decided}, timeout=FIRST_TRY_SECONDS)
        if keeping.decided.done():
            keeping.decided.result()

    async def close(self, *, drain: bool) -> None:
        """Stop looking after the actors; with `drain` they hand their jobs over, and end."""
        await self._end_task()
        if drain and self._keeping is not None and self._keeping.recipe is not None:
            await stop_control_plane(self._keeping.recipe)

    async def _end_task(self) -> None:
        if self._keeping is not None and self._keeping.task is not None:
            self._keeping.task.cancel()
            await asyncio.wait({self._keeping.task})

    async def _keep(self, keeping: _Keeping) -> None:
        """Until cancelled, or until it is clear that this can never work."""
        pause_seconds = FIRST_BACKOFF_SECONDS
        while True:
            try:
                async with self._running(keeping) as recipe:
                    pause_seconds = FIRST_BACKOFF_SECONDS
                    if not keeping.decided.done():
                        keeping.decided.set_result(None)
                    await self._look_after(recipe)
            except UsageError as error:
                log.error("control_plane_not_started", why=str(error))
                self._access.why_not = str(error)
                if not keeping.decided.done():
                    keeping.decided.set_exception(error)
                    return
            except InfrastructureError as error:
                log.warning("control_plane_waits", why=str(error), next_try_seconds=round(pause_seconds, 1))
                self._access.why_not = "the control plane waits for its database, or for the cluster"
            except Exception:
                log.exception("control_plane_keeper_failed")
            await asyncio.sleep(pause_seconds * random.uniform(0.5, 1.0))  # noqa: S311 - not for secrets
            pause_seconds = min(2 * pause_seconds, LAST_BACKOFF_SECONDS)

    @asynccontextmanager
    async def _running(self, keeping: _Keeping) -> AsyncIterator[ControlPlaneRecipe]:
        """The API on its database for the block, and the actors started."""
        settings = keeping.settings
        async with self._access.serving(settings) as client:
            if keeping.recipe is None or keeping.recipe.database != client.database:
                async with open_pool(
                    client.database, application_name="orchestrator start", max_size=1
                ) as pool:
                    installation = await take_generation(pool, fingerprint(settings))
                if settings.containers == "kubernetes":
                    await require_safe(settings, open_preflight_parts, installation.installation_id)
                keeping.recipe = ControlPlaneRecipe(
                    settings, client.database, installation, actor_log_level=settings.log_level
                )
            await self._start(keeping.recipe)
            yield keeping.recipe

    async def _start(self, recipe: ControlPlaneRecipe) -> None:
        try:
            await start_control_plane(recipe)
            log.info("control_plane_runs", generation=recipe.generation)
        except Superseded as error:
            # As another replica has the newer settings already. It looks after the actors; requests are
            # answered from the same database here.
            log.info("control_plane_is_newer", why=str(error))

    async def _look_after(self, recipe: ControlPlaneRecipe) -> None:
        """Start the actors again where they are not there any more, for ever.

        Ray restarts them where they die; this is for those that somebody killed for good.
        """
        while True:
            await asyncio.sleep(LOOK_EVERY_SECONDS)
            try:
                if not await control_plane_stands(recipe):
                    log.warning("control_plane_is_gone", generation=recipe.generation)
                    await self._start(recipe)
            except (InfrastructureError, UsageError) as error:
                # Requests need the database alone.
                log.warning("control_plane_not_started_again", why=str(error))


async def check_database(settings: Settings) -> None:
    """Return silently if the settings name a database, or this is a machine that may have one of its own.

    Raises:
        UsageError: a cluster needs a database that all its nodes reach.
        InfrastructureError: Ray does not answer.
    """
    if settings.database_url is not None:
        return
    if os.environ.get(KUBERNETES_VARIABLE):
        where = "in Kubernetes"
    elif len([node for node in await off_loop(cluster_nodes) if node["Alive"]]) > 1:
        where = "on a cluster of several nodes"
    else:
        return
    raise UsageError(
        f"no database is named, and {where} there is none to fall back on: set ORCHESTRATOR_DATABASE_URL to "
        "postgresql://USER:PASSWORD@HOST:PORT/DATABASE for all nodes (from a Secret), and run "
        "`orchestrator db migrate` once"
    )
