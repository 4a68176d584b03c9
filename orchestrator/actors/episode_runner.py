"""Plays one episode run: environment and policy in turns until it ends or one fails. Blocking, no Ray."""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

import numpy as np

from orchestrator.actors.episode_logger import EpisodeLogger, RunAbandoned
from orchestrator.adapters.benchmarks.spaces import InvalidAction, NonFiniteAction, from_wire, split_chunk
from orchestrator.domain.episodes import CommitOutcome, EpisodeRun, FaultClass, FinishedEpisode, shortened
from orchestrator.domain.errors import (
    AuthenticationFailed,
    InfrastructureError,
    OrchestratorError,
    PolicyError,
    PolicyLate,
    PolicyProtocolError,
    PolicyRaised,
)
from orchestrator.ports import Environment, EpisodeSummary, Observation, PolicyConnection, StepResult

MAX_DETAIL_CHARS = 8192

Answer = TypeVar("Answer")
SuccessRule = Callable[[EpisodeSummary], bool]


class RunKind(StrEnum):
    """What came of an episode run, as far as the worker can tell."""

    FINISHED = "finished"
    SUBMISSION_FAULT = "submission_fault"  # certainly theirs
    POLICY_LOST = "policy_lost"  # undecided: the container's evidence says whose fault it was
    POLICY_LATE = "policy_late"  # undecided, as above: an answer, or all of the episode's, took too long
    ENVIRONMENT_ERROR = "environment_error"  # ours
    STOPPED = "stopped"  # not played to its end, for no fault at all: stopped, skipped or stale


UNDECIDED = frozenset({RunKind.POLICY_LOST, RunKind.POLICY_LATE})


@dataclass(frozen=True, slots=True)
class EpisodeLimits:
    """Deadlines and lengths of one episode.

    `step_timeout_seconds` bounds one answer of the policy, `reset_timeout_seconds` its answer to a reset.
    `episode_timeout_seconds` bounds the sum of its answers: time that the environment or the publishing takes
    is ours, and never charged to a submission. `max_steps` truncates; None leaves that to the environment. Of
    a chunk of actions, `action_horizon` are played before the policy is asked again. `clips` says whether
    actions out of bounds are moved to them, or fail the episode.
    """

    step_timeout_seconds: float
    episode_timeout_seconds: float
    reset_timeout_seconds: float
    max_steps: int | None = None
    action_horizon: int = 1
    clips: bool = True


@dataclass(frozen=True, slots=True)
class RunReport:
    """What a worker tells the supervisor about one episode run.

    `finished` is the outcome of FINISHED and SUBMISSION_FAULT runs, without its telemetry once published. For
    POLICY_LOST and POLICY_LATE it is the failure that the run becomes if the supervisor charges it, telemetry
    included. `commit` says what the ledger did; None where nothing was published. `place` is where in the
    episode a policy failed ("step 3"), and the beginning of `detail`.
    """

    run: EpisodeRun
    kind: RunKind
    detail: str = ""
    finished: FinishedEpisode | None = None
    commit: CommitOutcome | None = None
    place: str = ""


def run_episode(
    environment: Environment,
    policy: PolicyConnection,
    run: EpisodeRun,
    logger: EpisodeLogger,
    limits: EpisodeLimits,
    succeeded: SuccessRule,
    stop: threading.Event,
    monotonic: Callable[[], float] = time.monotonic,
) -> RunReport:
    """Play the run to its end and report; what environment and policy raise is in the report.

    After any report but FINISHED the policy connection must not be used again; after ENVIRONMENT_ERROR the
    environment must not either.

    Raises:
        Exception: only what `logger` passes on from staging, apart from `RunAbandoned`.
    """
    episode = _Episode(environment, policy, run, logger, limits, stop, monotonic)
    try:
        episode.play()
        success = bool(simulated(succeeded, _summary(logger)))
        finished = logger.finish(success=success, fault=None, fault_detail=None)
        return RunReport(run, RunKind.FINISHED, finished=finished)
    except RunAbandoned as abandoned:
        return RunReport(run, RunKind.STOPPED, abandoned.reason, commit=abandoned.commit)
    except _Fault as fault:
        return fault_report(run, logger, fault.kind, fault.fault, fault.place, fault.words)
    except EnvironmentFailed as failure:
        return RunReport(run, RunKind.ENVIRONMENT_ERROR, failure.text)


def simulated(call: Callable[..., Answer], *arguments: Any) -> Answer:
    """What the benchmark's code gives.

    Raises:
        EnvironmentFailed: it raised, whatever it was; holds the traceback.
    """
    try:
        return call(*arguments)
    except Exception as error:
        raise EnvironmentFailed(traceback.format_exc()[-MAX_DETAIL_CHARS:]) from error


def fault_report(
    run: EpisodeRun, logger: EpisodeLogger, kind: RunKind, fault: FaultClass, place: str, words: str
) -> RunReport:
    """The report of a run that ends as a failure, or will if the supervisor charges it."""
    detail = shortened(f"{place}: {words}", MAX_DETAIL_CHARS)
    try:
        finished = logger.finish(success=False, fault=fault, fault_detail=detail)
    except RunAbandoned as abandoned:
        return RunReport(run, RunKind.STOPPED, abandoned.reason, commit=abandoned.commit)
    return RunReport(run, kind, detail, finished, place=place)


def fault_of(error: PolicyError) -> tuple[RunKind, FaultClass]:
    """How an error of an open connection is reported: what a peer *said* is certain, its silence is not."""
    if isinstance(error, PolicyRaised):
        return RunKind.SUBMISSION_FAULT, FaultClass.POLICY_EXCEPTION
    if isinstance(error, PolicyProtocolError):
        return RunKind.SUBMISSION_FAULT, FaultClass.PROTOCOL_ERROR
    if isinstance(error, PolicyLate):
        return RunKind.POLICY_LATE, FaultClass.STEP_TIMEOUT
    return RunKind.POLICY_LOST, FaultClass.CONNECTION_LOST


