from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import structlog

from orchestrator import logging as orchestrator_logging
from orchestrator.actors.episode_publisher import PublishingStopped
from orchestrator.actors.episode_runner import RunKind
from orchestrator.actors.rollout_worker import RolloutWorkerActor, RolloutWorkerCore, WorkerSetup
from orchestrator.actors.worker_resources import EnvironmentCache
from orchestrator.adapters.benchmarks.registry import load_benchmark
from orchestrator.domain.episodes import CommitOutcome, EpisodeRun, FaultClass
from orchestrator.domain.errors import (
    InfrastructureError,
    PolicyLate,
    PolicyLost,
    PolicyProtocolError,
    UsageError,
)
from orchestrator.domain.messages import EpisodeDataMessage
from orchestrator.ports import Benchmark
from tests.unit.actors.rollout_fakes import (
    CARTPOLE,
    LIMITS,
    FakeConnector,
    FakePolicy,
    MemoryPublisher,
    ScriptedBenchmark,
    ScriptedEnvironment,
    a_job,
    a_run,
    a_step,
)

TWO_STEPS = [a_step(), a_step(over=True)]

Worker = Callable[..., RolloutWorkerCore]


def no_sink() -> Any:
    raise ValueError("there is no actor of that name")


def a_setup(connector: FakeConnector | None = None, **changes: Any) -> WorkerSetup:
    setup = WorkerSetup(job=a_job(), connector=connector or FakeConnector(), limits=LIMITS, find_sink=no_sink)
    return replace(setup, **changes)


def scripted() -> ScriptedBenchmark:
    return ScriptedBenchmark(lambda _: ScriptedEnvironment(TWO_STEPS))


def runs(*episode_ids: int, task_id: str = "a") -> list[EpisodeRun]:
    return [a_run(task_id, episode_id) for episode_id in episode_ids]


def one_action(_: Any) -> int:
    return 1


@pytest.fixture
def worker() -> Iterator[Worker]:
    """Makes workers that are closed after the test."""
    made: list[tuple[RolloutWorkerCore, EnvironmentCache]] = []

    def make(
        benchmark: Benchmark | None = None,
        connector: FakeConnector | None = None,
        publisher: MemoryPublisher | None = None,
        **changes: Any,
    ) -> RolloutWorkerCore:
        environments = EnvironmentCache(benchmark or scripted())
        setup = a_setup(connector or FakeConnector(lambda: FakePolicy(one_action)), **changes)
        core = RolloutWorkerCore(setup, environments, publisher or MemoryPublisher(), threading.Event())
        made.append((core, environments))
        return core

    yield make
    for core, environments in made:
        core.close()
        environments.close()


def test_real_episodes_are_committed_before_the_call_returns(worker: Worker) -> None:
    publisher = MemoryPublisher()
    core = worker(load_benchmark("gymnasium", CARTPOLE, {}, None), FakeConnector(FakePolicy), publisher)

    reports = core.run([a_run(CARTPOLE, index, seed=index) for index in range(4)])

    assert [report.kind for report in reports] == [RunKind.FINISHED] * 4
    assert [report.commit for report in reports] == [CommitOutcome.COMMITTED] * 4
    assert [report.run.episode_id for report in reports] == [0, 1, 2, 3]
    for report in reports:
        committed = publisher.committed[report.run.key]
        assert report.finished is not None
        assert report.finished.steps == committed.steps == len(committed.step_messages) > 50
        assert (report.finished.step_messages, report.finished.action_trace) == ((), b"")


def test_submission_faults_are_committed_and_the_rest_goes_on(worker: Worker) -> None:
    replies = iter([1, PolicyProtocolError("bad frame"), 1, 1])
    connector = FakeConnector(lambda: FakePolicy(lambda _: next(replies)))
    publisher = MemoryPublisher()

    reports = worker(connector=connector, publisher=publisher).run(runs(0, 1))

    assert [report.kind for report in reports] == [RunKind.SUBMISSION_FAULT, RunKind.FINISHED]
    assert [report.commit for report in reports] == [CommitOutcome.COMMITTED] * 2
    assert [episode.fault for episode in publisher.committed.values()] == [FaultClass.PROTOCOL_ERROR, None]


