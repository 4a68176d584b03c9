from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.actors.fruitless_faults import MAX_FRUITLESS_FAULTS
from orchestrator.actors.rollouts import WorkerLost
from orchestrator.domain.episodes import FaultClass
from orchestrator.domain.errors import Fenced, HandedOver, InfrastructureError, SubmissionError, UsageError
from tests.unit.actors.simulated_job import CHARGED_WITH, Does, FakeContainer, SimulatedJob, key

PLAY, CRASH, RESET = Does.PLAY, Does.CRASH, Does.RESET
WORKERS = pytest.mark.parametrize("workers", [1, 2, 4])


def with_crashes(episodes: int, crashing: Sequence[int]) -> list[Does]:
    return [CRASH if number in crashing else PLAY for number in range(episodes)]


# ---------------------------------------------------------------------------------- whatever happens

LASTING = st.sampled_from([PLAY, PLAY, PLAY, *CHARGED_WITH, Does.CRASH_IN_COMPANY, Does.LATE_IN_COMPANY])
# Three at most: more in a row would rightly end the job.
PASSING = st.lists(
    st.sampled_from(
        [
            RESET,
            Does.CONTAINER_GONE,
            Does.WORKER_DIES,
            Does.BROKEN_ENVIRONMENT,
            Does.STOPPED,
            Does.UNACKNOWLEDGED,
            Does.STALE,
        ]
    ),
    max_size=3,
    unique=True,
)


@given(
    lasting=st.lists(LASTING, min_size=1, max_size=14),
    passing=PASSING,
    troubled=st.integers(min_value=0),
    workers=st.integers(1, 4),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=150)
def test_every_episode_has_one_outcome_and_only_those_at_fault_are_charged(
    lasting: list[Does], passing: list[Does], troubled: int, workers: int, seed: int
) -> None:
    script: list[list[Does]] = [[does] for does in lasting]
    script[troubled % len(script)][:0] = passing
    job = SimulatedJob(script, workers=workers, seed=seed)

    faults = asyncio.run(job.run())

    assert faults == {number: CHARGED_WITH.get(does) for number, does in enumerate(lasting)}
    assert max(Counter(job.cluster.settled).values(), default=1) == 1
    assert job.left[-1] == 0


@given(
    crashes=st.sets(st.integers(0, 11), max_size=8),
    limit=st.integers(1, 6),
    workers=st.integers(1, 4),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60)
def test_whether_a_job_completes_depends_on_its_episodes_alone(
    crashes: set[int], limit: int, workers: int, seed: int
) -> None:
    script = with_crashes(12, sorted(crashes))
    job = SimulatedJob(script, workers=workers, max_containers=limit, seed=seed)

    if len(crashes) <= limit:
        faults = asyncio.run(job.run())
        assert {number for number, fault in faults.items() if fault} == crashes
    else:
        assert isinstance(asyncio.run(job.run_to_failure()), SubmissionError)
        assert sum(fault is FaultClass.CRASH for fault in job.ledger.faults.values()) == limit


# ----------------------------------------------------------------------------- the container's limit


@WORKERS
async def test_crashes_within_the_limit_let_a_job_complete(workers: int) -> None:
    crashing = [3, 17, 18, 40, 66, 67, 99]
    job = SimulatedJob(with_crashes(100, crashing), workers=workers, max_containers=10)

    faults = await job.run()

    assert sorted(number for number, fault in faults.items() if fault is FaultClass.CRASH) == crashing
    assert len(faults) == 100


async def test_one_worker_needs_one_container_more_for_each_crash() -> None:
    job = SimulatedJob(with_crashes(100, [3, 17, 18, 40, 66, 67, 98]), max_containers=10)

    await job.run()

    assert len(job.policy.containers) == 8


@WORKERS
async def test_as_many_crashes_as_the_limit_complete_and_no_container_is_made_for_nobody(
    workers: int,
) -> None:
    job = SimulatedJob([CRASH] * 10, workers=workers, max_containers=10)

    faults = await job.run()

    assert faults == dict.fromkeys(range(10), FaultClass.CRASH)
    assert job.policy.containers[-1].end is not None


@WORKERS
async def test_one_crash_more_than_the_limit_fails_the_job_with_the_reason_and_the_log(workers: int) -> None:
    job = SimulatedJob(with_crashes(20, range(9, 20)), workers=workers, max_containers=10)

    error = await job.run_to_failure()

    assert isinstance(error, SubmissionError)
    assert "more than 10 episodes" in error.reason
    assert "SIGSEGV" in error.reason
    assert error.log_tail == "the log's end"


