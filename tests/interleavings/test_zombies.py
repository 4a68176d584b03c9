"""Whoever stood still while another took over: its writes change nothing, it notices, and it stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from orchestrator.adapters.artifacts.pack import pack_directory
from orchestrator.adapters.postgres.installation import take_generation
from orchestrator.adapters.postgres.ledger import PostgresLedger
from orchestrator.adapters.postgres.pool import Database, open_pool
from orchestrator.domain.episodes import CommitOutcome
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.messages import EvalJobMessage
from orchestrator.settings import Settings
from orchestrator.stores import submission_containers
from tests.in_process_plane import InProcessRecipe
from tests.interleavings.control import Place, a_consumer
from tests.interleavings.sessions import (
    is_claim,
    lapse,
    make_silent,
    queue_rows,
    telemetry,
    waits_for_a_lock,
    within_deadline,
)
from tests.interleavings.test_sink_restart import a_sink
from tests.job_fixtures import a_job, a_store, claimed, finished, planned_runs
from tests.stepping import in_session
from tests.unit.actors.control_fakes import eventually

if TYPE_CHECKING:
    from tests.conftest import Pool
    from tests.stepping import Stepper

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
EPISODES = 4


# ---------------------------------------------------------------------------------------- supervisor


@dataclass
class Scene:
    """One job with a real submission, and supervisors of it that differ by their session."""

    pool: Pool
    recipe: InProcessRecipe

    async def supervise(self) -> JobStatus | None:
        """What a supervisor's process does, from its start to its end."""
        async with self.recipe.open_supervision(1, uuid4()) as supervision:
            return await supervision.run()

    async def containers(self) -> int:
        return len(await self.recipe.outside.list_owned(self.recipe.installation.installation_id))


@pytest.fixture
async def scene(database: Database, pool: Pool, steps: Stepper, tmp_path: Path) -> AsyncIterator[Scene]:
    settings = Settings(data_dir=tmp_path, lease_seconds=9.0, workers_per_job=1)
    packed = pack_directory(EXAMPLES / "cartpole", tmp_path / "artifacts")
    job = EvalJobMessage.model_validate(
        {
            "job_id": 1,
            "submission_id": "heuristic",
            "env_provider": "gymnasium",
            "benchmark_name": "CartPole-v1",
            "artifact_url": f"file://{packed.path}",
            "artifact_sha256": packed.sha256,
            "artifact_size_bytes": packed.size_bytes,
            "config": {"seed": 11, "episodes_per_task": EPISODES, "max_episode_steps": 20},
        }
    )
    await a_store(pool).insert(job, enqueue=False, local=True)
    recipe = InProcessRecipe(settings, database, await take_generation(pool, "test"))
    async with a_sink(database, "sink") as sink:
        object.__setattr__(recipe, "sink", sink)
        object.__setattr__(recipe, "outside", submission_containers(settings))
        scene = Scene(pool, recipe)
        yield scene
        steps.let_go()
        for owned in await recipe.outside.list_owned(recipe.installation.installation_id):
            await recipe.outside.remove(owned.handle)


@pytest.mark.parametrize(
    "point",
    [
        "postgres.ledger.store_plan.begin.before",
        "postgres.job_store.register_container.begin.before",
        "postgres.job_store.register_container.commit.after",
        "postgres.job_store.set_container_handle.begin.before",
        "postgres.job_store.set_status.commit.after",
        "postgres.ledger.assign.begin.before",
        "postgres.ledger.assign.commit.after",
        "postgres.job_store.mark_container_removing.begin.before",
        "postgres.job_store.finish.begin.before",
    ],
)
async def test_a_supervisor_that_stood_still_while_another_finished_its_job_changes_nothing_and_stops(
    scene: Scene, pool: Pool, steps: Stepper, point: str
) -> None:
    held = steps.hold(point, "zombie")
    zombie = in_session("zombie", scene.supervise())
    await steps.freeze_at(held)
    await lapse(pool)
    assert await asyncio.wait_for(in_session("heir", scene.supervise()), 60) is JobStatus.COMPLETED
    before = await everything(pool)

    steps.thaw("zombie")

    assert await within_deadline(zombie) is None
    assert await everything(pool) == before
    assert await queue_rows(pool, "eval_result") == 1
    assert len(before["episodes"]) == EPISODES
    assert await scene.containers() == 0


async def everything(pool: Pool) -> dict[str, list[Any]]:
    """All rows that the control plane writes."""
    tables = (
        "jobs",
        "claims",
        "containers",
        "episodes",
        "episode_parts",
        "results",
        "job_events",
        "pgqueuer",
    )
    return {table: sorted(await pool.fetch(f"SELECT * FROM {table}"), key=str) for table in tables}


# ---------------------------------------------------------------------------------------------- sink


@pytest.mark.parametrize("point", ["begin.before", "begin.after", "lock_shared.before"])
async def test_a_sink_that_stood_still_while_another_committed_the_same_answers_so_and_writes_nothing(
    database: Database, pool: Pool, steps: Stepper, point: str
) -> None:
    runs = await planned_runs(pool, await claimed(a_store(pool)))
    episodes = [finished(run) for run in runs]
    async with a_sink(database, "zombie") as zombie, a_sink(database, "heir") as heir:
        held = steps.hold(f"postgres.ledger.commit.{point}", "zombie")
        late = asyncio.create_task(zombie.commit(episodes[:2]))
        await steps.freeze_at(held)
        assert await heir.commit(episodes) == [CommitOutcome.COMMITTED] * 3
        before = await everything(pool)

        steps.thaw("zombie")

        assert await within_deadline(late) == [CommitOutcome.ALREADY] * 2
    assert await everything(pool) == before
    assert await telemetry(pool) == (3, 6)


