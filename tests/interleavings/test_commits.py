"""Claim against the sink's commit: an outcome counts for the claim, or is void; never half of it."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from orchestrator.adapters.postgres.ledger import PostgresLedger
from orchestrator.domain.episodes import CommitOutcome
from tests.interleavings.sessions import is_claim, lapse, lost, telemetry, waits_for_a_lock, within_deadline
from tests.job_fixtures import a_store, claimed, finished, planned_runs
from tests.stepping import in_session

if TYPE_CHECKING:
    from tests.conftest import Pool
    from tests.stepping import Stepper

COMMIT = "postgres.ledger.commit"
CLAIM = "postgres.job_store.claim"
BEFORE_THE_LOCK = ["begin.before", "begin.after", "lock_shared.before"]
UNDER_THE_LOCK = [
    "lock_shared.after",
    "select_jobs.before",
    "select_jobs.after",
    "select_episodes.after",
    "update_episodes.before",
    "update_episodes.after",
    "insert_pgqueuer.before",
    "insert_pgqueuer.after",
    "commit.before",
]
COMMITTED = [CommitOutcome.COMMITTED] * 3
STALE = [CommitOutcome.STALE] * 3


@pytest.mark.parametrize("point", UNDER_THE_LOCK)
async def test_a_commit_under_way_makes_a_claim_wait_which_then_counts_it(
    pool: Pool, steps: Stepper, point: str
) -> None:
    store, ledger = a_store(pool), PostgresLedger(pool)
    runs = await planned_runs(pool, await claimed(store))
    await lapse(pool)
    held = steps.hold(f"{COMMIT}.{point}", "sink")
    commit = in_session("sink", ledger.commit([finished(run) for run in runs]))
    await held.reached()

    claim = in_session("claim", store.claim(1, uuid4()))
    await waits_for_a_lock(pool, claim)
    held.go_on()

    assert await within_deadline(commit) == COMMITTED
    assert is_claim(await within_deadline(claim))
    assert await pool.fetchval("SELECT outcomes_at_claim FROM jobs") == 3
    assert await telemetry(pool) == (3, 6)


@pytest.mark.parametrize("point", BEFORE_THE_LOCK)
async def test_a_commit_that_has_no_lock_yet_is_void_after_the_claim(
    pool: Pool, steps: Stepper, point: str
) -> None:
    store, ledger = a_store(pool), PostgresLedger(pool)
    runs = await planned_runs(pool, await claimed(store))
    await lapse(pool)
    held = steps.hold(f"{COMMIT}.{point}", "sink")
    commit = in_session("sink", ledger.commit([finished(run) for run in runs]))
    await held.reached()

    claim = await store.claim(1, uuid4())
    held.go_on()

    assert is_claim(claim)
    assert await within_deadline(commit) == STALE
    assert await telemetry(pool) == (0, 0)


@pytest.mark.parametrize(
    "point",
    [
        "lock_exclusive.after",
        "select_jobs.after",
        "update_jobs.after",
        "insert_claims.after",
        "commit.before",
    ],
)
async def test_a_commit_that_waited_for_a_claim_sees_the_new_epoch_and_writes_nothing(
    pool: Pool, steps: Stepper, point: str
) -> None:
    store, ledger = a_store(pool), PostgresLedger(pool)
    runs = await planned_runs(pool, await claimed(store))
    await lapse(pool)
    held = steps.hold(f"{CLAIM}.{point}", "claim")
    claim = in_session("claim", store.claim(1, uuid4()))
    await held.reached()

    commit = in_session("sink", ledger.commit([finished(run) for run in runs]))
    await waits_for_a_lock(pool, commit)
    held.go_on()

    assert is_claim(await within_deadline(claim))
    assert await within_deadline(commit) == STALE
    assert await ledger.outcomes(1) == []
    assert await telemetry(pool) == (0, 0)


@pytest.mark.parametrize("point", ["lock_exclusive.after", "update_jobs.after", "commit.before"])
async def test_a_claim_that_dies_under_way_does_not_void_the_commit_that_waited_for_it(
    pool: Pool, steps: Stepper, point: str
) -> None:
    store, ledger = a_store(pool), PostgresLedger(pool)
    runs = await planned_runs(pool, await claimed(store))
    await lapse(pool)
    held = steps.hold(f"{CLAIM}.{point}", "claim")
    claim = in_session("claim", store.claim(1, uuid4()))
    await held.reached()

    commit = in_session("sink", ledger.commit([finished(run) for run in runs]))
    await waits_for_a_lock(pool, commit)
    held.cut()

    await lost(claim)
    assert await within_deadline(commit) == COMMITTED
    assert await telemetry(pool) == (3, 6)


async def test_steady_commits_do_not_starve_a_claim(pool: Pool, steps: Stepper) -> None:
    store, ledger = a_store(pool), PostgresLedger(pool)
    runs = await planned_runs(pool, await claimed(store))
    await lapse(pool)
    held = steps.hold(f"{COMMIT}.lock_shared.after", "first sink")
    first = in_session("first sink", ledger.commit([finished(runs[0])]))
    await held.reached()

    claim = in_session("claim", store.claim(1, uuid4()))
    await waits_for_a_lock(pool, claim)
    # It asks for no more than what the first sink has, and all the same it waits behind the claim.
    second = in_session("second sink", ledger.commit([finished(runs[1])]))
    await waits_for_a_lock(pool, second, 2)
    held.go_on()

    assert await within_deadline(first) == [CommitOutcome.COMMITTED]
    assert is_claim(await within_deadline(claim))
    assert await within_deadline(second) == [CommitOutcome.STALE]


@pytest.mark.parametrize(
    "point", ["lock_shared.after", "select_episodes.after", "update_episodes.after", "commit.before"]
)
async def test_two_sinks_with_the_same_episodes_commit_each_once(
    pool: Pool, steps: Stepper, point: str
) -> None:
    ledger = PostgresLedger(pool)
    runs = await planned_runs(pool, await claimed(a_store(pool)))
    episodes = [finished(run) for run in runs]
    held = steps.hold(f"{COMMIT}.{point}", "first")
    first = in_session("first", ledger.commit(episodes))
    await held.reached()

    second = in_session("second", ledger.commit(list(reversed(episodes))))
    if point == "lock_shared.after":  # it has no row yet, so the second overtakes it
        assert await within_deadline(second) == COMMITTED
    else:
        await waits_for_a_lock(pool, second)
    held.go_on()

    answers = await within_deadline(first) + await within_deadline(second)
    assert sorted(answers) == sorted([CommitOutcome.ALREADY] * 3 + COMMITTED)
    assert await telemetry(pool) == (3, 6)
