"""Supervisors as Ray actors, one detached actor a job, found by its name; and how Ray is called for them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from uuid import UUID, uuid4

import ray
import structlog
from ray.exceptions import RayActorError, RayError

from orchestrator.actors.control_actors import (
    SUPERVISOR_PREFIX,
    JobSupervisorRemote,
    Recipe,
    control_options,
    supervisor_name,
)
from orchestrator.domain.errors import InfrastructureError
from orchestrator.ports import ClaimRefusal
from orchestrator.waiting import on_a_thread

log = structlog.get_logger(__name__)

T = TypeVar("T")

# Creating an actor on a busy machine takes seconds; a claim can wait for a lock for a third of a lease.
DECISION_SECONDS = 120.0
ENSURE_TRIES = 3
FIRST_BACKOFF_SECONDS = 0.2
PING_SECONDS = 5.0
RAY_CALL_SECONDS = 30.0
# From the kill of a frozen supervisor to a new process that has found its job over and has ended.
RESTART_SECONDS = 60.0
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class RaySupervisors:
    """`reconciler.Supervisors` on Ray."""

    recipe: Recipe

    async def ensure(self, job_id: int) -> ClaimRefusal | None:
        """Create the supervisor unless it exists, and return what its claim gave.

        Raises:
            InfrastructureError: it could not be created, or could not claim.
        """
        why = ""
        for attempt in range(ENSURE_TRIES):
            supervisor = await off_loop(self._create, job_id)
            try:
                decided = await answer_of(supervisor.decided.remote(), DECISION_SECONDS)
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
                await answer_of(existing.ping.remote(), PING_SECONDS)
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
                await answer_of(existing.report_missing.remote(container_id), PING_SECONDS)

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
            await answer_of(existing.stop.remote(), PING_SECONDS)
        if await self._is_gone(job_id, PING_SECONDS):
            return
        # A kill for good frees the name, but leaves a stopped process alive. One with a restart ends it, and
        # the new process finds its job over and ends itself.
        await self._restart(job_id, existing)
        if not await self._is_gone(job_id, RESTART_SECONDS):
            await off_loop(ray.kill, existing, no_restart=True)

    async def _restart(self, job_id: int, supervisor: Any) -> None:
        """Frozen. Killed without `no_restart` Ray starts a new process under the same holder."""
        log.warning("frozen_supervisor_killed", job_id=job_id)
        await off_loop(ray.kill, supervisor, no_restart=False)

    async def _is_gone(self, job_id: int, timeout_seconds: float) -> bool:
        until = time.monotonic() + timeout_seconds
        while await off_loop(find_actor, supervisor_name(job_id), self.recipe.namespace) is not None:
            if time.monotonic() > until:
                return False
            await asyncio.sleep(POLL_SECONDS)
        return True

    def _create(self, job_id: int) -> Any:
        return JobSupervisorRemote.options(
            **control_options(self.recipe.control_resource),
            name=supervisor_name(job_id),
            namespace=self.recipe.namespace,
            lifetime="detached",
            get_if_exists=True,
        ).remote(self.recipe, job_id, uuid4())


async def off_loop(call: Callable[..., T], *args: Any, **options: Any) -> T:
    """What a blocking call of Ray returns, made on a thread that the end of the program does not wait for.

    A call on a cluster that dies meanwhile may never return.

    Raises:
        InfrastructureError: Ray gives no answer in time, or an error.
    """
    name = getattr(call, "__name__", "a call")
    try:
        async with asyncio.timeout(RAY_CALL_SECONDS):
            return await on_a_thread(partial(call, *args, **options))
    except TimeoutError as error:
        raise InfrastructureError(f"Ray does not answer ({name})") from error
    except Exception as error:
        # Ray raises RayError, RuntimeError, OSError and bare Exception where the cluster is away.
        raise InfrastructureError(f"Ray failed ({name}): {last_line(error)}") from error


async def answer_of(reference: Any, timeout_seconds: float | None) -> Any:
    """What an actor answers within the time; None waits for ever.

    Raises:
        TimeoutError: it does not.
        RayError: it is lost, or answers with an error.
    """
    # Not `wait_for`, which in Python 3.11 forgets a cancellation where the answer has just come.
    async with asyncio.timeout(timeout_seconds):
        return await reference


def find_actor(name: str, namespace: str) -> Any:
    """The actor of that name, or None. Blocking."""
    try:
        return ray.get_actor(name, namespace)
    except ValueError:
        return None


def actor_names(namespace: str, prefix: str) -> list[str]:
    """The names of the actors that are called `prefix` and a number. Blocking."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return sorted(
        actor["name"]
        for actor in named
        if actor["namespace"] == namespace
        and actor["name"].startswith(prefix)
        and actor["name"].removeprefix(prefix).isdecimal()
    )


def number_of(name: str, prefix: str) -> int:
    """The number in a name that `actor_names` gave."""
    return int(name.removeprefix(prefix))


def last_line(error: BaseException) -> str:
    """The last line that says something: Ray puts the remote traceback before the message."""
    lines = (line for line in reversed(str(error).splitlines()) if line.strip())
    return next(lines, type(error).__name__)
