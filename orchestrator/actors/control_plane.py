"""The control plane as a whole: one consumer and one sink of the highest generation, and all supervisors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import structlog
from ray.exceptions import RayActorError, RayError

from orchestrator.actors.control_actors import (
    SINK_PREFIX,
    SUPERVISOR_PREFIX,
    QueueConsumerRemote,
    Recipe,
    ResultSinkRemote,
    consumer_name,
    control_options,
    sink_name,
    supervisor_name,
)
from orchestrator.actors.ray_calls import (
    actor_names,
    ask,
    cluster_resources,
    create_actor,
    find_actor,
    kill_actor,
    last_line,
    off_loop,
)
from orchestrator.actors.ray_supervisors import DECISION_SECONDS, PING_SECONDS, RaySupervisors, number_of
from orchestrator.actors.tenure import CONSUMER_PREFIX
from orchestrator.domain.errors import InfrastructureError, Superseded, UsageError

__all__ = [
    "RaySupervisors",
    "Recipe",
    "consumer_name",
    "sink_name",
    "start_control_plane",
    "stop_control_plane",
    "supervisor_name",
]

log = structlog.get_logger(__name__)

START_TRIES = 3
START_PAUSE_SECONDS = 1.0
# Two tries to connect, and the pause between them.
READY_SECONDS = 25.0
# Together about half a minute, with the usual drain: who waits for the end of a command has no more patience.
STOP_CONSUMERS_SECONDS = 10.0
LET_GO_SECONDS = 5.0  # of a supervisor, once its episodes have ended or been cut short
STOP_SINKS_SECONDS = 5.0


async def start_control_plane(recipe: Recipe) -> None:
    """Make sure that sink and consumer of this recipe run, and reach the database; older ones are stopped.

    Supervisors of another recipe are stopped too, for they send to another sink: the new consumer goes on
    with their jobs.

    Raises:
        Superseded: a newer generation runs already.
        UsageError: no node of the cluster has the control resource.
        InfrastructureError: Ray, or a database that its actors can reach, is not there.
    """
    await _check_control_resource(recipe)
    await _refuse_to_go_back(recipe)
    await _start(ResultSinkRemote, sink_name(recipe.generation), recipe)
    await _stop_all(
        recipe, await _lower(recipe, CONSUMER_PREFIX, recipe.generation - 1), STOP_CONSUMERS_SECONDS
    )
    await _drain(recipe, await _supervisors_of_others(recipe))
    await _start(QueueConsumerRemote, consumer_name(recipe.generation), recipe)
    await _stop_all(recipe, await _lower(recipe, SINK_PREFIX, recipe.generation - 1), STOP_SINKS_SECONDS)


async def stop_control_plane(recipe: Recipe) -> None:
    """Stop consumers first, then supervisors (their jobs stay claimable), then sinks; what is late is killed.

    Nothing of a newer generation is touched.
    """
    generation = recipe.generation
    try:
        await _stop_all(recipe, await _lower(recipe, CONSUMER_PREFIX, generation), STOP_CONSUMERS_SECONDS)
        if await newest_generation(recipe) <= generation:
            supervisors = await off_loop(actor_names, recipe.namespace, SUPERVISOR_PREFIX)
            await _drain(recipe, supervisors)
        await _stop_all(recipe, await _lower(recipe, SINK_PREFIX, generation), STOP_SINKS_SECONDS)
    except InfrastructureError as error:
        # The cluster is away, and with it, as a rule, the actors. Leases lapse where it is not.
        log.warning("control_plane_not_stopped", why=str(error))


async def control_plane_stands(recipe: Recipe) -> bool:
    """Whether consumer and sink of this recipe's generation are there; Ray restarts them where they die.

    Raises:
        InfrastructureError: Ray does not answer.
    """
    for name in (sink_name(recipe.generation), consumer_name(recipe.generation)):
        if await off_loop(find_actor, name, recipe.namespace) is None:
            return False
    return True


async def _check_control_resource(recipe: Recipe) -> None:
    """An actor that asks for a resource that nobody has would wait for ever, and say nothing."""
    wanted = recipe.control_resource
    if wanted is None or wanted in await off_loop(cluster_resources):
        return
    raise UsageError(
        f"no node of the Ray cluster has the resource {wanted!r}, which the setting control_resource names: "
        f"start one with `ray start --resources '{{\"{wanted}\": 1}}'`, or unset it"
    )


async def _refuse_to_go_back(recipe: Recipe) -> None:
    newest = await newest_generation(recipe)
    if newest > recipe.generation:
        raise Superseded(newest, recipe.generation)


async def newest_generation(recipe: Recipe) -> int:
    """The highest generation that has an actor; -1 where none has."""
    generations = [-1]
    for prefix in (CONSUMER_PREFIX, SINK_PREFIX):
        names = await off_loop(actor_names, recipe.namespace, prefix)
        generations += [number_of(name, prefix) for name in names]
    return max(generations)


async def _lower(recipe: Recipe, prefix: str, highest: int) -> list[str]:
    """The names of the generations up to `highest`."""
    names = await off_loop(actor_names, recipe.namespace, prefix)
    return [name for name in names if number_of(name, prefix) <= highest]


async def _supervisors_of_others(recipe: Recipe) -> list[str]:
    """The names of supervisors that do not say that they work by this recipe."""
    names = await off_loop(actor_names, recipe.namespace, SUPERVISOR_PREFIX)
    ours = await asyncio.gather(*(_serves(name, recipe) for name in names))
    return [name for name, is_ours in zip(names, ours, strict=True) if not is_ours]


async def _serves(name: str, recipe: Recipe) -> bool:
    actor = await off_loop(find_actor, name, recipe.namespace)
    if actor is None:
        return False
    try:
        return bool(await ask(actor, "serves", recipe, timeout_seconds=PING_SECONDS))
    except (TimeoutError, RayError, AttributeError) as error:  # other code may not know the method
        log.info("supervisor_does_not_say", actor=name, why=last_line(error))
        return False


async def _start(remote: Any, name: str, recipe: Recipe) -> None:
    """Make sure that the actor runs by this very recipe, and has its database open."""
    actor = await _actor_of(remote, name, recipe)
    try:
        why = await ask(actor, "ready", READY_SECONDS, timeout_seconds=READY_SECONDS + PING_SECONDS)
    except (TimeoutError, RayError) as error:
        why = last_line(error)
    if why is not None:
        raise InfrastructureError(f"the actors of the control plane cannot work, {name}: {why}")


async def _actor_of(remote: Any, name: str, recipe: Recipe) -> Any:
    options = {
        **control_options(recipe.control_resource),
        "name": name,
        "namespace": recipe.namespace,
        "lifetime": "detached",
        "get_if_exists": True,
    }
    why = ""
    for _ in range(START_TRIES):
        actor = await off_loop(create_actor, remote, options, recipe)
        try:
            if await ask(actor, "serves", recipe, timeout_seconds=DECISION_SECONDS):
                return actor
            # Left by a control plane that was killed: its database may be at another port now.
            why = "it works by another recipe"
        except TimeoutError:
            why = f"no answer in {DECISION_SECONDS:g} s"
        except RayActorError as error:
            # It ended just now, or is being restarted.
            why = last_line(error)
            await asyncio.sleep(START_PAUSE_SECONDS)
            continue
        except RayError as error:
            raise InfrastructureError(f"{name}: {last_line(error)}") from error
        log.warning("actor_is_replaced", actor=name, why=why)
        await _stop(recipe, name, PING_SECONDS)
    raise InfrastructureError(f"{name} does not come up on Ray: {why}")


async def _drain(recipe: Recipe, supervisors: Iterable[str]) -> None:
    """Stop them once the episodes under way have ended, or had their time."""
    await _stop_all(recipe, supervisors, recipe.drain_seconds + LET_GO_SECONDS, recipe.drain_seconds)


async def _stop_all(recipe: Recipe, names: Iterable[str], timeout_seconds: float, *arguments: object) -> None:
    started_at = time.monotonic()
    names = list(names)
    await asyncio.gather(*(_stop(recipe, name, timeout_seconds, *arguments) for name in names))
    if names:
        log.info("actors_stopped", actors=names, seconds=round(time.monotonic() - started_at, 1))


async def _stop(recipe: Recipe, name: str, timeout_seconds: float, *arguments: object) -> None:
    """Ask it to end within the time, then kill it for good."""
    try:
        actor = await off_loop(find_actor, name, recipe.namespace)
        if actor is None:
            return
        with suppress(TimeoutError, RayError):
            await ask(actor, "stop", *arguments, timeout_seconds=timeout_seconds)
        await off_loop(kill_actor, actor, no_restart=True)
    except InfrastructureError as error:
        log.warning("actor_not_stopped", actor=name, why=str(error))
