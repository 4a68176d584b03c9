"""How an actor finds out that another one has its place; on Ray it is shown end to end."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest
import ray

from orchestrator.actors import tenure as tenure_module
from orchestrator.actors.tenure import Tenure
from orchestrator.domain.errors import InfrastructureError

OURS, ANOTHERS = "aa", "bb"


@dataclass(frozen=True)
class Handle:
    _actor_id: bytes


@pytest.fixture
def on_ray(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A cluster that has the actors of the given names, and this process as the actor `OURS`."""

    def cluster(actors: dict[str, str]) -> None:
        def get_actor(name: str, namespace: str) -> Handle:
            if name not in actors:
                raise ValueError(name)
            return Handle(bytes.fromhex(actors[name]))

        class Context:
            def get_actor_id(self) -> str:
                return OURS

        named = [{"name": name, "namespace": "orchestrator-test"} for name in actors]
        monkeypatch.setattr(ray, "is_initialized", lambda: True)
        monkeypatch.setattr(ray, "get_runtime_context", Context)
        monkeypatch.setattr(ray, "get_actor", get_actor)
        monkeypatch.setattr(ray.util, "list_named_actors", lambda all_namespaces: named)
        monkeypatch.setattr(tenure_module, "LOOK_EVERY_SECONDS", 0.001)

    return cluster


def a_tenure() -> Tenure:
    return Tenure("orchestrator-test", "queue-consumer-g", 3)


@pytest.mark.parametrize(
    ("actors", "why"),
    [
        ({"queue-consumer-g3": OURS}, None),
        ({"queue-consumer-g3": OURS, "queue-consumer-g2": ANOTHERS, "result-sink-g4": ANOTHERS}, None),
        (
            {"queue-consumer-g3": OURS, "queue-consumer-g10": ANOTHERS},
            "generation 10 is there, and this one is 3",
        ),
        ({"queue-consumer-g3": ANOTHERS}, "another actor has the name, or none"),
        ({}, "another actor has the name, or none"),
    ],
)
async def test_a_place_is_lost_to_a_newer_generation_or_to_whoever_has_the_name(
    on_ray: Any, actors: dict[str, str], why: str | None
) -> None:
    on_ray(actors)

    told = await a_tenure().is_over()

    assert (told or "").startswith(why or "")
    assert (told is None) == (why is None)


@pytest.mark.parametrize(
    ("actors", "is_over"),
    [
        ({"result-sink-g3": OURS, "result-sink-g4": ANOTHERS}, False),
        ({"result-sink-g3": OURS, "result-sink-g4": ANOTHERS, "queue-consumer-g3": ANOTHERS}, False),
        ({"result-sink-g3": OURS, "result-sink-g4": ANOTHERS, "queue-consumer-g4": ANOTHERS}, True),
        ({"result-sink-g4": ANOTHERS}, True),
    ],
)
async def test_a_sink_keeps_its_place_until_the_supervisors_that_send_to_it_have_drained(
    on_ray: Any, actors: dict[str, str], is_over: bool
) -> None:
    on_ray(actors)

    told = await Tenure("orchestrator-test", "result-sink-g", 3).is_over()

    assert (told is not None) == is_over


async def test_a_process_outside_of_ray_has_no_place_to_lose() -> None:
    assert await a_tenure().is_over() is None


async def test_a_cluster_that_does_not_answer_is_no_loss_but_an_error(
    on_ray: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(all_namespaces: bool) -> Any:
        raise RuntimeError("GCS is away")

    on_ray({})
    monkeypatch.setattr(ray.util, "list_named_actors", away)

    with pytest.raises(InfrastructureError, match="GCS is away"):
        await a_tenure().is_over()


async def test_work_ends_with_the_tenure_and_cleans_up(on_ray: Any) -> None:
    on_ray({})
    cleaned_up = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned_up.set()

    assert await asyncio.wait_for(a_tenure().during(work()), 20)
    assert cleaned_up.is_set()


async def test_work_that_ends_by_itself_is_no_end_of_the_tenure(on_ray: Any) -> None:
    on_ray({"queue-consumer-g3": OURS})

    assert not await asyncio.wait_for(a_tenure().during(asyncio.sleep(0)), 20)


async def test_what_the_work_raises_is_raised(on_ray: Any) -> None:
    on_ray({"queue-consumer-g3": OURS})

    async def work() -> None:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        await asyncio.wait_for(a_tenure().during(work()), 20)