def in_words(error: PolicyError) -> str:
    """What a policy did wrong, for the submission's author."""
    if isinstance(error, PolicyRaised):
        return f"the policy raised an exception:\n{error}"
    if isinstance(error, PolicyProtocolError):
        return f"the policy broke the protocol: {error}"
    if isinstance(error, (PolicyLate, AuthenticationFailed)):
        return str(error)
    return f"the connection to the policy was lost: {error}"


class EnvironmentFailed(InfrastructureError):
    """An environment or a success rule raised. That is ours: no submission is charged for it."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class _Fault(Exception):
    def __init__(self, kind: RunKind, fault: FaultClass, place: str, words: str) -> None:
        super().__init__(kind, fault, place, words)
        self.kind = kind
        self.fault = fault
        self.place = place
        self.words = words


@dataclass(slots=True)
class _Episode:
    environment: Environment
    policy: PolicyConnection
    run: EpisodeRun
    logger: EpisodeLogger
    limits: EpisodeLimits
    stop: threading.Event
    monotonic: Callable[[], float]
    policy_seconds: float = 0.0

    def play(self) -> None:
        """Step until the episode is over.

        Raises:
            _Fault, EnvironmentFailed, RunAbandoned.
        """
        self.logger.begin()
        observation = simulated(self.environment.reset, self.run.seed)
        self._reset_policy()
        planned: deque[Any] = deque()
        while not (self.logger.terminated or self.logger.truncated):
            if self.stop.is_set():
                raise RunAbandoned("stopped")
            if not planned:
                planned.extend(self._ask(observation))
            observation = self._step(planned.popleft())

    def _step(self, wire_action: Any) -> Observation:
        action, clipped = self._checked(wire_action)
        result, info_success = simulated(self._advance, action)
        at_limit = self.limits.max_steps is not None and self.logger.steps + 1 >= self.limits.max_steps
        truncated = result.truncated or at_limit
        self.logger.step(action, result, truncated=truncated, info_success=info_success, clipped=clipped)
        return result.observation

    def _advance(self, action: Any) -> tuple[StepResult, bool | None]:
        # A copy: some environments change the arrays that they are given, and the trace is of what was given.
        result = self.environment.step(_copied(action))
        return result, bool(result.info["success"]) if "success" in result.info else None

    def _reset_policy(self) -> None:
        try:
            self.policy.reset(self.run.episode_id, self.run.policy_seed, self.limits.reset_timeout_seconds)
        except PolicyError as error:
            raise _Fault(*fault_of(error), "reset", in_words(error)) from error

    def _ask(self, observation: Observation) -> list[Any]:
        """The next actions to play, as they came over the wire."""
        left = self.limits.episode_timeout_seconds - self.policy_seconds
        if left <= 0:
            raise self._episode_timeout()
        timeout = min(self.limits.step_timeout_seconds, left)
        started = self.monotonic()
        try:
            reply = self.policy.act(observation, timeout)
        except PolicyError as error:
            kind, fault = fault_of(error)
            if kind is RunKind.POLICY_LATE and timeout < self.limits.step_timeout_seconds:
                raise self._episode_timeout() from error
            raise _Fault(kind, fault, self._place, in_words(error)) from error
        seconds = self.monotonic() - started
        self.logger.policy_latency.add(seconds)
        # The reply was in time. Our own clock may say more, if this process was frozen meanwhile.
        self.policy_seconds += min(seconds, timeout)
        try:
            return split_chunk(self.environment.action_space, reply)[: self.limits.action_horizon]
        except InvalidAction as error:
            raise self._bad_action(FaultClass.INVALID_ACTION, error) from error

    def _checked(self, wire_action: Any) -> tuple[Any, int]:
        try:
            action, clipped = from_wire(self.environment.action_space, wire_action, clip=self.limits.clips)
        except NonFiniteAction as error:
            raise self._bad_action(FaultClass.NON_FINITE_ACTION, error) from error
        except InvalidAction as error:
            raise self._bad_action(FaultClass.INVALID_ACTION, error) from error
        return action, clipped

    def _bad_action(self, fault: FaultClass, error: OrchestratorError) -> _Fault:
        return _Fault(RunKind.SUBMISSION_FAULT, fault, self._place, f"the action cannot be used: {error}")

    def _episode_timeout(self) -> _Fault:
        """Undecided, whether the policy answered or not: other workers' episodes may have slowed it down."""
        limit = self.limits.episode_timeout_seconds
        words = f"the policy's answers took more than {limit:g} s in this episode"
        return _Fault(RunKind.POLICY_LATE, FaultClass.EPISODE_TIMEOUT, self._place, words)

    @property
    def _place(self) -> str:
        return f"step {self.logger.steps}"


def _copied(action: Any) -> Any:
    """The action with arrays of its own; `from_wire` makes arrays, dicts, tuples and what cannot change."""
    if isinstance(action, np.ndarray):
        return action.copy()
    if isinstance(action, dict):
        return {key: _copied(part) for key, part in action.items()}
    return tuple(map(_copied, action)) if isinstance(action, tuple) else action


def _summary(logger: EpisodeLogger) -> EpisodeSummary:
    return EpisodeSummary(
        episode_return=logger.episode_return,
        steps=logger.steps,
        terminated=logger.terminated,
        truncated=logger.truncated,
        info_success=logger.info_success,
    )
