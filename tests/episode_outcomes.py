"""Outcomes of episodes that never ran, for tests of what is computed from them."""

from __future__ import annotations

from datetime import UTC, datetime

from orchestrator.domain.episodes import EpisodeOutcome, FaultClass

AT = datetime(2026, 1, 1, tzinfo=UTC)


def outcome(
    task_id: str = "task",
    episode_return: float = 1.0,
    *,
    success: bool = True,
    steps: int = 10,
    fault: FaultClass | None = None,
    episode_id: int = 0,
    detail: str | None = None,
    clipped_actions: int = 0,
) -> EpisodeOutcome:
    return EpisodeOutcome(
        task_id=task_id,
        episode_id=episode_id,
        seed=1,
        run=1,
        episode_return=episode_return,
        steps=steps,
        success=success,
        terminated=True,
        truncated=False,
        fault=fault,
        fault_detail=detail,
        started_at=AT,
        ended_at=AT,
        action_trace_sha256="0" * 64,
        clipped_actions=clipped_actions,
    )