@pytest.mark.parametrize(
    ("printed", "told"),
    [
        ("the log's end", "\nthe end of its log:\nthe log's end"),
        ("", ""),
        ("old\n" * 10_000 + "last\n", "\nthe end of its log:\n" + "old\n" * 998 + "last"),
    ],
)
async def test_a_charged_end_is_told_with_the_last_words_of_its_container(printed: str, told: str) -> None:
    job = SimulatedJob([PLAY, CRASH], max_containers=10)
    job.policy.printed = printed

    await job.run()

    outcome = job.ledger.committed[key(1)]
    assert outcome.fault is FaultClass.CRASH
    assert outcome.fault_detail == "step 0: the submission ended: exit code 139 (SIGSEGV)" + told


async def test_a_log_that_cannot_be_read_does_not_hide_the_reason() -> None:
    job = SimulatedJob([CRASH] * 2, max_containers=1)
    job.policy.log_error = InfrastructureError("the API is away")

    error = await job.run_to_failure()

    assert isinstance(error, SubmissionError)
    assert error.log_tail == ""


@WORKERS
async def test_what_was_charged_before_a_restart_counts(workers: int) -> None:
    before = SimulatedJob(with_crashes(20, [1, 2, 3, 12]), workers=workers, max_containers=3)
    await before.run_to_failure()
    harmless = SimulatedJob([PLAY] * 20, workers=workers, max_containers=3, ledger=before.ledger)

    await harmless.run()
    for number in (4, 5):
        del before.ledger.committed[key(number)]
    crashing = SimulatedJob(with_crashes(20, [4]), max_containers=3, ledger=before.ledger)

    assert isinstance(await crashing.run_to_failure(), SubmissionError)


@pytest.mark.parametrize("does", [Does.RAISE, Does.SLOW])
async def test_faults_that_neither_end_nor_hang_the_container_are_not_limited(does: Does) -> None:
    job = SimulatedJob([does] * 12, max_containers=2)

    assert await job.run() == dict.fromkeys(range(12), CHARGED_WITH[does])


@WORKERS
async def test_containers_that_end_through_our_fault_do_not_count(workers: int) -> None:
    script = [[Does.CONTAINER_GONE, PLAY] if number % 2 else [PLAY] for number in range(10)]
    job = SimulatedJob(script, workers=workers, max_containers=1, seed=1)

    faults = await job.run()

    assert not any(faults.values())
    assert len(job.policy.containers) > 2


@pytest.mark.parametrize("does", [Does.CRASH_IN_COMPANY, Does.LATE_IN_COMPANY])
async def test_a_policy_that_stands_no_company_is_driven_by_one_worker_at_a_time(does: Does) -> None:
    job = SimulatedJob([does] * 200, workers=4, max_containers=5, seed=3)

    faults = await job.run()

    assert not any(faults.values())
    assert len(job.policy.containers) == 6


# ------------------------------------------------------------------------------ losses and fairness


@WORKERS
async def test_a_connection_lost_with_a_healthy_container_is_charged_at_the_second_lone_time(
    workers: int,
) -> None:
    job = SimulatedJob([[RESET, PLAY], PLAY, RESET, PLAY, PLAY], workers=workers)

    faults = await job.run()

    assert faults == {0: None, 1: None, 2: FaultClass.CONNECTION_LOST, 3: None, 4: None}


@WORKERS
@pytest.mark.parametrize("first", [Does.CONTAINER_GONE, Does.WORKER_DIES, Does.BROKEN_ENVIRONMENT])
async def test_a_loss_through_our_fault_does_not_use_up_the_second_chance(first: Does, workers: int) -> None:
    job = SimulatedJob([[first, RESET, PLAY], PLAY, PLAY], workers=workers)

    assert not any((await job.run()).values())


async def test_a_loss_through_another_ones_crash_does_not_use_up_the_second_chance() -> None:
    job = SimulatedJob([CRASH, [PLAY, RESET, PLAY]], workers=2)

    faults = await job.run()

    assert faults == {0: FaultClass.CRASH, 1: None}
    assert job.cluster.played[key(1)] == 3


