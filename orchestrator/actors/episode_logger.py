"""Gathers what an episode run does, step by step, until it can be published whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from pydantic_core import to_json

from orchestrator.actors.episode_telemetry import ActionTrace, LoggedStep, StepEncoder
from orchestrator.domain.episodes import CommitOutcome, EpisodeRun, FaultClass, FinishedEpisode
from orchestrator.domain.errors import OrchestratorError
from orchestrator.domain.messages import EpisodeDataMessage, EvalJobMessage, utc_now
from orchestrator.ports import StepResult

MAX_FAULT_DETAIL_CHARS = 8192

StagePart = Callable[[EpisodeRun, int, Sequence[bytes]], None]


class RunAbandoned(OrchestratorError):
    """The run is not to be played on: its outcome would count nowhere, or the worker was stopped.

    `commit` is STALE where the ledger knows a later run of the episode.
    """

    def __init__(self, reason: str, commit: CommitOutcome | None = None) -> None:
        super().__init__(reason, commit)
        self.reason = reason
        self.commit = commit

    def __str__(self) -> str:
        return self.reason


@dataclass(slots=True)
class PolicyLatency:
    """How long the policy took to answer, in seconds of the monotonic clock."""

    calls: int = 0
    total_seconds: float = 0.0
    max_seconds: float = 0.0

    def add(self, seconds: float) -> None:
        self.calls += 1
        self.total_seconds += seconds
        self.max_seconds = max(self.max_seconds, seconds)


class EpisodeLogger:
    """Logs one episode run: its return, its action trace, and every `step_log_interval`-th step's message.

    The first and the last step are always logged. Messages above `byte_cap` bytes are handed to `stage` as a
    numbered part (from 0) and forgotten; `stage` may raise `RunAbandoned`. With `log_steps` off there are no
    step messages; trace and return are kept all the same.
    """

    def __init__(
        self,
        job: EvalJobMessage,
        run: EpisodeRun,
        env_name: str,
        *,
        step_log_interval: int,
        byte_cap: int,
        stage: StagePart,
        log_steps: bool = True,
    ) -> None:
        self._job = job
        self._run = run
        self._env_name = env_name
        self._step_log_interval = step_log_interval
        self._byte_cap = byte_cap
        self._stage = stage
        self._log_steps = log_steps
        self._encoder = StepEncoder(job, run, env_name)
        self._messages: list[bytes] = []
        self._message_bytes = 0
        self._parts = 0
        self._unlogged: LoggedStep | None = None
        self._trace = ActionTrace()
        self._clipped_actions = 0
        self.policy_latency = PolicyLatency()
        self.started_at = utc_now()
        self.steps = 0
        # Added up step by step in Python floats: bit for bit what `total += reward` of a plain loop gives.
        self.episode_return = 0.0
        self.terminated = False
        self.truncated = False
        self.info_success: bool | None = None

    def begin(self) -> None:
        """Mark the episode's start."""
        self.started_at = utc_now()

    def step(
        self,
        action: Any,
        result: StepResult,
        *,
        truncated: bool,
        info_success: bool | None = None,
        clipped: int = 0,
    ) -> None:
        """Take in one step.

        Args:
            action: as it was given to the environment.
            result: what the environment gave back.
            truncated: whether the episode is cut here, by the environment or by our own limit.
            info_success: `info["success"]`, None where there is none.
            clipped: how many numbers of the action were moved into the action space.

        Raises:
            RunAbandoned: a part had to be staged, and could not be.
        """
        step = LoggedStep(self.steps, action, result, truncated, utc_now())
        self.steps += 1
        self.episode_return += result.reward
        self.terminated, self.truncated = result.terminated, truncated
        if info_success is not None:
            self.info_success = bool(self.info_success) or info_success
        self._clipped_actions += clipped > 0
        self._trace.add(action)
        if not self._log_steps:
            return
        if step.index % self._step_log_interval == 0 or result.terminated or truncated:
            self._unlogged = None
            self._add_message(step)
        else:
            # It may turn out to be the last one (a fault ends the episode after it).
            self._unlogged = step

    def finish(self, *, success: bool, fault: FaultClass | None, fault_detail: str | None) -> FinishedEpisode:
        """The episode as it is to be committed. The logger is used up.

        Raises:
            RunAbandoned: as `step`.
        """
        if self._unlogged is not None:
            self._add_message(self._unlogged)
            self._unlogged = None
        ended_at = max(utc_now(), self.started_at)
        action_trace, action_trace_sha256 = self._trace.finish()
        metrics = self._metrics()
        return FinishedEpisode(
            run=self._run,
            episode_return=self.episode_return,
            steps=self.steps,
            success=success,
            terminated=self.terminated,
            truncated=self.truncated,
            fault=fault,
            fault_detail=fault_detail and fault_detail[:MAX_FAULT_DETAIL_CHARS],
            started_at=self.started_at,
            ended_at=ended_at,
            action_trace=action_trace,
            action_trace_sha256=action_trace_sha256,
            episode_message=self._episode_message(success, fault, ended_at, metrics),
            step_messages=tuple(self._messages),
            staged_parts=self._parts,
            metrics=metrics,
        )

    def _add_message(self, step: LoggedStep) -> None:
        message = self._encoder.encode(step)
        self._messages.append(message)
        self._message_bytes += len(message)
        if self._message_bytes > self._byte_cap:
            self._stage(self._run, self._parts, tuple(self._messages))
            self._parts += 1
            self._messages = []
            self._message_bytes = 0

    def _metrics(self) -> dict[str, float]:
        metrics: dict[str, float] = {"clipped_actions": float(self._clipped_actions)}
        latency = self.policy_latency
        if latency.calls:
            metrics["policy_latency_mean_seconds"] = latency.total_seconds / latency.calls
            metrics["policy_latency_max_seconds"] = latency.max_seconds
        if self._trace.dropped:
            metrics["action_trace_dropped"] = 1.0
        return metrics

    def _episode_message(
        self, success: bool, fault: FaultClass | None, ended_at: datetime, metrics: dict[str, float]
    ) -> bytes:
        extra: dict[str, Any] = {"terminated": self.terminated, "truncated": self.truncated, **metrics}
        extra["clipped_actions"] = self._clipped_actions
        if fault is not None:
            extra["fault"] = fault.value
        return EpisodeDataMessage(
            job_id=self._run.job_id,
            submission_id=self._job.submission_id,
            task_id=self._run.task_id,
            episode_id=self._run.episode_id,
            env_name=self._env_name,
            benchmark_name=self._job.benchmark_name,
            final_reward=self.episode_return,
            success=success,
            steps=self.steps,
            start_time=self.started_at,
            end_time=ended_at,
            extra_metrics=extra,
        ).to_json()


def with_fault(finished: FinishedEpisode, fault: FaultClass, detail: str | None) -> FinishedEpisode:
    """The same episode as a failure of class `fault`, its episode message included.

    For a verdict that is reached after the worker's report: `dataclasses.replace` alone would leave the
    message with the class that the worker supposed.
    """
    message = json.loads(finished.episode_message)
    message["success"] = False
    message["extra_metrics"] = {**(message.get("extra_metrics") or {}), "fault": fault.value}
    return replace(
        finished,
        success=False,
        fault=fault,
        fault_detail=detail and detail[:MAX_FAULT_DETAIL_CHARS],
        episode_message=to_json(message),
    )


def without_telemetry(finished: FinishedEpisode) -> FinishedEpisode:
    """The same episode without its bulk, for one that is committed already."""
    return replace(finished, action_trace=b"", episode_message=b"", step_messages=())
