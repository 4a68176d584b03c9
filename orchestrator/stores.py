"""From settings to what clients and actors share: stores, containers, directories; without Ray."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg

from orchestrator.adapters.kubernetes.containers import KubernetesContainers
from orchestrator.adapters.postgres.job_store import JobRules, PostgresJobStore
from orchestrator.adapters.postgres.ledger import PostgresLedger
from orchestrator.adapters.postgres.queue import TelemetryRows
from orchestrator.adapters.postgres.server_files import default_data_dir
from orchestrator.adapters.process.containers import ProcessContainers
from orchestrator.cluster_containers import kubernetes_containers
from orchestrator.domain.episodes import EpisodeOutcome
from orchestrator.domain.messages import EvalResultMessage
from orchestrator.domain.results import build_result
from orchestrator.failpoints import instrumented
from orchestrator.local_containers import process_containers
from orchestrator.ports import Containers, Job
from orchestrator.settings import Settings

EXTERNAL_SCHEME = "ws"


def data_directory(settings: Settings) -> Path:
    """Where everything of ours on this machine is kept."""
    return settings.data_dir or default_data_dir()


def job_rules(settings: Settings) -> JobRules:
    """The rules of claims, as set."""
    return JobRules(
        max_concurrent_jobs=settings.max_concurrent_jobs,
        lease_seconds=settings.lease_seconds,
        job_timeout_seconds=settings.job_timeout_seconds,
        max_claims_without_progress=settings.max_claims_without_progress,
        validator_hotkey=settings.validator_hotkey,
    )


def job_store(pool: asyncpg.Pool[asyncpg.Record], settings: Settings) -> PostgresJobStore:
    """The store of jobs, as clients and actors use it."""

    def unheld(job: Job, outcomes: Sequence[EpisodeOutcome], planned: int) -> EvalResultMessage:
        return build_result(
            job.message,
            job.status,
            outcomes,
            planned,
            validator_hotkey=settings.validator_hotkey,
            error=job.error,
        )

    return instrumented(PostgresJobStore(pool, job_rules(settings), unheld), "job_store")


def ledger(pool: asyncpg.Pool[asyncpg.Record], settings: Settings) -> PostgresLedger:
    """The ledger of episodes, with telemetry as set."""
    rows = TelemetryRows(
        messages_per_row=settings.telemetry_messages_per_row,
        row_bytes=settings.telemetry_row_bytes,
        episodes=settings.telemetry_episodes,
        steps=settings.telemetry_steps,
    )
    return instrumented(PostgresLedger(pool, rows), "ledger")


def submission_containers(
    settings: Settings, watch_pid: int | None = None
) -> ProcessContainers | KubernetesContainers:
    """Where submissions run, as set; on this machine they end with the process `watch_pid`.

    Those of a cluster have connections, and are to be closed: `open_containers` does that.

    Raises:
        UsageError: pods are asked for, and the settings name no image.
    """
    if settings.containers == "kubernetes":
        return kubernetes_containers(settings)
    data = data_directory(settings)
    return process_containers(settings, data, data / "containers", watch_pid)


@asynccontextmanager
async def open_containers(settings: Settings, watch_pid: int | None = None) -> AsyncIterator[Containers]:
    """The same for a block: one for a process, shared by all that it supervises."""
    containers = submission_containers(settings, watch_pid)
    try:
        yield instrumented(containers, "containers")
    finally:
        if isinstance(containers, KubernetesContainers):
            await containers.close()
