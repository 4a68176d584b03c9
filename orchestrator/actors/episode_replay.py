"""Plays the recorded actions of episodes again, by the code that played them: the record is the policy."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from orchestrator.actors.episode_logger import EpisodeLogger
from orchestrator.actors.episode_runner import (
    EnvironmentFailed,
    EpisodeLimits,
    RunKind,
    RunReport,
    SuccessRule,
    run_episode,
)
from orchestrator.actors.episode_telemetry import UnreadableTrace, recorded_actions, trace_sha256
from orchestrator.actors.worker_resources import EnvironmentCache
from orchestrator.domain.episodes import EpisodeRun
from orchestrator.domain.errors import InfrastructureError, PolicyLost, PolicyProtocolError
from orchestrator.domain.messages import EvalJobMessage
from orchestrator.domain.replay import (
    EpisodeReplay,
    Playback,
    RecordedEpisode,
    Verdict,
    differences,
    playbacks_differ,
)
from orchestrator.logging import get_logger
from orchestrator.ports import Environment, Observation

log = get_logger()

# Nobody answers late here: an iterator is asked.
NEVER_SECONDS = 1e9


class CannotReplay(InfrastructureError):
    """The episode cannot be played again at all, with the reason."""


class ReplayStopped(CannotReplay):
    """Somebody asked for the end of it."""


def replay_and_compare(
    environments: EnvironmentCache, job: EvalJobMessage, recorded: RecordedEpisode, stop: threading.Event
) -> EpisodeReplay:
    """The verdict on one episode. What differs is played a second time, to tell why. Blocking.

    Raises:
        ReplayStopped: `stop` was set meanwhile.
    """
    try:
        playback = _play(environments, job, recorded, stop)
        found = differences(recorded, playback)
        if not found:
            return EpisodeReplay(recorded, Verdict.EQUAL, playback)
        environments.discard(recorded.key.task_id)
        again = _play(environments, job, recorded, stop)
        return EpisodeReplay(recorded, Verdict.DIFFERS, playback, found, _remark(recorded, playback, again))
    except ReplayStopped:
        raise
    except EnvironmentFailed as error:
        return EpisodeReplay(recorded, Verdict.IMPOSSIBLE, remark=_what_it_raised(error.text))
    except CannotReplay as error:
        environments.discard(recorded.key.task_id)
        return EpisodeReplay(recorded, Verdict.IMPOSSIBLE, remark=str(error))


def _play(
    environments: EnvironmentCache, job: EvalJobMessage, recorded: RecordedEpisode, stop: threading.Event
) -> Playback:
    task_id = recorded.key.task_id
    succeeded = partial(environments.benchmark.succeeded, task_id)
    return replay_episode(environments.get(task_id), job, recorded, succeeded, stop)


def _remark(recorded: RecordedEpisode, playback: Playback, again: Playback) -> str:
    """What the second replay, in a fresh environment, shows."""
    if playback.stopped_by is not None:
        return f"stopped at {playback.stopped_by}"
    if not playbacks_differ(playback, again):
        return ""
    if not differences(recorded, again):
        return "equal in a fresh environment: the environment carries something over from episode to episode"
    return (
        f"a second replay gave {again.episode_return!r} in {again.steps} steps: "
        "the environment is not deterministic"
    )


def replay_episode(
    environment: Environment,
    job: EvalJobMessage,
    recorded: RecordedEpisode,
    succeeded: SuccessRule,
    stop: threading.Event,
) -> Playback:
    """Reset the environment with the episode's seed, give it the recorded actions, and see what comes of it.

    Of an episode that ended by a fault these are the actions before it. Blocking.

    Raises:
        CannotReplay: the actions were not kept or cannot be read, or the environment raised.
    """
    if recorded.action_trace is None:
        raise CannotReplay("its actions were not kept, as they were too many; only their hash was")
    try:
        stored_sha256 = trace_sha256(recorded.action_trace)
    except UnreadableTrace as error:
        raise CannotReplay(f"its stored actions cannot be read: {error}") from error
    policy = _RecordedPolicy(recorded_actions(recorded.action_trace))
    limits = EpisodeLimits(
        step_timeout_seconds=NEVER_SECONDS,
        episode_timeout_seconds=NEVER_SECONDS,
        reset_timeout_seconds=NEVER_SECONDS,
        max_steps=job.job_config.max_episode_steps,
    )
    run = _run_of(job, recorded)
    report = run_episode(environment, policy, run, _logger(job, run), limits, succeeded, stop)
    return _playback(report, policy, stored_sha256)


def _playback(report: RunReport, policy: _RecordedPolicy, stored_sha256: str) -> Playback:
    if report.kind is RunKind.STOPPED:
        raise ReplayStopped("stopped")
    if report.kind is RunKind.ENVIRONMENT_ERROR or report.finished is None:
        raise CannotReplay(_what_it_raised(report.detail))
    if policy.unreadable is not None:
        raise CannotReplay(f"its stored actions cannot be read: {policy.unreadable}")
    finished = report.finished
    return Playback(
        episode_return=finished.episode_return,
        steps=finished.steps,
        success=finished.success,
        terminated=finished.terminated,
        truncated=finished.truncated,
        stored_sha256=stored_sha256,
        played_sha256=finished.action_trace_sha256,
        # An action that the environment has no room for; that the actions are used up is no obstacle.
        stopped_by=report.detail if report.kind is RunKind.SUBMISSION_FAULT else None,
    )


def _what_it_raised(text: str) -> str:
    """The last line of a traceback; the whole of it is logged."""
    log.debug("environment_raised", exception=text)
    return f"the environment raised {text.strip().splitlines()[-1]}"


def _run_of(job: EvalJobMessage, recorded: RecordedEpisode) -> EpisodeRun:
    key = recorded.key
    return EpisodeRun(
        job_id=job.job_id,
        epoch=0,
        run=0,
        task_id=key.task_id,
        episode_id=key.episode_id,
        seed=recorded.seed,
        policy_seed=0,
    )


def _logger(job: EvalJobMessage, run: EpisodeRun) -> EpisodeLogger:
    def refuse(run: EpisodeRun, part: int, messages: Sequence[bytes]) -> None:
        raise InfrastructureError("a replay has no step messages to stage")

    return EpisodeLogger(job, run, "", step_log_interval=1, byte_cap=1, stage=refuse, log_steps=False)


@dataclass(slots=True)
class _RecordedPolicy:
    """A `PolicyConnection` that answers with the recorded actions, and is lost after the last one."""

    actions: Iterator[Any]
    unreadable: UnreadableTrace | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    supports_reset: bool = False

    def reset(self, episode: int, seed: int, timeout_seconds: float) -> None:
        return

    def act(self, observation: Observation, timeout_seconds: float) -> Any:
        try:
            return next(self.actions)
        except StopIteration:
            raise PolicyLost("the recorded actions are used up") from None
        except UnreadableTrace as error:
            self.unreadable = error
            raise PolicyProtocolError(str(error)) from error

    def close(self) -> None:
        return