async def test_a_policy_that_accepts_no_one_any_more_gets_one_episode_charged() -> None:
    job = SimulatedJob([PLAY, Does.DEAF, PLAY, PLAY, PLAY])

    faults = await job.run()

    assert faults == {0: None, 1: FaultClass.STEP_TIMEOUT, 2: None, 3: None, 4: None}
    assert len(job.policy.containers) == 2


async def test_a_policy_server_that_does_not_come_back_fails_the_job_with_its_reason() -> None:
    job = SimulatedJob([PLAY, Does.DEAF, PLAY, PLAY, PLAY])
    job.policy.replace_errors.append(SubmissionError("the policy server does not answer"))

    error = await job.run_to_failure()

    assert str(error) == "the policy server does not answer"
    assert list(job.ledger.faults.values()).count(FaultClass.STEP_TIMEOUT) == 1


async def test_a_charge_that_came_too_late_is_decided_again() -> None:
    job = SimulatedJob([[CRASH, PLAY]])
    commit = job.ledger.commit

    async def after_another_run(finished: list[object]) -> object:
        job.ledger.runs[key(0)] += 1
        job.ledger.commit = commit  # type: ignore[method-assign]
        return await commit(finished)  # type: ignore[arg-type]

    job.ledger.commit = after_another_run  # type: ignore[method-assign, assignment]

    assert await job.run() == {0: None}


async def test_a_container_that_ends_through_our_fault_makes_no_suspects() -> None:
    job = SimulatedJob([[Does.CONTAINER_GONE, PLAY], PLAY, PLAY, PLAY], workers=4)

    await job.run()

    assert job.cluster.played.total() > 4
    assert any(run.run == 2 for run in job.cluster.in_company)


# ----------------------------------------------------------------------------------- faults of ours


async def test_an_environment_that_always_fails_gives_the_job_back_with_its_text() -> None:
    job = SimulatedJob([PLAY, Does.BROKEN_ENVIRONMENT, PLAY], workers=2)

    error = await job.run_to_failure()

    assert isinstance(error, InfrastructureError)
    assert "no display" in str(error)
    assert len(job.pauses) >= MAX_FRUITLESS_FAULTS
    assert job.pauses[-1] > job.pauses[0]
    assert job.ledger.faults == {0: None, 2: None}


async def test_a_batch_that_one_broken_environment_spoils_is_one_fault() -> None:
    job = SimulatedJob([[Does.BROKEN_ENVIRONMENT, PLAY]] * 16)

    await job.run()

    assert max(job.pauses) <= 0.2, "never two in a row"


@pytest.mark.parametrize("does", [Does.STOPPED, Does.STALE, Does.UNACKNOWLEDGED, Does.CONTAINER_GONE])
async def test_what_never_gets_on_ends_after_a_bounded_number_of_tries(does: Does) -> None:
    job = SimulatedJob([does])

    error = await job.run_to_failure()

    assert isinstance(error, InfrastructureError)
    assert job.cluster.played[key(0)] == MAX_FRUITLESS_FAULTS + 1


@WORKERS
async def test_a_worker_that_dies_is_replaced_and_prepared_again(workers: int) -> None:
    job = SimulatedJob([PLAY, [Does.WORKER_DIES, PLAY], PLAY, PLAY], workers=workers)

    assert not any((await job.run()).values())
    assert len(job.cluster.replaced) == 1


async def test_an_episode_that_was_committed_before_its_worker_died_is_not_run_again() -> None:
    job = SimulatedJob([[Does.WORKER_DIES_AFTER_COMMIT, PLAY], PLAY, PLAY], workers=2)

    await job.run()

    assert job.cluster.played[key(0)] == 1


@WORKERS
async def test_a_new_worker_that_dies_at_once_is_replaced_again(workers: int) -> None:
    job = SimulatedJob([PLAY, [Does.WORKER_DIES, PLAY], PLAY, PLAY], workers=workers)
    job.cluster.replace_errors += [WorkerLost("no node"), WorkerLost("no node")]
    job.cluster.prepare_errors += [WorkerLost("killed while it was prepared")]

    assert not any((await job.run()).values())


@pytest.mark.parametrize("where", ["replace_errors", "prepare_errors"])
async def test_workers_that_never_come_up_give_the_job_back(where: str) -> None:
    job = SimulatedJob([[Does.WORKER_DIES, PLAY]], workers=1)
    getattr(job.cluster, where).extend([WorkerLost("no node")] * 99)

    error = await job.run_to_failure()

    assert isinstance(error, InfrastructureError)
    assert "no node" in str(error)


