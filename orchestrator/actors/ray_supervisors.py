"""Supervisors as Ray actors, one detached actor a job, found by its name."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import structlog
from ray.exceptions import RayActorError, RayError

from orchestrator.actors.control_actors import (
    SUPERVISOR_PREFIX,
    JobSupervisorRemote,
    Recipe,
    control_options,
    supervisor_name,
)
from orchestrator.actors.ray_calls import (
    actor_names,
    ask,
    create_actor,
    find_actor,
    kill_actor,
    last_line,
    off_loop,
)
from orchestrator.domain.errors import InfrastructureError
from orchestrator.domain.job_documents import printable
from orchestrator.ports import ClaimRefusal

log = structlog.get_logger(__name__)

# Creating an actor on a busy machine takes seconds; a claim can wait for a lock for a third of a lease.
DECISION_SECONDS = 120.0
ENSURE_TRIES = 3
FIRST_BACKOFF_SECONDS = 0.2
PING_SECONDS = 5.0
# From the kill of a frozen supervisor to a new process that has found its job over and has ended.
RESTART_SECONDS = 60.0
POLL_SECONDS = 0.5
BENCHMARK_CHARS = 100


@dataclass(frozen=True)
class RaySupervisors:
    """`reconciler.Supervisors` on Ray. `benchmark` tells what a job runs, for those who watch actors."""

    recipe: Recipe
    benchmark: Callable[[int], Awaitable[str]]

    async def ensure(self, job_id: int) -> ClaimRefusal | None:
        """Create the supervisor unless it exists, and return what its claim gave.

        Raises:
            InfrastructureError: it could not be created, or could not claim.
        """
        why = ""
        for attempt in range(ENSURE_TRIES):
            supervisor = await off_loop(self._create, job_id, await self._benchmark_of(job_id))
            try:
                decided = await ask(supervisor, "decided", timeout_seconds=DECISION_SECONDS)
                return None if decided is None else ClaimRefusal(decided)
            except TimeoutError:
                why = f"no decision in {DECISION_SECONDS:g} s"
                await self._restart(job_id, supervisor)
            except RayActorError as error:
                # It ended just now (an earlier one with the same name, as a rule), or is being restarted.
                why = last_line(error)
            except RayError as error:
                raise InfrastructureError(f"job {job_id}: {last_line(error)}") from error
            await asyncio.sleep(FIRST_BACKOFF_SECONDS * 2**attempt)
        raise InfrastructureError(f"job {job_id}: its supervisor does not come up: {why}")

    async def revive(self, job_id: int) -> None:
        """Restart a supervisor that does not answer; else make sure that there is one.

        Raises:
            InfrastructureError: as `ensure`.
        """
        existing = await off_loop(find_actor, supervisor_name(job_id), self.recipe.namespace)
        if existing is not None:
            try:
                await ask(existing, "ping", timeout_seconds=PING_SECONDS)
                return
            except TimeoutError:
                await self._restart(job_id, existing)
                return
            except RayError as error:
                log.info("supervisor_is_gone", job_id=job_id, why=last_line(error))
        await self.ensure(job_id)

    async def report_missing(self, job_id: int, container_id: UUID) -> None:
        """Have the supervisor of a job look at its container; it need not be there, nor answer at once.

        Raises:
            InfrastructureError: Ray does not answer.
        """
        existing = await off_loop(find_actor, supervisor_name(job_id), self.recipe.namespace)
        if existing is not None:
            with suppress(TimeoutError, RayError):
                await ask(existing, "report_missing", container_id, timeout_seconds=PING_SECONDS)

    async def jobs(self) -> list[int]:
        """The jobs that have a supervisor now, ascending.

        Raises:
            InfrastructureError: Ray does not answer.
        """
        names = await off_loop(actor_names, self.recipe.namespace, SUPERVISOR_PREFIX)
        return sorted(number_of(name, SUPERVISOR_PREFIX) for name in names)

    async def end(self, job_id: int) -> None:
        """End the supervisor of a job that is over; returns when its name is free.

        Raises:
            InfrastructureError: Ray does not answer.
        """
        existing = await off_loop(find_actor, supervisor_name(job_id), self.recipe.namespace)
        if existing is None:
            return
        with suppress(TimeoutError, RayError):
            await ask(existing, "stop", timeout_seconds=PING_SECONDS)
        if await self._is_gone(job_id, PING_SECONDS):
            return
        # A kill for good frees the name, but leaves a stopped process alive. One with a restart ends it, and
        # the new process finds its job over and ends itself.
        await self._restart(job_id, existing)
        if not await self._is_gone(job_id, RESTART_SECONDS):
            await off_loop(kill_actor, existing, no_restart=True)

    async def _restart(self, job_id: int, supervisor: Any) -> None:
        """Frozen. Killed without `no_restart` Ray starts a new process under the same holder."""
        log.warning("frozen_supervisor_killed", job_id=job_id)
        await off_loop(kill_actor, supervisor, no_restart=False)

    async def _is_gone(self, job_id: int, timeout_seconds: float) -> bool:
        until = time.monotonic() + timeout_seconds
        while await off_loop(find_actor, supervisor_name(job_id), self.recipe.namespace) is not None:
            if time.monotonic() > until:
                return False
            await asyncio.sleep(POLL_SECONDS)
        return True

    async def _benchmark_of(self, job_id: int) -> str:
        try:
            return printable(await self.benchmark(job_id))[:BENCHMARK_CHARS]
        except Exception as error:  # noqa: BLE001 - of the database; a name for people is not worth a job
            log.info("benchmark_not_read", job_id=job_id, why=str(error))
            return ""

    def _create(self, job_id: int, benchmark: str) -> Any:
        options = {
            **control_options(self.recipe.control_resource),
            "name": supervisor_name(job_id),
            "namespace": self.recipe.namespace,
            "lifetime": "detached",
            "get_if_exists": True,
        }
        return create_actor(JobSupervisorRemote, options, self.recipe, job_id, uuid4(), benchmark)


def number_of(name: str, prefix: str) -> int:
    """The number in a name that `actor_names` gave."""
    return int(name.removeprefix(prefix))