def test_a_worker_that_drains_ends_the_run_in_hand_and_begins_no_other() -> None:
    drain = threading.Event()

    def act(_: Any) -> int:
        drain.set()  # in the middle of the first episode
        return 1

    publisher = MemoryPublisher()
    environments = EnvironmentCache(scripted())
    setup = a_setup(FakeConnector(lambda: FakePolicy(act)))
    core = RolloutWorkerCore(setup, environments, publisher, threading.Event(), drain)

    reports = core.run(runs(0, 1, 2))
    core.close()
    environments.close()

    assert [report.kind for report in reports] == [RunKind.FINISHED, RunKind.STOPPED, RunKind.STOPPED]
    assert reports[0].commit is CommitOutcome.COMMITTED
    assert len(publisher.committed) == 1


def test_one_connection_serves_all_episodes_of_a_policy_that_can_be_reset(worker: Worker) -> None:
    connector = FakeConnector(lambda: FakePolicy(one_action))

    worker(connector=connector).run(runs(0, 1, 2))

    assert len(connector.opened) == 1
    assert [episode for episode, _, _ in connector.opened[0].resets] == [0, 1, 2]


def test_each_episode_gets_a_fresh_connection_where_the_policy_cannot_be_reset(worker: Worker) -> None:
    connector = FakeConnector(lambda: FakePolicy(one_action, supports_reset=False))

    worker(connector=connector).run(runs(0, 1, 2))

    assert len(connector.opened) == 3
    assert all(policy.closed for policy in connector.opened)


def test_a_stateless_policy_keeps_its_connection(worker: Worker) -> None:
    connector = FakeConnector(lambda: FakePolicy(one_action, supports_reset=False))

    worker(connector=connector, job=a_job(stateless=True)).run(runs(0, 1, 2))

    assert len(connector.opened) == 1


@pytest.mark.parametrize("reply", [PolicyProtocolError("bad frame"), "no action"])
def test_a_connection_on_which_an_episode_failed_is_never_used_again(worker: Worker, reply: Any) -> None:
    connector = FakeConnector(lambda: FakePolicy(lambda _: reply))

    worker(connector=connector).run(runs(0, 1))

    assert len(connector.opened) == 2
    assert all(policy.closed for policy in connector.opened)


@pytest.mark.parametrize(
    ("error", "kind", "fault"),
    [
        (PolicyLost("reset"), RunKind.POLICY_LOST, FaultClass.CONNECTION_LOST),
        (PolicyLate("late"), RunKind.POLICY_LATE, FaultClass.STEP_TIMEOUT),
    ],
)
def test_an_undecided_run_is_not_committed_and_ends_the_call(
    worker: Worker, error: Exception, kind: RunKind, fault: FaultClass
) -> None:
    replies = iter([1, 1, 1, error])
    connector = FakeConnector(lambda: FakePolicy(lambda _: next(replies)))
    publisher = MemoryPublisher()

    reports = worker(connector=connector, publisher=publisher).run(runs(0, 1, 2, 3))

    assert [report.kind for report in reports] == [RunKind.FINISHED, kind, RunKind.STOPPED, RunKind.STOPPED]
    assert [key.episode_id for key in publisher.committed] == [0]
    supposed = reports[1].finished
    assert supposed is not None
    assert (supposed.fault, supposed.steps, len(supposed.step_messages)) == (fault, 1, 1)
    assert reports[1].commit is None
    assert connector.opened[0].closed


def test_a_policy_that_cannot_be_reached_is_lost_before_the_first_step(worker: Worker) -> None:
    connector = FakeConnector(lambda: PolicyLate("no metadata within 10 s"))

    report, skipped = worker(connector=connector).run(runs(0, 1))

    assert (report.kind, skipped.kind) == (RunKind.POLICY_LOST, RunKind.STOPPED)
    assert "no metadata" in report.detail
    assert report.finished is not None
    assert (report.finished.steps, report.finished.success) == (0, False)


def test_an_episode_that_the_supervisor_charged_is_committed_with_its_verdict(worker: Worker) -> None:
    publisher = MemoryPublisher()
    core = worker(
        connector=FakeConnector(lambda: FakePolicy(lambda _: PolicyLost("reset"))), publisher=publisher
    )
    (report,) = core.run(runs(0))
    assert report.finished is not None

    verdict = replace(report.finished, fault=FaultClass.OUT_OF_MEMORY, fault_detail="killed")
    outcomes = [core.settle(verdict), core.settle(verdict)]

    committed = publisher.committed[report.run.key]
    message = EpisodeDataMessage.model_validate_json(committed.episode_message)
    assert outcomes[0] is CommitOutcome.COMMITTED
    assert committed.fault is FaultClass.OUT_OF_MEMORY
    assert message.extra_metrics is not None
    assert message.extra_metrics["fault"] == "out_of_memory"


