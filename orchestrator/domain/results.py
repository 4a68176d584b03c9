"""The one result of a job, computed from the outcomes that the ledger holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from orchestrator.domain.episodes import EpisodeOutcome, FaultClass, shortened
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.messages import EvalJobMessage, EvalResultMessage, ScoreName
from orchestrator.domain.statistics import CONFIDENCE, TaskSummary, overall, summarise

MAX_EXAMPLE_CHARS = 4096


def build_result(
    message: EvalJobMessage,
    status: JobStatus,
    outcomes: Sequence[EpisodeOutcome],
    planned_count: int,
    *,
    validator_hotkey: str,
    versions: Mapping[str, str] | None = None,
    env_specs: Sequence[Mapping[str, Any]] | None = None,
    success_rule: str | None = None,
    logs: str | None = None,
    error: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> EvalResultMessage:
    """The result of `message`, whatever its final status.

    `outcomes` come in plan order. `success_rate` and `avg_reward` are over the episodes that have an outcome;
    `score` is the one that `config.score` names, and only where every one of `planned_count` (at least one)
    episodes has an outcome: half a job's score would compare with whole ones.
    `extra_data["missing_episodes"]` says how many have none. Keys of `extra` are added to `extra_data` and do
    not replace what stands there.

    Raises:
        ValueError: `status` is not final, or COMPLETED with outcomes missing.
    """
    if not status.is_final:
        raise ValueError(f"job {message.job_id}: {status} is not final")
    missing = planned_count - len(outcomes)
    if missing < 0 or (status is JobStatus.COMPLETED and missing > 0):
        raise ValueError(
            f"job {message.job_id}: {status} with {len(outcomes)} outcomes of {planned_count} episodes"
        )
    total = overall(outcomes)
    return EvalResultMessage(
        status=status,
        job_id=message.job_id,
        validator_hotkey=validator_hotkey,
        miner_hotkey=message.miner_hotkey,
        competition_id=message.competition_id,
        env_provider=message.env_provider,
        benchmark_name=message.benchmark_name,
        config=message.config,
        benchmark_spec=message.benchmark_spec,
        score=_score(total, message.job_config.score) if outcomes and not missing else None,
        success_rate=total.success_rate,
        avg_reward=total.mean_return,
        total_episodes=total.episodes,
        env_specs=[dict(spec) for spec in env_specs] if env_specs is not None else None,
        logs=logs,
        error=error,
        extra_data=dict(extra or {})
        | _details(message, outcomes, total, planned_count, versions=versions, success_rule=success_rule),
    )


def _score(total: TaskSummary, name: ScoreName) -> float | None:
    return total.success_rate if name == "success_rate" else total.mean_return


def _details(
    message: EvalJobMessage,
    outcomes: Sequence[EpisodeOutcome],
    total: TaskSummary,
    planned_count: int,
    *,
    versions: Mapping[str, str] | None,
    success_rule: str | None,
) -> dict[str, Any]:
    details: dict[str, Any] = {
        "submission_id": message.submission_id,
        "score_name": message.job_config.score,
        "planned_episodes": planned_count,
        "missing_episodes": planned_count - len(outcomes),
        "confidence": CONFIDENCE,
        "overall": _plain(total),
        "tasks": [_plain(summary) for summary in summarise(outcomes)],
        "faults": {fault.value: count for fault, count in total.faults.items()},
        "fault_examples": fault_examples(outcomes),
        "seeds": "derived" if message.job_config.seed is None else "open",
    }
    if message.seed_group is not None:
        details["seed_group"] = message.seed_group
    if message.tags:
        details["tags"] = message.tags
    if message.model_extra:
        details["unknown_fields"] = message.model_extra  # so that the sender knows its job again by them
    if versions is not None:
        details["versions"] = dict(versions)
    if success_rule is not None:
        details["success_rule"] = success_rule
    return details


def fault_examples(outcomes: Sequence[EpisodeOutcome]) -> list[dict[str, Any]]:
    """The first episode of each class of faults, in words; in the order of the classes."""
    first: dict[FaultClass, EpisodeOutcome] = {}
    for outcome in outcomes:
        if outcome.fault is not None:
            first.setdefault(outcome.fault, outcome)
    return [
        {
            "fault": fault.value,
            "task_id": first[fault].task_id,
            "episode_id": first[fault].episode_id,
            "detail": shortened(first[fault].fault_detail or "", MAX_EXAMPLE_CHARS),
        }
        for fault in FaultClass
        if fault in first
    ]


def _plain(summary: TaskSummary) -> dict[str, Any]:
    """The summary as JSON takes it; `interval` is `[low, high]` or null."""
    plain = asdict(summary)
    plain["interval"] = None if summary.interval is None else [summary.interval.low, summary.interval.high]
    plain["faults"] = {fault.value: count for fault, count in summary.faults.items()}
    if not summary.task_id:
        del plain["task_id"]
    return plain