async def test_a_sink_that_stood_still_while_its_job_was_claimed_by_another_writes_nothing(
    database: Database, pool: Pool, steps: Stepper
) -> None:
    store = a_store(pool)
    runs = await planned_runs(pool, await claimed(store))
    async with a_sink(database, "zombie") as zombie:
        held = steps.hold("postgres.ledger.commit.begin.before", "zombie")
        late = asyncio.create_task(zombie.commit([finished(run) for run in runs]))
        await steps.freeze_at(held)
        await lapse(pool)
        assert is_claim(await store.claim(1, uuid4()))
        before = await everything(pool)

        steps.thaw("zombie")

        assert await within_deadline(late) == [CommitOutcome.STALE] * 3
    assert await everything(pool) == before


@pytest.mark.parametrize("point", ["lock_shared.after", "update_episodes.after", "commit.before"])
async def test_a_sink_that_stands_still_within_its_transaction_delays_a_claim_for_a_third_of_a_lease(
    database: Database, pool: Pool, steps: Stepper, point: str
) -> None:
    store = a_store(pool)
    runs = await planned_runs(pool, await claimed(store))
    await lapse(pool)
    async with a_short_sink(database, "zombie") as zombie:
        held = steps.hold(f"postgres.ledger.commit.{point}", "zombie")
        late = asyncio.create_task(zombie.commit([finished(run) for run in runs]))
        await steps.freeze_at(held)
        claiming = in_session("heir", store.claim(1, uuid4()))
        await waits_for_a_lock(pool, claiming)

        assert is_claim(await within_deadline(claiming))  # the server ends the idle transaction
        before = await everything(pool)
        steps.thaw("zombie")

        assert await within_deadline(late) == [CommitOutcome.STALE] * 3
    assert await everything(pool) == before


@asynccontextmanager
async def a_short_sink(database: Database, session: str) -> AsyncIterator[Any]:
    """A sink whose transactions the server ends after 0.3 s without a word."""
    from orchestrator.actors.result_sink import ResultSink

    async with open_pool(database, application_name=session, max_size=2, lease_seconds=1.0) as pool:
        sink = ResultSink(PostgresLedger(pool), 2**20, 10, database_patience_seconds=15.0)
        work = in_session(session, sink.work())
        try:
            yield sink
        finally:
            work.cancel()
            await asyncio.wait({work}, timeout=20)


# ------------------------------------------------------------------------------------------ consumer


async def test_a_consumer_that_stood_still_finds_its_row_taken_and_its_acknowledgement_void(
    database: Database, pool: Pool, steps: Stepper
) -> None:
    store = a_store(pool)
    await store.insert(a_job(1), enqueue=True)
    held = steps.hold("queue.acknowledge.*.before", "zombie")
    async with a_consumer(database, steps, "zombie") as (_, zombie, _):
        await steps.freeze_at(held)
        await make_silent(pool)
        async with a_consumer(database, steps, "heir") as (_, heir, _):
            await eventually(lambda: acknowledged(pool, 1))
        before = await everything(pool)

        late = steps.hold("queue.acknowledge.*.after", "zombie")
        steps.thaw("zombie")
        await late.reached()

        assert await everything(pool) == before
        late.go_on()
    assert (len(zombie.claims), len(heir.claims)) == (1, 0)


async def test_a_consumer_that_lost_its_place_while_it_stood_still_touches_no_row_and_stops(
    database: Database, pool: Pool, steps: Stepper
) -> None:
    store, place = a_store(pool), Place()
    await store.insert(a_job(1), enqueue=True)
    held = steps.hold("queue.dequeue.*.after", "zombie")
    async with a_consumer(database, steps, "zombie", place) as (_, zombie, zombies_work):
        await steps.freeze_at(held)
        await make_silent(pool)
        place.lost = "generation 2 is there"
        async with a_consumer(database, steps, "heir") as (_, heir, _):
            await eventually(lambda: acknowledged(pool, 1))
            before = await everything(pool)
            steps.thaw("zombie")
            await within_deadline(zombies_work)
            assert await everything(pool) == before

            await store.insert(a_job(2), enqueue=True)
            await eventually(lambda: acknowledged(pool, 2))

    assert zombie.answers == []
    assert heir.answers == [None, None]


async def test_a_consumer_that_lost_its_place_begins_no_round_of_its_reconciler(
    database: Database, pool: Pool, steps: Stepper
) -> None:
    await claimed(a_store(pool))
    await lapse(pool)

    async with a_consumer(database, steps, "zombie", Place("generation 2 is there")) as (_, zombie, work):
        await within_deadline(work)

    assert zombie.revived == []


async def acknowledged(pool: Pool, rows: int) -> bool:
    """Whether so many add_job rows have been logged as successful, and none is left."""
    logged = await pool.fetchval(
        "SELECT count(*) FROM pgqueuer_log WHERE entrypoint = 'add_job' AND status = 'successful'"
    )
    return bool(logged == rows and await queue_rows(pool, "add_job") == 0)
