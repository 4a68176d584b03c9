"""The composition root: from settings and a database to the plain classes that the actors wrap."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import ray

from orchestrator import failpoints
from orchestrator.actors.control_plane import RaySupervisors, sink_name
from orchestrator.actors.job_supervision import Cluster, JobSupervision, SupervisionParts
from orchestrator.actors.measurements import InstallationFigures
from orchestrator.actors.queue_consumer import QueueConsumer
from orchestrator.actors.ray_calls import get_actor
from orchestrator.actors.ray_meter import RayMeter
from orchestrator.actors.reconciler import Reconciler
from orchestrator.actors.result_sink import ResultSink
from orchestrator.actors.rollout_cluster import ClusterPlan, RolloutCluster
from orchestrator.actors.rollout_worker import WorkerSetup
from orchestrator.actors.submission_container import (
    END_OF_POD_SECONDS,
    END_OF_PROCESS_SECONDS,
    Archive,
    ContainerTools,
    ExternalPolicy,
    PolicySource,
    SubmissionContainer,
)
from orchestrator.actors.tenure import CONSUMER_PREFIX, Tenure
from orchestrator.adapters.artifacts.fetch import FetchLimits, check_reference, fetch_archive
from orchestrator.adapters.policies.websocket import WebSocketConnector
from orchestrator.adapters.postgres.clients import (
    CONSUMER_APPLICATION,
    CONSUMER_CONNECTIONS,
    SINK_CONNECTIONS,
    SUPERVISOR_CONNECTIONS,
)
from orchestrator.adapters.postgres.figures import Figures
from orchestrator.adapters.postgres.installation import Installation
from orchestrator.adapters.postgres.patience import patient
from orchestrator.adapters.postgres.pool import Database, open_pool
from orchestrator.adapters.postgres.reconciliation import ReconciliationQueries
from orchestrator.adapters.postgres.retention import Retention, RetentionRules
from orchestrator.adapters.process.client_process import is_known_dead
from orchestrator.domain.errors import InfrastructureError, UsageError
from orchestrator.job_scratch import remove_scratch, scratch_path, sweep_scratch
from orchestrator.limits import container_limits, episode_limits
from orchestrator.local_containers import submission_host
from orchestrator.logging import bind_process, configure_logging, get_logger
from orchestrator.ports import Claim, Containers, Endpoint, JobStore, PolicyConnector
from orchestrator.ray_session import end_with_parent
from orchestrator.settings import Settings
from orchestrator.stores import (
    EXTERNAL_SCHEME,
    data_directory,
    job_store,
    ledger,
    open_containers,
)

log = get_logger()

# The sink answers before a worker gives it up and sends again: what waits there, waits there once.
SINK_ANSWER_SECONDS = 25.0
SINK_TIMEOUT_SECONDS = 30.0


def fingerprint(settings: Settings) -> str:
    """Changes with the code and with the settings: what makes new actors necessary."""
    digest = hashlib.sha256(settings.model_dump_json().encode())
    package = Path(str(resources.files("orchestrator")))
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def retention_rules(settings: Settings) -> RetentionRules:
    """What is kept of that which nobody consumes, as set."""
    return RetentionRules(settings.retention_seconds, settings.retention_rows)


@dataclass(frozen=True)
class ControlPlaneRecipe:
    """`control_plane.Recipe`: all that an actor needs to open what it wraps, in its own process."""

    settings: Settings
    database: Database
    installation: Installation
    actor_log_level: str = field(default="INFO")

    @property
    def namespace(self) -> str:
        return self.installation.namespace

    @property
    def generation(self) -> int:
        return self.installation.generation

    @property
    def drain_seconds(self) -> float:
        return self.settings.drain_seconds

    @property
    def control_resource(self) -> str | None:
        return self.settings.control_resource

    def set_up_process(self, **fields: object) -> None:
        end_with_parent()
        failpoints.enter_process(str(fields.get("actor", "")))
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
                answer_seconds=SINK_ANSWER_SECONDS,
                meter=RayMeter(),
            )

    @asynccontextmanager
    async def open_consumer(self) -> AsyncIterator[QueueConsumer]:
        async with (
            self._pool(CONSUMER_APPLICATION, max_size=CONSUMER_CONNECTIONS) as pool,
            self._open_containers() as containers,
        ):
            store = job_store(pool, self.settings)
            meter = RayMeter()
            supervisors = RaySupervisors(self, store.benchmark)
            reconciler = Reconciler(
                store=store,
                queries=ReconciliationQueries(pool),
                supervisors=supervisors,
                containers=containers,
                installation_id=self.installation.installation_id,
                max_concurrent_jobs=self.settings.max_concurrent_jobs,
                retention=Retention(pool),
                retention_rules=retention_rules(self.settings),
                unheld_result=store.failed_result,
                lists_every_container=self.settings.containers == "kubernetes",
                client_is_dead=is_known_dead,
                figures=InstallationFigures(await Figures.from_now(pool), meter),
                meter=meter,
            )
            yield QueueConsumer(
                pool,
                store,
                supervisors,
                reconciler,
                max_concurrent_jobs=self.settings.max_concurrent_jobs,
                reconcile_interval_seconds=self.settings.reconcile_interval_seconds,
                superseded=Tenure(self.namespace, CONSUMER_PREFIX, self.generation).is_over,
            )

    @asynccontextmanager
    async def open_supervision(self, job_id: int, holder: UUID) -> AsyncIterator[JobSupervision]:
        started_at = time.monotonic()
        data_dir = data_directory(self.settings)
        scratch = scratch_path(data_dir, self.installation.installation_id, job_id)
        await asyncio.to_thread(sweep_scratch, data_dir)
        async with (
            self._pool(f"orchestrator job {job_id}", max_size=SUPERVISOR_CONNECTIONS) as pool,
            self._open_containers() as containers,
        ):
            store = patient(job_store(pool, self.settings), self.settings.lease_seconds)
            parts = SupervisionParts(
                store=store,
                ledger=patient(ledger(pool, self.settings), self.settings.lease_seconds),
                cluster=self._cluster,
                policy=lambda claim: self._policy(claim, store, containers, scratch),
                seed_secret=self.installation.seed_secret(),
                validator_hotkey=self.settings.validator_hotkey,
                lease_seconds=self.settings.lease_seconds,
                max_containers=self.settings.max_containers_per_job,
                out_of_bounds_actions=self.settings.out_of_bounds_actions,
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

    def _open_containers(self) -> AbstractAsyncContextManager[Containers]:
        # A Ray worker's parent is its node's raylet: with the node gone, nobody can talk to the container.
        return open_containers(self.settings, watch_pid=os.getppid())

    def _cluster(self, claim: Claim) -> Cluster:
        job = claim.job.message
        config = job.job_config
        settings = self.settings
        plan = ClusterPlan(
            job=job,
            workers=job.resources.workers or settings.workers_per_job,
            cpus_per_worker=job.resources.cpus_per_worker or settings.cpus_per_worker,
            node_resource=self._node_resource(),
            cluster_grows=self.settings.cluster_autoscales,
        )
        setup = WorkerSetup(
            job=job,
            connector=_with_points(WebSocketConnector("", 0)),
            limits=episode_limits(job, settings),
            # By its name alone: workers are given nothing of the recipe, which holds secrets.
            find_sink=partial(get_actor, sink_name(self.generation), self.namespace),
            step_log_interval=config.step_log_interval or settings.step_log_interval,
            log_steps=settings.telemetry_steps,
            byte_cap=settings.episode_buffer_bytes,
            connect_timeout_seconds=settings.connect_timeout_seconds,
            sink_timeout_seconds=SINK_TIMEOUT_SECONDS,
            log_level=self.actor_log_level,
        )
        return RolloutCluster(plan, setup)

    def _node_resource(self) -> str | None:
        """Pins workers to the node that their submission runs on; a pod is reached from every one."""
        if self.settings.containers == "kubernetes":
            return None
        return f"node:{ray.util.get_node_ip_address()}"

    def _policy(self, claim: Claim, store: JobStore, containers: Containers, scratch: Path) -> PolicySource:
        message = claim.job.message
        if _names_a_server(message.artifact_url or ""):
            return self._external_policy(claim)
        tools = ContainerTools(
            store=store,
            containers=containers,
            host_client=partial(submission_host, self.settings),
            connector=_connector,
            session_key=self.installation.session_key,
            installation_id=self.installation.installation_id,
            limits=container_limits(claim.job.message, self.settings),
            start_up_timeout_seconds=self.settings.start_up_timeout_seconds,
            end_shows_seconds=END_OF_POD_SECONDS
            if self.settings.containers == "kubernetes"
            else END_OF_PROCESS_SECONDS,
        )
        limits = self._fetch_limits(claim)
        if claim.epoch == 1:  # later there may be a container, which has the archive already
            check_reference(message, limits)

        async def fetch() -> Archive:
            scratch.mkdir(parents=True, exist_ok=True, mode=0o700)
            target = scratch / "archive"
            await failpoints.reach_async("archives.fetch.before")
            archive = Archive(target, await fetch_archive(message, target, limits))
            await failpoints.reach_async("archives.fetch.after")
            return archive

        return SubmissionContainer(tools, fetch)

    def _fetch_limits(self, claim: Claim) -> FetchLimits:
        return FetchLimits(
            self.settings.archive_max_bytes,
            self.settings.archive_fetch_timeout_seconds,
            self.settings.archive_allowed_schemes + (("file",) if claim.job.local else ()),
            hosts=self.settings.archive_allowed_hosts or None,  # empty: any public host
            private_hosts=self.settings.archive_private_hosts,
            ca_file=None if self.settings.archive_ca_file is None else str(self.settings.archive_ca_file),
        )

    def _external_policy(self, claim: Claim) -> PolicySource:
        if not claim.job.local:
            # Anybody could have us dial any address inside the cluster.
            raise UsageError("only jobs of the local command line may name a policy server by its address")
        host, port = _server_address(claim.job.message.artifact_url or "")
        return ExternalPolicy(
            _with_points(WebSocketConnector(host, port)), self.settings.connect_timeout_seconds
        )


async def remove_leftovers(settings: Settings, installation: Installation) -> None:
    """Remove what containers and killed supervisors left on this machine, after their Ray has ended."""
    await asyncio.to_thread(sweep_scratch, data_directory(settings))
    async with open_containers(settings) as containers:
        try:
            left = await containers.list_owned(installation.installation_id)
        except InfrastructureError as error:
            log.warning("containers_not_listed", why=str(error))
            return
        for owned in left:
            try:
                await containers.remove(owned.handle)
            except InfrastructureError as error:
                log.warning("container_left", container_id=str(owned.container_id), why=str(error))


def _names_a_server(url: str) -> bool:
    return url.lower().startswith(f"{EXTERNAL_SCHEME}:")


def _server_address(url: str) -> tuple[str, int]:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:  # a bracket too few, or a port that is none
        host = port = None
    if not host or not port:
        raise UsageError(
            f"{url[:200]!r} is no address of a policy server: "
            f"write {EXTERNAL_SCHEME}://HOST:PORT, with a port from 1 to 65535"
        )
    return host, port


def _connector(endpoint: Endpoint, key: bytes) -> PolicyConnector:
    return _with_points(WebSocketConnector(endpoint.host, endpoint.port, session_key=key))


def _with_points(connector: PolicyConnector) -> PolicyConnector:
    return failpoints.instrumented(connector, "policy_connector", {"connect": "policy_connection"})
