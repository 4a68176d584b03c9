"""A worker dies between the steps of an episode and its outcome: the validator sees one run of it, whole."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from orchestrator.adapters.postgres.ledger import PostgresLedger
from orchestrator.domain.episodes import CommitOutcome
from tests.interleavings.sessions import lost, telemetry, waits_for_a_lock, within_deadline
from tests.job_fixtures import a_store, claimed, finished, planned_runs
from tests.stepping import in_session

if TYPE_CHECKING:
    from orchestrator.domain.episodes import EpisodeRun, FinishedEpisode
    from tests.conftest import Pool
    from tests.stepping import Stepper

STAGE = "postgres.ledger.stage_part"
COMMIT = "postgres.ledger.commit"


def part_of(run: EpisodeRun, part: int) -> list[bytes]:
    return [json.dumps({"step": 2 * part + step, "run": run.run}).encode() for step in (0, 1)]


def staged(run: EpisodeRun, parts: int) -> FinishedEpisode:
    """The outcome of a run all of whose steps were staged."""
    return replace(finished(run, steps=0), steps=2 * parts, staged_parts=parts)


async def steps_seen(pool: Pool) -> list[tuple[int, int]]:
    """(run, step) of each step message that waits for the validator, in the queue's order."""
    rows = await pool.fetch("SELECT payload FROM pgqueuer WHERE entrypoint = 'episode_step_data' ORDER BY id")
    messages = [message for row in rows for message in json.loads(row["payload"])["messages"]]
    return [(message["run"], message["step"]) for message in messages]


@pytest.mark.parametrize(
    "point", ["lock_shared.after", "select_episodes.after", "insert_episode_parts.after", "commit.before"]
)
@pytest.mark.parametrize("dies", [False, True], ids=["late", "dead"])
async def test_steps_of_a_run_that_another_one_follows_never_reach_the_validator(
    pool: Pool, steps: Stepper, point: str, dies: bool
) -> None:
    claim, ledger = await claimed(a_store(pool)), PostgresLedger(pool)
    (first, *_) = await planned_runs(pool, claim, episodes=1)
    assert await ledger.stage_part(first, 0, part_of(first, 0))
    held = steps.hold(f"{STAGE}.{point}", "worker")
    staging = in_session("worker", ledger.stage_part(first, 1, part_of(first, 1)))
    await held.reached()

    assigning = in_session("supervisor", ledger.assign(claim, [first.key]))
    if point == "lock_shared.after":  # it has no row yet: the assignment overtakes it
        await within_deadline(assigning)
    else:
        await waits_for_a_lock(pool, assigning)
    if dies:
        held.cut()
        await lost(staging)
    else:
        held.go_on()
        assert await within_deadline(staging) is (point != "lock_shared.after")
    (second,) = await within_deadline(assigning)

    assert await ledger.commit([staged(first, 2)]) == [CommitOutcome.STALE]
    for part in (0, 1):
        assert await ledger.stage_part(second, part, part_of(second, part))
    assert await ledger.commit([staged(second, 2)]) == [CommitOutcome.COMMITTED]
    assert await steps_seen(pool) == [(2, 0), (2, 1), (2, 2), (2, 3)]
    assert await pool.fetchval("SELECT count(*) FROM episode_parts") == 0


@pytest.mark.parametrize(
    "point", ["select_episodes.after", "update_episodes.after", "insert_pgqueuer.after", "commit.before"]
)
async def test_an_outcome_that_its_worker_did_not_live_to_hear_of_is_not_played_again(
    pool: Pool, steps: Stepper, point: str
) -> None:
    claim, ledger = await claimed(a_store(pool)), PostgresLedger(pool)
    (run, *_) = await planned_runs(pool, claim, episodes=1)
    held = steps.hold(f"{COMMIT}.{point}", "sink")
    commit = in_session("sink", ledger.commit([finished(run)]))
    await held.reached()

    assigning = in_session("supervisor", ledger.assign(claim, [run.key]))
    await waits_for_a_lock(pool, assigning)
    held.go_on()

    assert await within_deadline(commit) == [CommitOutcome.COMMITTED]
    assert await within_deadline(assigning) == []
    assert await ledger.missing(1) == []
    assert await telemetry(pool) == (1, 2)


@pytest.mark.parametrize("point", ["update_episodes.before", "update_episodes.after", "commit.before"])
async def test_an_outcome_that_comes_while_the_episode_is_assigned_anew_is_void(
    pool: Pool, steps: Stepper, point: str
) -> None:
    claim, ledger = await claimed(a_store(pool)), PostgresLedger(pool)
    (run, *_) = await planned_runs(pool, claim, episodes=1)
    held = steps.hold(f"postgres.ledger.assign.{point}", "supervisor")
    assigning = in_session("supervisor", ledger.assign(claim, [run.key]))
    await held.reached()

    commit = in_session("sink", ledger.commit([finished(run)]))
    await waits_for_a_lock(pool, commit)
    held.go_on()

    (second,) = await within_deadline(assigning)
    assert second.run == run.run + 1
    assert await within_deadline(commit) == [CommitOutcome.STALE]
    assert await telemetry(pool) == (0, 0)


@pytest.mark.parametrize(
    "point", ["fetch_parts", "insert_pgqueuer.after", "delete_episode_parts.after", "commit.before"]
)
async def test_a_sink_that_dies_while_it_queues_a_long_episode_leaves_all_of_it_to_the_next_try(
    pool: Pool, steps: Stepper, point: str
) -> None:
    claim, ledger = await claimed(a_store(pool)), PostgresLedger(pool)
    (run, *_) = await planned_runs(pool, claim, episodes=1)
    for part in range(3):
        await ledger.stage_part(run, part, part_of(run, part))
    held = steps.hold(f"{COMMIT}.{point.replace('fetch_parts', 'select_episode_parts.after')}", "sink")
    commit = in_session("sink", ledger.commit([staged(run, 3)]))
    await held.reached()

    held.cut()
    await lost(commit)
    nothing_yet = await steps_seen(pool)
    again = await ledger.commit([staged(run, 3)])

    assert nothing_yet == []
    assert again == [CommitOutcome.COMMITTED]
    assert await steps_seen(pool) == [(1, step) for step in range(6)]
