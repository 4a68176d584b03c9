"""Jobs that were really played, in this process, and committed by the real ledger."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from uuid import uuid4

from orchestrator.actors.episode_logger import EpisodeLogger
from orchestrator.actors.episode_runner import EpisodeLimits, run_episode
from orchestrator.adapters.benchmarks.registry import load_benchmark
from orchestrator.adapters.postgres.ledger import PostgresLedger
from orchestrator.adapters.postgres.pool import Database, open_pool
from orchestrator.domain.episodes import CommitOutcome, plan_episodes
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.messages import EvalJobMessage
from orchestrator.domain.results import build_result
from orchestrator.ports import Benchmark, ClaimRefusal, Observation
from tests.job_fixtures import a_store
from tests.unit.actors.rollout_fakes import FakePolicy, balance, never_stage

Reply = Callable[[Observation], Any]


async def play_job(
    database: Database,
    message: EvalJobMessage,
    reply: Reply = balance,
    *,
    episodes: int = 1,
    benchmark: Benchmark | None = None,
    versions: Mapping[str, str] | None = None,
    finish: bool = True,
    leave_out: int = 0,
) -> None:
    """Claim the job, play its episodes but for the last `leave_out`, commit them, and finish the job."""
    benchmark = benchmark or load_benchmark(
        message.env_provider, message.benchmark_name, message.config, message.benchmark_spec
    )
    async with open_pool(database, application_name="tests", max_size=3) as pool:
        store, ledger = a_store(pool), PostgresLedger(pool)
        await store.insert(message, enqueue=False)
        claim = await store.claim(message.job_id, uuid4())
        assert not isinstance(claim, ClaimRefusal)
        plan = plan_episodes(benchmark.task_ids, episodes, secret=b"secret", seed_group="group")
        await ledger.store_plan(claim, plan)
        await store.set_status(claim, JobStatus.RUNNING)
        runs = await ledger.assign(claim, [episode.key for episode in plan])
        for run in runs[: len(runs) - leave_out]:
            environment = benchmark.make(run.task_id)
            config = message.job_config
            report = run_episode(
                environment,
                FakePolicy(reply),
                run,
                EpisodeLogger(
                    message, run, run.task_id, step_log_interval=1, byte_cap=2**30, stage=never_stage
                ),
                EpisodeLimits(60, 600, 60, config.max_episode_steps, config.action_horizon),
                partial(benchmark.succeeded, run.task_id),
                threading.Event(),
            )
            environment.close()
            assert report.finished is not None, report.detail
            assert await ledger.commit([report.finished]) == [CommitOutcome.COMMITTED]
        if finish:
            described = benchmark.versions() if versions is None else versions

            def result(outcomes: Any, planned: int) -> Any:
                return build_result(
                    message,
                    JobStatus.COMPLETED,
                    outcomes,
                    planned,
                    validator_hotkey="local",
                    versions=described,
                )

            await store.finish(claim, JobStatus.COMPLETED, result)
