"""The episodes of a job as the ledger recorded them, actions included: one at a time, they may be large."""

from __future__ import annotations

from dataclasses import dataclass

import asyncpg

from orchestrator.domain.episodes import EpisodeKey, FaultClass
from orchestrator.domain.replay import RecordedEpisode


@dataclass(frozen=True, slots=True)
class PlannedKey:
    """An episode of a job's plan, and whether it has an outcome."""

    key: EpisodeKey
    finished: bool


async def planned_keys(pool: asyncpg.Pool[asyncpg.Record], job_id: int) -> list[PlannedKey]:
    """Every episode of the job's plan in its order; none before the plan is stored."""
    rows = await pool.fetch(
        "SELECT task_id, episode_id, finished FROM episodes WHERE job_id = $1 ORDER BY ordinal", job_id
    )
    return [PlannedKey(EpisodeKey(row["task_id"], row["episode_id"]), row["finished"]) for row in rows]


async def recorded_episode(
    pool: asyncpg.Pool[asyncpg.Record], job_id: int, key: EpisodeKey
) -> RecordedEpisode | None:
    """The outcome of an episode, or None where it has none."""
    row = await pool.fetchrow(
        """SELECT seed, episode_return, steps, success, coalesce(terminated, false) AS terminated,
               coalesce(truncated, false) AS truncated, fault, action_trace_sha256, action_trace
           FROM episodes WHERE job_id = $1 AND task_id = $2 AND episode_id = $3 AND finished""",
        job_id,
        key.task_id,
        key.episode_id,
    )
    if row is None:
        return None
    return RecordedEpisode(
        key=key,
        seed=row["seed"],
        episode_return=row["episode_return"],
        steps=row["steps"],
        success=row["success"],
        terminated=row["terminated"],
        truncated=row["truncated"],
        fault=None if row["fault"] is None else FaultClass(row["fault"]),
        action_trace_sha256=row["action_trace_sha256"],
        # Not even the trace of no action at all is empty, once it is compressed.
        action_trace=row["action_trace"] or None,
    )