async def test_a_worker_that_cannot_be_replaced_leaves_its_episodes_to_the_others() -> None:
    job = SimulatedJob([[Does.WORKER_DIES, PLAY], *[PLAY] * 9], workers=2)
    job.cluster.replace_errors += [WorkerLost("no node")] * 4

    assert not any((await job.run()).values())


async def test_a_container_that_cannot_be_asked_is_asked_again() -> None:
    job = SimulatedJob([PLAY, CRASH, PLAY])
    job.policy.evidence_errors.append(InfrastructureError("the API is away"))

    assert await job.run() == {0: None, 1: FaultClass.CRASH, 2: None}


async def test_a_container_that_cannot_be_made_is_tried_again_and_then_gives_the_job_back() -> None:
    job = SimulatedJob([CRASH, PLAY, PLAY])
    job.policy.replace_errors += [InfrastructureError("no room")] * 2
    assert await job.run() == {0: FaultClass.CRASH, 1: None, 2: None}

    hopeless = SimulatedJob([CRASH, PLAY, PLAY])
    hopeless.policy.replace_errors += [InfrastructureError("no room")] * 99

    assert "no room" in str(await hopeless.run_to_failure())


# ------------------------------------------------------------------------------------- how it ends

FENCED, SUBMISSION = Fenced(1, 1), SubmissionError("it does not start")
USAGE, OURS, LOST = UsageError("no such benchmark"), InfrastructureError("no disk"), ValueError("a bug")


@pytest.mark.parametrize(
    ("errors", "gravest"),
    [
        ([OURS, FENCED], FENCED),
        ([SUBMISSION, OURS, FENCED], FENCED),
        ([OURS, SUBMISSION], SUBMISSION),
        ([LOST, OURS, USAGE], USAGE),
        ([LOST, OURS], OURS),
        ([LOST, LOST], LOST),
        ([ExceptionGroup("inner", [OURS, FENCED]), SUBMISSION], FENCED),
    ],
)
async def test_of_errors_at_once_the_gravest_is_raised_bare(
    errors: list[Exception], gravest: Exception
) -> None:
    job = SimulatedJob([PLAY] * 12, workers=len(errors))
    together = asyncio.Barrier(len(errors))

    async def fail(index: int, runs: object) -> object:
        await together.wait()
        raise errors[index]

    job.cluster.run = fail  # type: ignore[method-assign, assignment]

    with pytest.raises(type(gravest)) as caught:
        await job.rollouts.run()
    assert caught.value is gravest


async def test_a_cancelled_job_ends_with_just_that() -> None:
    job = SimulatedJob([PLAY] * 12, workers=3)
    playing = asyncio.Event()

    async def play_for_ever(index: int, runs: object) -> object:
        playing.set()
        return await asyncio.get_running_loop().create_future()

    job.cluster.run = play_for_ever  # type: ignore[method-assign, assignment]
    task = asyncio.create_task(job.rollouts.run())
    await playing.wait()

    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_job_without_missing_episodes_runs_nothing() -> None:
    job = SimulatedJob([])

    await job.rollouts.run()

    assert job.policy.containers == [FakeContainer()]


# --------------------------------------------------------------------------------------------- drain


@WORKERS
async def test_a_drain_lets_what_is_under_way_end_and_begins_nothing_else(workers: int) -> None:
    job = SimulatedJob([PLAY] * 60, workers=workers)
    running = asyncio.create_task(job.run())
    while len(job.ledger.faults) < 3:
        await asyncio.sleep(0)

    await job.rollouts.drain()

    with pytest.raises(HandedOver, match="are left to others"):
        await running
    finished = len(job.ledger.faults)
    assert 3 <= finished < 60
    assert job.board.unfinished == 60 - finished
    assert all(count == 1 for count in job.cluster.played.values())
    assert sum(job.cluster.played.values()) == finished
    assert job.pauses == []


async def test_a_drain_that_comes_when_the_last_episode_is_under_way_completes_the_job() -> None:
    job = SimulatedJob([PLAY])
    running = asyncio.create_task(job.run())
    while not job.cluster.playing:
        await asyncio.sleep(0)

    await job.rollouts.drain()

    assert await running == {0: None}
