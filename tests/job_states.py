"""Jobs in the states that people ask about, put there as the control plane would."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING
from uuid import UUID

from orchestrator.adapters.postgres.ledger import PostgresLedger
from orchestrator.domain.episodes import EpisodeRun, FaultClass, FinishedEpisode
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.results import build_result
from orchestrator.ports import Claim, ClaimRefusal
from tests.job_fixtures import a_job, a_plan, a_store, finished

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.adapters.postgres.job_store import PostgresJobStore
    from orchestrator.domain.episodes import EpisodeOutcome
    from orchestrator.domain.messages import EvalResultMessage
    from tests.job_fixtures import Pool

HOLDER = UUID("0123abcd-0000-4000-8000-000000000000")
TASKS = ("reach-v3", "push-v3")


async def queued(pool: Pool, job_id: int, *, local: bool = False, **fields: object) -> PostgresJobStore:
    store = a_store(pool, max_concurrent_jobs=100)
    await store.insert(a_job(job_id, **fields), enqueue=True, local=local)
    return store


async def starting(
    pool: Pool, job_id: int, *, detail: str = "waits for its workers", **fields: object
) -> Claim:
    store = await queued(pool, job_id, **fields)
    claim = await store.claim(job_id, HOLDER)
    assert not isinstance(claim, ClaimRefusal)
    await store.set_status(claim, JobStatus.STARTING, detail)
    return claim


async def running(
    pool: Pool,
    job_id: int,
    *,
    tasks: tuple[str, ...] = TASKS,
    episodes: int = 5,
    done: int = 0,
    **fields: object,
) -> tuple[Claim, list[EpisodeRun]]:
    """A running job; every third of its finished episodes failed."""
    claim = await starting(pool, job_id, detail="starts the submission", **fields)
    ledger = PostgresLedger(pool)
    plan = a_plan(tasks, episodes)
    await ledger.store_plan(claim, plan)
    await a_store(pool).set_status(claim, JobStatus.RUNNING, f"{len(plan)} episodes to run")
    runs = await ledger.assign(claim, [episode.key for episode in plan])
    await ledger.commit([played(run, index) for index, run in enumerate(runs[:done])])
    return claim, runs


def played(run: EpisodeRun, index: int = 0) -> FinishedEpisode:
    episode = finished(run, steps=10, episode_return=float(index))
    if index % 3 != 2:
        return episode
    return replace(episode, success=False, fault=FaultClass.CRASH, fault_detail="exit code 1")


async def ended(
    pool: Pool,
    job_id: int,
    status: JobStatus = JobStatus.COMPLETED,
    *,
    error: str | None = None,
    logs: str | None = None,
    done: int | None = None,
    episodes: int = 5,
    **fields: object,
) -> None:
    """A job that has ended, with its result; all its episodes are done unless `done` says how many."""
    planned = episodes * len(TASKS)
    claim, _ = await running(
        pool, job_id, episodes=episodes, done=planned if done is None else done, **fields
    )

    def build(outcomes: Sequence[EpisodeOutcome], planned: int) -> EvalResultMessage:
        return build_result(
            a_job(job_id, **fields),
            status,
            outcomes,
            planned,
            validator_hotkey="local",
            error=error,
            logs=logs,
            extra={"failure": "submission"} if status is JobStatus.FAILED else None,
        )

    await a_store(pool).finish(claim, status, build)
