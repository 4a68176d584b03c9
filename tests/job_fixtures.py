"""Jobs, claims and finished episodes for tests that work on a real database."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeAlias
from uuid import UUID, uuid4

from orchestrator.adapters.postgres.job_store import JobRules, PostgresJobStore
from orchestrator.adapters.postgres.ledger import PostgresLedger
from orchestrator.domain.episodes import EpisodeRun, FinishedEpisode, PlannedEpisode, plan_episodes
from orchestrator.domain.messages import EpisodeDataMessage, EvalJobMessage, EvalResultMessage
from orchestrator.domain.results import build_result
from orchestrator.ports import Claim, ClaimRefusal

if TYPE_CHECKING:
    import asyncpg

    Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"


def a_job(job_id: int = 1, **fields: object) -> EvalJobMessage:
    content = {"env_provider": "gymnasium", "benchmark_name": "CartPole-v1", "submission_id": "s"} | fields
    return EvalJobMessage.model_validate({"job_id": job_id, **content})


def a_store(pool: Pool, **rules: object) -> PostgresJobStore:
    return PostgresJobStore(
        pool,
        replace(JobRules(), **rules),
        lambda job, outcomes, planned: build_result(
            job.message, job.status, outcomes, planned, validator_hotkey="local", error=job.error
        ),
    )


def a_result(status: str = "COMPLETED", job_id: int = 1) -> object:
    """A result builder, as a supervisor passes one."""
    from orchestrator.domain.lifecycle import JobStatus

    def build(outcomes: object, planned: int) -> EvalResultMessage:
        return build_result(a_job(job_id), JobStatus(status), outcomes, planned, validator_hotkey="local")

    return build


async def claimed(store: PostgresJobStore, job_id: int = 1, holder: UUID | None = None) -> Claim:
    """Insert the job unless it is there, and claim it."""
    await store.insert(a_job(job_id), enqueue=False)
    claim = await store.claim(job_id, holder or uuid4())
    assert not isinstance(claim, ClaimRefusal), claim
    return claim


def a_plan(tasks: tuple[str, ...] = ("CartPole-v1",), episodes: int = 3) -> list[PlannedEpisode]:
    return plan_episodes(tasks, episodes, secret=b"secret", seed_group="group")


async def planned_runs(pool: Pool, claim: Claim, episodes: int = 3) -> list[EpisodeRun]:
    """Store a plan and assign all of it."""
    ledger = PostgresLedger(pool)
    plan = a_plan(episodes=episodes)
    await ledger.store_plan(claim, plan)
    return await ledger.assign(claim, [episode.key for episode in plan])


def finished(run: EpisodeRun, *, steps: int = 2, episode_return: float = 1.5) -> FinishedEpisode:
    now = datetime.now(UTC)
    message = EpisodeDataMessage(
        job_id=run.job_id,
        submission_id="s",
        task_id=run.task_id,
        episode_id=run.episode_id,
        env_name=run.task_id,
        benchmark_name="CartPole-v1",
        final_reward=episode_return,
        success=True,
        steps=steps,
        start_time=now,
        end_time=now,
    )
    return FinishedEpisode(
        run=run,
        episode_return=episode_return,
        steps=steps,
        success=True,
        terminated=True,
        truncated=False,
        fault=None,
        fault_detail=None,
        started_at=now,
        ended_at=now,
        action_trace=b"trace",
        action_trace_sha256=hashlib.sha256(b"trace").hexdigest(),
        episode_message=message.to_json(),
        step_messages=tuple(b'{"step":%d}' % step for step in range(steps)),
    )
