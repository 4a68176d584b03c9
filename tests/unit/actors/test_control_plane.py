"""What of the actors and of their start needs no Ray; the rest is shown end to end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import ray

from orchestrator.actors.control_actors import QueueConsumerActor, ResultSinkActor, ServiceLoop
from orchestrator.actors.control_plane import start_control_plane
from orchestrator.actors.ray_supervisors import RaySupervisors
from orchestrator.domain.errors import InfrastructureError, UsageError

pytestmark = pytest.mark.usefixtures("unrendered_log")


@dataclass
class FakeRecipe:
    """Opens what it is given, after some failures."""

    generation: int = 3
    namespace: str = "orchestrator-test"
    control_resource: str | None = None
    drain_seconds: float = 0.0
    failures: list[Exception] = field(default_factory=list, compare=False)
    opened: Any = None

    def set_up_process(self, **fields: object) -> None:
        pass

    @asynccontextmanager
    async def open_sink(self) -> AsyncIterator[Any]:
        if self.failures:
            raise self.failures.pop()
        yield self.opened

    open_consumer = open_sink


@dataclass
class Working:
    """A sink or a consumer that works until it is told to stop."""

    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    committed: int = 0

    async def work(self) -> None:
        await self.stopped.wait()

    def stop(self) -> None:
        self.stopped.set()


async def actor_of(kind: Any, recipe: FakeRecipe) -> Any:
    """The actor's plain class, constructed as Ray does."""
    actor = kind.__new__(kind)
    await actor.__init__(recipe)
    return actor


@pytest.mark.parametrize("kind", [ResultSinkActor, QueueConsumerActor])
async def test_an_actor_without_its_database_says_what_keeps_it(kind: Any) -> None:
    away = [InfrastructureError("Postgres at db:5432/x cannot be reached") for _ in range(99)]
    actor = await actor_of(kind, FakeRecipe(failures=away))

    why = await actor.ready(0.3)

    assert why == "Postgres at db:5432/x cannot be reached"
    await actor.stop()


@pytest.mark.parametrize("kind", [ResultSinkActor, QueueConsumerActor])
async def test_an_actor_starts_over_until_its_database_is_there(kind: Any) -> None:
    recipe = FakeRecipe(failures=[RuntimeError("unheard of"), OSError("refused")], opened=Working())
    actor = await actor_of(kind, recipe)

    why = await actor.ready(20.0)

    assert why is None
    assert recipe.failures == []
    await actor.stop()


async def test_a_sink_without_its_database_asks_to_send_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.actors.control_actors.OPEN_SECONDS", 0.1)
    actor = await actor_of(ResultSinkActor, FakeRecipe(failures=[OSError("refused")] * 9))

    with pytest.raises(InfrastructureError, match="refused"):
        await actor.commit([])

    await actor.stop()


async def test_an_actor_serves_its_own_recipe_and_no_other() -> None:
    actor = await actor_of(ResultSinkActor, FakeRecipe(generation=3, failures=[OSError()] * 9))

    answers = [await actor.serves(FakeRecipe(generation=number)) for number in (3, 4)]

    assert answers == [True, False]
    await actor.stop()


async def test_a_consumer_stops_by_itself_and_is_not_cancelled() -> None:
    working = Working()
    actor = await actor_of(QueueConsumerActor, FakeRecipe(opened=working))
    await actor.ready(20.0)

    await asyncio.wait_for(actor.stop(), 5)

    assert working.stopped.is_set()


async def test_a_loop_that_was_cancelled_does_not_start_over() -> None:
    starts = []

    async def serve() -> None:
        starts.append(1)
        loop.opened.set()
        await asyncio.Event().wait()

    loop = ServiceLoop("test", serve)
    await loop.ready(5.0)

    await loop.end(0)

    assert (len(starts), loop.opened.is_set()) == (1, False)


@pytest.mark.parametrize("newer", ["queue-consumer-g4", "result-sink-g12"])
async def test_older_code_does_not_take_the_place_of_newer(
    monkeypatch: pytest.MonkeyPatch, newer: str
) -> None:
    only_live_actors(monkeypatch, newer)

    with pytest.raises(UsageError, match="runs on the cluster already, and this one is 3"):
        await start_control_plane(FakeRecipe(generation=3))


async def test_the_jobs_with_a_supervisor_are_read_off_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    only_live_actors(monkeypatch, "job-12", "job-3", "job-x", "result-sink-g3")

    assert await RaySupervisors(FakeRecipe(), no_benchmark).jobs() == [3, 12]


async def test_a_cluster_that_is_away_is_an_infrastructure_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*, all_namespaces: bool) -> list[dict[str, str]]:
        raise RuntimeError("Failed to connect to GCS")

    monkeypatch.setattr(ray.util, "list_named_actors", fail)

    with pytest.raises(InfrastructureError, match="Failed to connect to GCS"):
        await RaySupervisors(FakeRecipe(), no_benchmark).jobs()


async def no_benchmark(_: int) -> str:
    return ""


def only_live_actors(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """A cluster as Ray describes one, with these actors and those of somebody else."""
    ours = [{"namespace": "orchestrator-test", "name": name} for name in names]
    others = [{"namespace": "orchestrator-other", "name": "queue-consumer-g99"}]
    monkeypatch.setattr(ray.util, "list_named_actors", lambda all_namespaces: ours + others)
