from __future__ import annotations

import json
import pickle
import threading
import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import pytest

from orchestrator.actors.episode_logger import EpisodeLogger, RunAbandoned
from orchestrator.actors.episode_runner import (
    EnvironmentFailed,
    EpisodeLimits,
    RunKind,
    RunReport,
    run_episode,
)
from orchestrator.adapters.benchmarks.registry import load_benchmark
from orchestrator.domain.episodes import CommitOutcome, EpisodeRun, FaultClass
from orchestrator.domain.errors import PolicyLate, PolicyLost, PolicyProtocolError, PolicyRaised
from orchestrator.ports import Environment, EpisodeSummary, StepResult
from orchestrator.submission.wire import packb
from tests.unit.actors.rollout_fakes import (
    CARTPOLE,
    LIMITS,
    FakePolicy,
    ScriptedEnvironment,
    a_logger,
    a_run,
    a_step,
    balance,
)

PLAIN_STEPS = [a_step(1.0), a_step(2.0), a_step(4.0, over=True)]


def play(
    environment: Environment,
    policy: FakePolicy | None = None,
    *,
    run: EpisodeRun | None = None,
    logger: EpisodeLogger | None = None,
    limits: EpisodeLimits = LIMITS,
    succeeded: Any = lambda summary: True,
    stop: threading.Event | None = None,
    **clock: Any,
) -> RunReport:
    run = run or a_run()
    return run_episode(
        environment,
        policy or FakePolicy(lambda _: 1),
        run,
        logger or a_logger(run),
        limits,
        succeeded,
        stop or threading.Event(),
        **clock,
    )


def plain_cartpole(seed: int) -> tuple[float, int, list[int]]:
    """Return, length and actions of a loop that knows nothing of us."""
    environment = gymnasium.make(CARTPOLE)
    observation, _ = environment.reset(seed=seed)
    total, actions, over = 0.0, [], False
    while not over:
        actions.append(balance({"observation": observation}))
        observation, reward, terminated, truncated, _ = environment.step(actions[-1])
        total += float(reward)
        over = terminated or truncated
    environment.close()
    return total, len(actions), actions


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
def test_an_episode_equals_a_plain_loop(seed: int) -> None:
    benchmark = load_benchmark("gymnasium", CARTPOLE, {}, None)
    environment = benchmark.make(CARTPOLE)
    total, steps, actions = plain_cartpole(seed)

    report = play(
        environment,
        FakePolicy(),
        run=a_run(seed=seed),
        succeeded=partial(benchmark.succeeded, CARTPOLE),
    )
    environment.close()

    assert report.kind is RunKind.FINISHED
    finished = report.finished
    assert finished is not None
    assert (finished.episode_return, finished.steps) == (total, steps)
    assert finished.success is (total >= 475)
    assert zlib.decompress(finished.action_trace) == b"".join(map(packb, actions))
    assert len(finished.step_messages) == steps


class ChangesItsActions(ScriptedEnvironment):
    """Works on the arrays that it is given, as some environments do."""

    def step(self, action: Any) -> StepResult:
        action["arm"] *= 3.0
        action["pair"][1][:] = 7.0
        return super().step(action)


def test_what_is_recorded_is_what_the_environment_was_given_whatever_it_does_with_it() -> None:
    arm = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
    space = gymnasium.spaces.Dict({"arm": arm, "pair": gymnasium.spaces.Tuple((arm, arm))})
    half = np.full(2, 0.5, np.float32)

    report = play(
        ChangesItsActions([a_step(over=True)], space),
        FakePolicy(lambda _: {"arm": half, "pair": [half, half]}),
    )

    assert report.finished is not None
    assert zlib.decompress(report.finished.action_trace) == packb({"arm": half, "pair": [half, half]})
    logged = json.loads(report.finished.step_messages[0])["action"]["value"]
    assert logged["arm"]["value"] == [0.5, 0.5]


def test_the_environment_gets_its_seed_and_the_policy_only_its_own() -> None:
    environment, policy = ScriptedEnvironment(PLAIN_STEPS), FakePolicy(lambda _: 1)

    play(environment, policy, run=a_run(episode_id=5, seed=42))

    assert environment.seeds == [42]
    assert policy.resets == [(5, 1042, LIMITS.reset_timeout_seconds)]
    assert policy.timeouts == [LIMITS.step_timeout_seconds] * 3


