"""The composition root: from settings and a database to the plain classes that the actors wrap."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import asyncpg
import ray

from orchestrator.actors.control_plane import RaySupervisors, sink_name
from orchestrator.actors.episode_runner import EpisodeLimits
from orchestrator.actors.job_supervision import Cluster, JobSupervision, SupervisionParts
from orchestrator.actors.queue_consumer import QueueConsumer
from orchestrator.actors.reconciler import Reconciler
from orchestrator.actors.result_sink import ResultSink
from orchestrator.actors.rollout_cluster import ClusterPlan, RolloutCluster
from orchestrator.actors.rollout_worker import WorkerSetup
from orchestrator.actors.submission_container import (
    Archive,
    ContainerTools,
    ExternalPolicy,
    PolicySource,
    SubmissionContainer,
)
from orchestrator.adapters.artifacts.fetch import FetchLimits, fetch_archive
from orchestrator.adapters.policies.host_client import SubmissionHostClient
from orchestrator.adapters.policies.websocket import WebSocketConnector
from orchestrator.adapters.postgres.clients import (
    CONSUMER_APPLICATION,
    CONSUMER_CONNECTIONS,
    SINK_CONNECTIONS,
    SUPERVISOR_CONNECTIONS,
)
from orchestrator.adapters.postgres.installation import Installation
from orchestrator.adapters.postgres.job_store import JobRules, PostgresJobStore
from orchestrator.adapters.postgres.ledger import PostgresLedger
from orchestrator.adapters.postgres.patience import patient
from orchestrator.adapters.postgres.pool import Database, open_pool
from orchestrator.adapters.postgres.queue import TelemetryRows
from orchestrator.adapters.postgres.reconciliation import ReconciliationQueries
from orchestrator.adapters.postgres.server_files import default_data_dir
from orchestrator.adapters.process.containers import ProcessContainers
from orchestrator.domain.episodes import EpisodeOutcome
from orchestrator.domain.errors import InfrastructureError, UsageError
from orchestrator.domain.messages import EvalResultMessage
from orchestrator.domain.results import build_result
from orchestrator.job_scratch import remove_scratch, scratch_path, sweep_scratch
from orchestrator.logging import bind_process, configure_logging, get_logger
from orchestrator.ports import Claim, ContainerLimits, Containers, Endpoint, Job, PolicyConnector
from orchestrator.settings import Settings

log = get_logger()

EXTERNAL_SCHEME = "ws"


def data_directory(settings: Settings) -> Path:
    """Where everything of ours on this machine is kept."""
    return settings.data_dir or default_data_dir()


def fingerprint(settings: Settings) -> str:
    """Changes with the code and with the settings: what makes new actors necessary."""
    digest = hashlib.sha256(settings.model_dump_json().encode())
    package = Path(str(resources.files("orchestrator")))
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


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

    return PostgresJobStore(pool, job_rules(settings), unheld)


def ledger(pool: asyncpg.Pool[asyncpg.Record], settings: Settings) -> PostgresLedger:
    """The ledger of episodes, with telemetry as set."""
    rows = TelemetryRows(
        messages_per_row=settings.telemetry_messages_per_row,
        row_bytes=settings.telemetry_row_bytes,
        episodes=settings.telemetry_episodes,
        steps=settings.telemetry_steps,
    )
    return PostgresLedger(pool, rows)


@dataclass(frozen=True)
class ControlPlaneRecipe:
    """`control_plane.Recipe`: all that an actor needs to open what it wraps, in its own process."""

    settings: Settings
    database: Database
    installation: Installation
    cluster_grows: bool = False
    actor_log_level: str = field(default="INFO")

    @property
    def namespace(self) -> str:
        return self.installation.namespace

    @property
    def generation(self) -> int:
        return self.installation.generation

    def set_up_process(self, **fields: object) -> None:
        configure_logging("json", self.actor_log_level)
        bind_process(**fields)

    @asynccontextmanager
    async def open_sink(self) -> AsyncIterator[ResultSink]:
        async with self._pool("orchestrator sink", max_size=SINK_CONNECTIONS) as pool:
            yield ResultSink(
                ledger=ledger(pool, self.settings),
                max_bytes=self.settings.sink_queue_bytes,
                batch_episodes=self.settings.sink_batch_episodes,
                database_patience_seconds=self.settings.lease_seconds / 2,
            )

    @asynccontextmanager
    async def open_consumer(self) -> AsyncIterator[QueueConsumer]:
        async with self._pool(CONSUMER_APPLICATION, max_size=CONSUMER_CONNECTIONS) as pool:
            store = job_store(pool, self.settings)
            supervisors = RaySupervisors(self)
            reconciler = Reconciler(
                store=store,
                queries=ReconciliationQueries(pool),
                supervisors=supervisors,
                containers=self._containers(),
                installation_id=self.installation.installation_id,
                max_concurrent_jobs=self.settings.max_concurrent_jobs,
                retention_seconds=self.settings.retention_seconds,
                retention_rows=self.settings.retention_rows,
                unheld_result=store.failed_result,
            )
            yield QueueConsumer(
                pool,
                store,
                supervisors,
                reconciler,
                max_concurrent_jobs=self.settings.max_concurrent_jobs,
                reconcile_interval_seconds=self.settings.reconcile_interval_seconds,
            )

    @asynccontextmanager
    async def open_supervision(self, job_id: int, holder: UUID) -> AsyncIterator[JobSupervision]:
        started_at = time.monotonic()
        data_dir = data_directory(self.settings)
        scratch = scratch_path(data_dir, self.installation.installation_id, job_id)
        await asyncio.to_thread(sweep_scratch, data_dir)
        async with self._pool(f"orchestrator job {job_id}", max_size=SUPERVISOR_CONNECTIONS) as pool:
            store = patient(job_store(pool, self.settings), self.settings.lease_seconds)
            parts = SupervisionParts(
                store=store,
                ledger=patient(ledger(pool, self.settings), self.settings.lease_seconds),
                cluster=self._cluster,
                policy=lambda claim: self._policy(claim, store, scratch),
                seed_secret=self.installation.seed_secret(),
                validator_hotkey=self.settings.validator_hotkey,
                lease_seconds=self.settings.lease_seconds,
                max_containers=self.settings.max_containers_per_job,
            )
            try:
                yield JobSupervision(parts, job_id, holder, started_at)
            finally:
                await asyncio.to_thread(remove_scratch, scratch)

    def _pool(self, application: str, max_size: int) -> Any:
        return open_pool(
            self.database,
            application_name=application,
            max_size=max_size,
            lease_seconds=self.settings.lease_seconds,
        )

    def _containers(self) -> Containers:
        # A Ray worker's parent is its node's raylet: with the node gone, nobody can talk to the container.
        return ProcessContainers(data_directory(self.settings) / "containers", watch_pid=os.getppid())

    def _cluster(self, claim: Claim) -> Cluster:
        job = claim.job.message
        config = job.job_config
        settings = self.settings
        plan = ClusterPlan(
            job=job,
            workers=job.resources.workers or settings.workers_per_job,
            cpus_per_worker=job.resources.cpus_per_worker or settings.cpus_per_worker,
            node_resource=f"node:{ray.util.get_node_ip_address()}",
            cluster_grows=self.cluster_grows,
        )
        limits = EpisodeLimits(
            step_timeout_seconds=config.step_timeout_seconds or settings.step_timeout_seconds,
            episode_timeout_seconds=config.episode_timeout_seconds or settings.episode_timeout_seconds,
            reset_timeout_seconds=settings.reset_timeout_seconds,
            max_steps=config.max_episode_steps,
            action_horizon=config.action_horizon,
        )
        setup = WorkerSetup(
            job=job,
            connector=WebSocketConnector("", 0),
            limits=limits,
            sink=None,
            step_log_interval=config.step_log_interval or settings.step_log_interval,
            log_steps=settings.telemetry_steps,
            byte_cap=settings.episode_buffer_bytes,
            connect_timeout_seconds=settings.connect_timeout_seconds,
            log_level=self.actor_log_level,
        )
        return RolloutCluster(plan, setup, self._sink)

    def _sink(self) -> Any:
        return ray.get_actor(sink_name(self.generation), self.namespace)

    def _policy(self, claim: Claim, store: PostgresJobStore, scratch: Path) -> PolicySource:
        url = urlsplit(claim.job.message.artifact_url or "")
        if url.scheme == EXTERNAL_SCHEME:
            return self._external_policy(claim, url.hostname or "", url.port or 0)
        tools = ContainerTools(
            store=store,
            containers=self._containers(),
            host_client=lambda endpoint, key: SubmissionHostClient(endpoint, key),
            connector=_connector,
            session_key=self.installation.session_key,
            installation_id=self.installation.installation_id,
            limits=self._limits(claim),
            start_up_timeout_seconds=self.settings.start_up_timeout_seconds,
        )
        schemes = self.settings.archive_allowed_schemes + (("file",) if claim.job.local else ())
        limits = FetchLimits(
            self.settings.archive_max_bytes,
            self.settings.archive_fetch_timeout_seconds,
            schemes,
            hosts=self.settings.archive_allowed_hosts or None,  # empty: any public host
        )

        async def fetch() -> Archive:
            scratch.mkdir(parents=True, exist_ok=True, mode=0o700)
            target = scratch / "archive"
            return Archive(target, await fetch_archive(claim.job.message, target, limits))

        return SubmissionContainer(tools, fetch)

    def _external_policy(self, claim: Claim, host: str, port: int) -> PolicySource:
        if not claim.job.local:
            # Anybody could have us dial any address inside the cluster.
            raise UsageError("only jobs of the local command line may name a policy server by its address")
        return ExternalPolicy(WebSocketConnector(host, port), self.settings.connect_timeout_seconds)

    def _limits(self, claim: Claim) -> ContainerLimits:
        allowed, asked = self.settings.container_memory_bytes, claim.job.message.resources.memory_bytes
        return ContainerLimits(
            memory_bytes=min(allowed, asked) if allowed and asked else allowed or asked,
            disk_bytes=self.settings.container_disk_bytes,
            log_bytes=self.settings.container_log_bytes,
        )


async def remove_containers(settings: Settings, installation: Installation) -> None:
    """Remove what process containers left on this machine, after the Ray they were bound to has ended."""
    containers = ProcessContainers(data_directory(settings) / "containers")
    for owned in await containers.list_owned(installation.installation_id):
        try:
            await containers.remove(owned.handle)
        except InfrastructureError as error:
            log.warning("container_left", container_id=str(owned.container_id), why=str(error))


def _connector(endpoint: Endpoint, key: bytes) -> PolicyConnector:
    return WebSocketConnector(endpoint.host, endpoint.port, session_key=key)
