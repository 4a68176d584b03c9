"""Every call to Ray that makes, finds, asks or ends something: in one place, with failpoints on both sides.

What blocks says so, and is called on a thread (`off_loop`).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from orchestrator import failpoints
from orchestrator.domain.errors import InfrastructureError
from orchestrator.waiting import on_a_thread

T = TypeVar("T")

RAY_CALL_SECONDS = 30.0
PLACE_POLL_SECONDS = 0.05
MOST_CALLS = 64
_places = threading.BoundedSemaphore(MOST_CALLS)


def create_actor(remote: Any, options: Mapping[str, Any], *arguments: Any) -> Any:
    """The handle of a new actor, or of the one of that name if the options say so. Blocking."""
    with failpoints.around("ray.create_actor"):
        return remote.options(**options).remote(*arguments)


def kill_actor(actor: Any, *, no_restart: bool = True) -> None:
    """End the actor's process. Blocking."""
    with failpoints.around("ray.kill_actor"):
        ray.kill(actor, no_restart=no_restart)


def find_actor(name: str, namespace: str) -> Any:
    """The actor of that name, or None. Blocking."""
    with failpoints.around("ray.find_actor"):
        try:
            return ray.get_actor(name, namespace)
        except ValueError:
            return None


def get_actor(name: str, namespace: str) -> Any:
    """The actor of that name. Blocking.

    Raises:
        ValueError: there is none.
    """
    with failpoints.around("ray.get_actor"):
        return ray.get_actor(name, namespace)


def actor_id_of(name: str, namespace: str) -> str | None:
    """Which actor has the name, or None. Blocking."""
    actor = find_actor(name, namespace)
    return None if actor is None else str(actor._actor_id.hex())


def own_actor_id() -> str | None:
    """Which actor this process is, or None where it is none. Asks nobody."""
    own: str | None = ray.get_runtime_context().get_actor_id()
    return own


def actor_names(namespace: str, prefix: str) -> list[str]:
    """The names of the actors that are called `prefix` and a number. Blocking."""
    with failpoints.around("ray.actor_names"):
        named = ray.util.list_named_actors(all_namespaces=True)
    return sorted(
        actor["name"]
        for actor in named
        if actor["namespace"] == namespace
        and actor["name"].startswith(prefix)
        and actor["name"].removeprefix(prefix).isdecimal()
    )


def create_placement_group(bundles: list[dict[str, float]], name: str) -> PlacementGroup:
    """A placement group, which may wait for its resources. Blocking."""
    with failpoints.around("ray.create_placement_group"):
        return placement_group(bundles, "PACK", name)


def placement(group: PlacementGroup) -> Mapping[str, Any]:
    """What Ray knows of a placement group. Blocking."""
    with failpoints.around("ray.placement"):
        table: Mapping[str, Any] = placement_group_table(group)
        return table


def free_placement_group(group: PlacementGroup) -> None:
    """Give a placement group's resources back. Blocking."""
    with failpoints.around("ray.free_placement_group"):
        remove_placement_group(group)


def cluster_resources() -> Mapping[str, float]:
    """What all nodes have together. Blocking."""
    with failpoints.around("ray.cluster_resources"):
        total: Mapping[str, float] = ray.cluster_resources()
        return total


def cluster_nodes() -> list[dict[str, Any]]:
    """The nodes that the cluster knows, dead ones too. Blocking."""
    with failpoints.around("ray.cluster_nodes"):
        nodes: list[dict[str, Any]] = ray.nodes()
        return nodes


async def ask(actor: Any, method: str, *arguments: Any, timeout_seconds: float | None) -> Any:
    """What a method of an actor answers within the time; None waits for ever.

    Raises:
        TimeoutError: it does not.
        RayError: it is lost, or answers with an error.
    """
    call = f"ray.ask.{method}"
    await failpoints.reach_async(f"{call}.before")
    # Not `wait_for`, which in Python 3.11 forgets a cancellation where the answer has just come.
    async with asyncio.timeout(timeout_seconds):
        answer = await getattr(actor, method).remote(*arguments)
    await failpoints.reach_async(f"{call}.after")
    return answer


def ask_blocking(actor: Any, method: str, *arguments: Any, timeout_seconds: float) -> Any:
    """As `ask`, for threads without an event loop.

    Raises:
        GetTimeoutError, RayError: as `ask`.
    """
    with failpoints.around(f"ray.ask.{method}"):
        return ray.get(getattr(actor, method).remote(*arguments), timeout=timeout_seconds)


def put_object(content: Any) -> Any:
    """A reference to the content, which stays on this node while somebody has the reference. Blocking.

    Raises:
        ObjectStoreFullError: there is no room, on disk neither.
    """
    with failpoints.around("ray.put_object"):
        return ray.put(content)


async def fetch_object(reference: Any, *, timeout_seconds: float) -> Any:
    """What a reference stands for, within the time.

    Raises:
        TimeoutError: it is not here by then.
        RayError: it is lost.
    """
    await failpoints.reach_async("ray.fetch_object.before")
    async with asyncio.timeout(timeout_seconds):
        content = await reference
    await failpoints.reach_async("ray.fetch_object.after")
    return content


async def off_loop(call: Callable[..., T], *args: Any, **options: Any) -> T:
    """What a blocking call of Ray returns, made on a thread that the end of the program does not wait for.

    A call on a cluster that dies meanwhile may never return, and keeps its thread: of `MOST_CALLS` one waits.

    Raises:
        InfrastructureError: Ray gives no answer in time, or an error.
    """
    name = getattr(call, "__name__", "a call")
    try:
        async with asyncio.timeout(RAY_CALL_SECONDS):
            while not _places.acquire(blocking=False):
                await asyncio.sleep(PLACE_POLL_SECONDS)
            return await on_a_thread(partial(_with_place, partial(call, *args, **options)))
    except TimeoutError as error:
        raise InfrastructureError(f"Ray does not answer ({name})") from error
    except Exception as error:
        # Ray raises RayError, RuntimeError, OSError and bare Exception where the cluster is away.
        raise InfrastructureError(f"Ray failed ({name}): {last_line(error)}") from error


def _with_place(call: Callable[[], T]) -> T:
    """Make the call, and give back the place that was taken for it."""
    try:
        return call()
    finally:
        _places.release()


def last_line(error: BaseException) -> str:
    """The last line that says something: Ray puts the remote traceback before the message."""
    lines = (line for line in reversed(str(error).splitlines()) if line.strip())
    return next(lines, type(error).__name__)