@pytest.mark.parametrize(("over", "cut"), [(True, False), (False, True), (True, True)])
def test_terminated_and_truncated_are_kept_apart(over: bool, cut: bool) -> None:
    report = play(ScriptedEnvironment([a_step(), a_step(over=over, cut=cut)]))

    assert report.finished is not None
    assert (report.finished.terminated, report.finished.truncated) == (over, cut)
    last = json.loads(report.finished.step_messages[-1])
    assert (last["done"], last["truncated"]) == (True, cut)


def test_our_own_step_limit_truncates() -> None:
    report = play(ScriptedEnvironment([a_step()] * 10), limits=replace(LIMITS, max_steps=4))

    finished = report.finished
    assert finished is not None
    assert (finished.steps, finished.terminated, finished.truncated) == (4, False, True)
    assert json.loads(finished.step_messages[-1])["truncated"] is True


@pytest.mark.parametrize(
    ("infos", "expected"),
    [
        ([{}, {}], None),
        ([{"success": 0.0}, {}], False),
        ([{"success": np.float64(1.0)}, {"success": False}], True),
        ([{"success": False}, {"success": True}], True),
    ],
)
def test_success_in_any_info_reaches_the_rule(infos: list[dict[str, Any]], expected: bool | None) -> None:
    seen: list[EpisodeSummary] = []

    def rule(summary: EpisodeSummary) -> bool:
        seen.append(summary)
        return False

    steps = [a_step(1.5, over=index == 1, **info) for index, info in enumerate(infos)]
    report = play(ScriptedEnvironment(steps), succeeded=rule)

    assert seen == [EpisodeSummary(3.0, 2, True, False, expected)]
    assert report.finished is not None
    assert report.finished.success is False


@pytest.mark.parametrize(("horizon", "asked"), [(1, 6), (2, 3), (3, 2), (50, 2)])
def test_of_a_chunk_the_horizon_is_played_before_the_policy_is_asked_again(horizon: int, asked: int) -> None:
    steps = [*[a_step()] * 5, a_step(over=True)]
    environment = ScriptedEnvironment(steps)
    policy = FakePolicy(lambda _: np.array([10, 11, 12]))

    play(environment, policy, limits=replace(LIMITS, action_horizon=horizon))

    chunk = [10, 11, 12][:horizon]
    assert environment.actions == (chunk * 6)[:6]
    assert len(policy.timeouts) == asked


def test_actions_out_of_bounds_are_clipped_and_counted() -> None:
    environment = ScriptedEnvironment(PLAIN_STEPS, gymnasium.spaces.Box(-1, 1, (2,), np.float32))
    replies = iter([np.array([3.0, -2.0]), np.array([1.0, 0.5]), np.array([0.0, -9.0])])

    report = play(environment, FakePolicy(lambda _: next(replies)))

    assert report.finished is not None
    assert report.finished.metrics["clipped_actions"] == 2.0
    assert [action.tolist() for action in environment.actions] == [[1.0, -1.0], [1.0, 0.5], [0.0, -1.0]]


def test_an_action_out_of_bounds_fails_the_episode_where_it_is_not_to_be_clipped() -> None:
    environment = ScriptedEnvironment(PLAIN_STEPS, gymnasium.spaces.Box(-1, 1, (2,), np.float32))
    replies = iter([np.array([1.0, -1.0]), np.array([0.5, -7.25])])

    report = play(environment, FakePolicy(lambda _: next(replies)), limits=replace(LIMITS, clips=False))

    assert report.kind is RunKind.SUBMISSION_FAULT
    assert report.finished is not None
    assert (report.finished.fault, report.finished.steps) == (FaultClass.INVALID_ACTION, 1)
    assert report.detail == ("step 1: the action cannot be used: [1] = -7.25 is below its lower bound -1.0")