def test_an_environment_that_raised_is_closed_and_made_anew(worker: Worker) -> None:
    scripts = iter([[ZeroDivisionError("broken")], TWO_STEPS])
    benchmark = ScriptedBenchmark(lambda _: ScriptedEnvironment(next(scripts)))

    reports = worker(benchmark).run(runs(0, 1))

    assert [report.kind for report in reports] == [RunKind.ENVIRONMENT_ERROR, RunKind.FINISHED]
    assert [environment.closed for _, environment in benchmark.made] == [True, False]


def test_an_environment_that_cannot_be_made_is_ours(worker: Worker) -> None:
    def make(task_id: str) -> ScriptedEnvironment:
        raise FileNotFoundError("no such model")

    (report,) = worker(ScriptedBenchmark(make)).run(runs(0))

    assert (report.kind, report.finished) == (RunKind.ENVIRONMENT_ERROR, None)
    assert "no such model" in report.detail


def test_an_environment_is_made_once_for_each_task(worker: Worker) -> None:
    benchmark = scripted()

    worker(benchmark).run([*runs(0, 1, task_id="a"), *runs(0, task_id="b"), *runs(2, task_id="a")])

    assert [task_id for task_id, _ in benchmark.made] == ["a", "b"]


def test_the_least_recently_used_environment_is_closed_when_there_are_too_many() -> None:
    benchmark = scripted()
    cache = EnvironmentCache(benchmark, capacity=2)

    for task_id in ["a", "b", "a", "c"]:
        cache.get(task_id)
    closed = {task_id for task_id, environment in benchmark.made if environment.closed}
    cache.close()

    assert closed == {"b"}
    assert all(environment.closed for _, environment in benchmark.made)


def test_an_environment_that_does_not_close_harms_nobody() -> None:
    class Clinging(ScriptedEnvironment):
        def close(self) -> None:
            super().close()
            raise OSError("cannot close")

    benchmark = ScriptedBenchmark(lambda _: Clinging(TWO_STEPS))
    cache = EnvironmentCache(benchmark)
    cache.get("a")
    cache.get("b")

    cache.close()

    assert [environment.closed for _, environment in benchmark.made] == [True, True]


def test_the_next_episode_is_stepped_while_the_last_one_commits(worker: Worker) -> None:
    publisher = MemoryPublisher()
    publisher.gate.clear()
    asked: list[int] = []

    def reply(_: Any) -> int:
        asked.append(1)
        if len(asked) == 3:  # the second episode's first step: only it lets the first one's commit go on
            publisher.gate.set()
        return 1

    core = worker(connector=FakeConnector(lambda: FakePolicy(reply)), publisher=publisher)
    reports = core.run(runs(0, 1))

    assert [report.commit for report in reports] == [CommitOutcome.COMMITTED] * 2


def test_a_long_episode_is_staged_in_parts(worker: Worker) -> None:
    publisher = MemoryPublisher()
    benchmark = ScriptedBenchmark(lambda _: ScriptedEnvironment([*[a_step()] * 30, a_step(over=True)]))

    (report,) = worker(benchmark, publisher=publisher, byte_cap=2000).run(runs(0))

    committed = publisher.committed[report.run.key]
    assert committed.staged_parts == len(publisher.staged) > 2
    staged = sum(len(messages) for _, _, messages in publisher.staged)
    assert staged + len(committed.step_messages) == 31


def test_a_run_whose_part_is_refused_as_stale_is_abandoned(worker: Worker) -> None:
    publisher = MemoryPublisher(stale=True)
    benchmark = ScriptedBenchmark(lambda _: ScriptedEnvironment([a_step()] * 30))

    (report,) = worker(benchmark, publisher=publisher, byte_cap=2000).run(runs(0))

    assert (report.kind, report.commit) == (RunKind.STOPPED, CommitOutcome.STALE)
    assert 0 < len(benchmark.made[0][1].actions) < 30
    assert publisher.committed == {}