@pytest.mark.parametrize(
    ("error", "kind", "fault"),
    [
        (PolicyProtocolError("bad frame"), RunKind.SUBMISSION_FAULT, FaultClass.PROTOCOL_ERROR),
        (PolicyRaised("Traceback"), RunKind.SUBMISSION_FAULT, FaultClass.POLICY_EXCEPTION),
        (PolicyLost("reset"), RunKind.POLICY_LOST, FaultClass.CONNECTION_LOST),
        (PolicyLate("30 s"), RunKind.POLICY_LATE, FaultClass.STEP_TIMEOUT),
    ],
)
@pytest.mark.parametrize("at_reset", [True, False])
def test_what_the_policy_does_wrong_is_a_failure_with_its_class(
    error: Exception, kind: RunKind, fault: FaultClass, at_reset: bool
) -> None:
    replies = iter([1, 1, error])
    policy = FakePolicy(lambda _: next(replies), reset_error=error if at_reset else None)

    report = play(ScriptedEnvironment([a_step()] * 9), policy)

    assert report.kind is kind
    assert str(error) in report.detail
    finished = report.finished
    assert finished is not None
    assert (finished.fault, finished.success, finished.steps) == (fault, False, 0 if at_reset else 2)
    assert (finished.terminated, finished.truncated) == (False, False)
    assert len(finished.step_messages) == finished.steps
    assert json.loads(finished.episode_message)["extra_metrics"]["fault"] == fault.value


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        (np.array([np.nan, 0.0]), FaultClass.NON_FINITE_ACTION),
        (np.zeros(3), FaultClass.INVALID_ACTION),
        (np.zeros((0, 2)), FaultClass.INVALID_ACTION),
        ("left", FaultClass.INVALID_ACTION),
        (None, FaultClass.INVALID_ACTION),
    ],
)
def test_an_action_that_is_none_is_a_submission_fault(reply: Any, fault: FaultClass) -> None:
    environment = ScriptedEnvironment(PLAIN_STEPS, gymnasium.spaces.Box(-1, 1, (2,), np.float32))

    report = play(environment, FakePolicy(lambda _: reply))

    assert report.kind is RunKind.SUBMISSION_FAULT
    assert report.finished is not None
    assert (report.finished.fault, report.finished.success) == (fault, False)
    assert environment.actions == []


def test_rows_of_a_chunk_that_are_not_played_are_not_judged() -> None:
    environment = ScriptedEnvironment(PLAIN_STEPS, gymnasium.spaces.Box(-1, 1, (1,), np.float32))

    report = play(environment, FakePolicy(lambda _: np.array([[0.5], [np.nan]])))

    assert report.kind is RunKind.FINISHED


@pytest.mark.parametrize(
    "environment",
    [
        ScriptedEnvironment([a_step(), ZeroDivisionError("broken simulator")]),
        ScriptedEnvironment([], reset_error=ZeroDivisionError("broken simulator")),
        ScriptedEnvironment([a_step(success=np.zeros(2))]),
    ],
)
def test_what_the_environment_raises_is_ours(environment: ScriptedEnvironment) -> None:
    report = play(environment)

    assert (report.kind, report.finished) == (RunKind.ENVIRONMENT_ERROR, None)
    assert report.detail.startswith("Traceback")
    assert "Error" in report.detail


def test_a_broken_success_rule_is_ours() -> None:
    def rule(summary: EpisodeSummary) -> bool:
        raise KeyError("no such task")

    report = play(ScriptedEnvironment(PLAIN_STEPS), succeeded=rule)

    assert report.kind is RunKind.ENVIRONMENT_ERROR
    assert "no such task" in report.detail