def test_a_stopped_worker_begins_nothing_more(worker: Worker) -> None:
    benchmark = ScriptedBenchmark(lambda _: ScriptedEnvironment([a_step()] * 30))
    core = worker(benchmark, FakeConnector(lambda: FakePolicy(lambda _: core.stop() or 1)))

    reports = core.run(runs(0, 1))

    assert [report.kind for report in reports] == [RunKind.STOPPED] * 2
    assert benchmark.made[0][1].actions == [1]


def test_a_sink_that_never_acknowledged_leaves_the_commit_open(worker: Worker) -> None:
    publisher = MemoryPublisher(error=PublishingStopped("stopped before the sink acknowledged"))

    (report,) = worker(publisher=publisher).run(runs(0))

    assert (report.kind, report.commit) == (RunKind.FINISHED, None)


def test_staging_that_was_given_up_is_no_fault_of_the_environment(worker: Worker) -> None:
    publisher = MemoryPublisher(error=PublishingStopped("stopped before the sink acknowledged"))

    (report,) = worker(publisher=publisher, byte_cap=10).run(runs(0))

    assert (report.kind, report.commit) == (RunKind.STOPPED, None)


def test_an_episode_that_the_sink_refuses_fails_the_call_loudly(worker: Worker) -> None:
    publisher = MemoryPublisher(error=TypeError("a bug in the sink"))

    with pytest.raises(TypeError, match="a bug in the sink"):
        worker(publisher=publisher).run(runs(0))


def test_a_setup_pickles() -> None:
    setup = a_setup(FakeConnector(FakePolicy))

    assert pickle.loads(pickle.dumps(setup)) == setup


# ------------------------------------------------------------------------------------------ the actor


@pytest.fixture
def clean_logging() -> Iterator[None]:
    yield
    structlog.reset_defaults()
    orchestrator_logging._process_fields.clear()


@pytest.mark.usefixtures("clean_logging")
async def test_the_actor_answers_pings_while_it_steps() -> None:
    asked, go_on = threading.Event(), threading.Event()

    def reply(_: Any) -> Exception:
        asked.set()
        assert go_on.wait(20)
        return PolicyLost("reset")

    actor = RolloutWorkerActor(7, 1)
    await actor.prepare(a_setup(FakeConnector(lambda: FakePolicy(reply))))
    running = asyncio.create_task(actor.run([a_run(CARTPOLE)]))
    assert await asyncio.to_thread(asked.wait, 20)

    ping = await actor.ping()
    go_on.set()
    (report,) = await running
    await actor.stop()

    assert ping == "RolloutWorker(job 7, worker 1, 0 episodes, playing CartPole-v1 #3)"
    assert report.kind is RunKind.POLICY_LOST


@pytest.mark.usefixtures("clean_logging")
async def test_the_actor_moves_to_the_next_container_and_keeps_its_environments() -> None:
    actor = RolloutWorkerActor()
    first = FakeConnector(lambda: FakePolicy(lambda _: PolicyLost("reset")))
    second = FakeConnector(lambda: FakePolicy(lambda _: PolicyLate("late")))

    setup = a_setup(first)
    await actor.prepare(setup)
    environments = actor._environments
    await actor.run([a_run(CARTPOLE)])
    await actor.prepare(replace(setup, connector=second))
    (report,) = await actor.run([a_run(CARTPOLE)])

    assert report.kind is RunKind.POLICY_LATE
    assert actor._environments is environments
    await actor.stop()


async def test_the_actor_describes_its_benchmark_before_it_is_prepared() -> None:
    actor = RolloutWorkerActor()

    description = await actor.describe(a_job())
    await actor.stop()

    assert description.task_ids == (CARTPOLE,)
    assert description.env_specs[0]["env_name"] == CARTPOLE
    assert "gymnasium" in description.versions


@pytest.mark.usefixtures("clean_logging")
async def test_a_job_with_an_unknown_benchmark_is_refused_by_prepare() -> None:
    actor = RolloutWorkerActor()
    job = a_job().model_copy(update={"benchmark_name": "CartPole-v9"})

    with pytest.raises(UsageError, match="CartPole"):
        await actor.prepare(a_setup(job=job))
    await actor.stop()


async def test_an_actor_that_was_not_prepared_says_so() -> None:
    actor = RolloutWorkerActor(7)

    assert repr(actor) == "RolloutWorker(job 7, worker 0)"
    with pytest.raises(InfrastructureError, match="not prepared"):
        await actor.run([a_run()])
    await actor.stop()
    await actor.stop()