class Clock:
    """A monotonic clock that the policy moves."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def monotonic(self) -> float:
        return self.seconds

    def policy(self, *seconds: float) -> FakePolicy:
        times = iter(seconds)

        def reply(_: Any) -> int:
            self.seconds += next(times)
            return 1

        return FakePolicy(reply)


def test_an_episode_whose_answers_take_too_long_together_is_undecided() -> None:
    clock = Clock()
    limits = EpisodeLimits(step_timeout_seconds=4, episode_timeout_seconds=10, reset_timeout_seconds=1)
    policy = clock.policy(3, 3, 3, 1, 1)

    report = play(ScriptedEnvironment([a_step()] * 9), policy, limits=limits, monotonic=clock.monotonic)

    # Episodes of other workers may have slowed it down: only a lone run is charged.
    assert report.kind is RunKind.POLICY_LATE
    assert "more than 10 s" in report.detail
    assert report.finished is not None
    assert (report.finished.fault, report.finished.steps) == (FaultClass.EPISODE_TIMEOUT, 4)
    assert len(report.finished.step_messages) == 4
    assert policy.timeouts == [4, 4, 4, 1]


def test_silence_at_the_end_of_the_episodes_time_is_undecided_and_names_the_episode_timeout() -> None:
    clock = Clock()
    limits = EpisodeLimits(step_timeout_seconds=4, episode_timeout_seconds=5, reset_timeout_seconds=1)

    def reply(_: Any) -> Any:
        clock.seconds += 3
        return 1 if clock.seconds < 105 else PolicyLate("no reply")

    report = play(
        ScriptedEnvironment([a_step()] * 9), FakePolicy(reply), limits=limits, monotonic=clock.monotonic
    )

    assert report.kind is RunKind.POLICY_LATE
    assert report.finished is not None
    assert report.finished.fault is FaultClass.EPISODE_TIMEOUT


def test_time_of_the_environment_is_not_charged_to_the_policy() -> None:
    clock = Clock()

    class SlowEnvironment(ScriptedEnvironment):
        def step(self, action: Any) -> Any:
            clock.seconds += 1000
            return super().step(action)

    report = play(SlowEnvironment(PLAIN_STEPS), clock.policy(1, 1, 1), monotonic=clock.monotonic)

    assert report.kind is RunKind.FINISHED
    assert report.finished is not None
    assert report.finished.metrics["policy_latency_max_seconds"] == 1.0


def test_a_process_that_was_frozen_charges_no_more_than_the_deadline_of_the_answer() -> None:
    clock = Clock()
    limits = EpisodeLimits(step_timeout_seconds=4, episode_timeout_seconds=10, reset_timeout_seconds=1)

    report = play(
        ScriptedEnvironment(PLAIN_STEPS), clock.policy(500, 1, 1), limits=limits, monotonic=clock.monotonic
    )

    assert report.kind is RunKind.FINISHED


def test_a_stopped_worker_ends_the_run_after_its_step_and_reports_no_outcome() -> None:
    stop = threading.Event()
    environment = ScriptedEnvironment([a_step()] * 9)

    def reply(_: Any) -> int:
        if len(environment.actions) == 2:
            stop.set()
        return 1

    report = play(environment, FakePolicy(reply), stop=stop)

    assert (report.kind, report.finished, report.commit) == (RunKind.STOPPED, None, None)
    assert len(environment.actions) == 3


def test_a_run_that_became_stale_is_abandoned() -> None:
    def stage(run: EpisodeRun, part: int, messages: Sequence[bytes]) -> None:
        raise RunAbandoned("a later run", CommitOutcome.STALE)

    report = play(ScriptedEnvironment([a_step()] * 9), logger=a_logger(byte_cap=500, stage=stage))

    assert (report.kind, report.commit, report.finished) == (RunKind.STOPPED, CommitOutcome.STALE, None)


def test_a_fault_of_a_run_that_became_stale_is_not_reported_as_one() -> None:
    def stage(run: EpisodeRun, part: int, messages: Sequence[bytes]) -> None:
        raise RunAbandoned("a later run", CommitOutcome.STALE)

    replies = iter([1, 1, PolicyLost("reset")])
    logger = a_logger(step_log_interval=10, byte_cap=500, stage=stage)
    report = play(ScriptedEnvironment([a_step()] * 9), FakePolicy(lambda _: next(replies)), logger=logger)

    assert (report.kind, report.commit) == (RunKind.STOPPED, CommitOutcome.STALE)


def test_reports_and_errors_pickle() -> None:
    report = play(ScriptedEnvironment(PLAIN_STEPS))
    error = pickle.loads(pickle.dumps(EnvironmentFailed("Traceback ...")))

    assert pickle.loads(pickle.dumps(report)) == report
    assert (str(error), error.text) == ("Traceback ...", "Traceback ...")
