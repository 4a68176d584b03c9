"""The rollout workers of one job on Ray: a placement group and the actors in it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import structlog
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.actors.episode_publisher import size_bytes
from orchestrator.actors.episode_runner import RunReport
from orchestrator.actors.job_supervision import CannotRun
from orchestrator.actors.parcels import Parcel, packed
from orchestrator.actors.ray_calls import (
    ask,
    cluster_resources,
    create_actor,
    create_placement_group,
    free_placement_group,
    kill_actor,
    placement,
)
from orchestrator.actors.rollout_worker import RolloutWorker, WorkerSetup
from orchestrator.actors.rollouts import WorkerLost
from orchestrator.domain.episodes import CommitOutcome, EpisodeRun, FinishedEpisode
from orchestrator.domain.errors import InfrastructureError
from orchestrator.domain.job_documents import printable
from orchestrator.domain.messages import EvalJobMessage
from orchestrator.ports import BenchmarkDescription, PolicyConnector

log = structlog.get_logger(__name__)

# A cold worker on a busy machine needs tens of seconds for its process and the simulator's import.
START_SECONDS = 180.0
PING_EVERY_SECONDS = 3.0
# A node that is away for a moment, or not there yet, must not fail a job.
IMPOSSIBLE_SECONDS = 5.0
PING_ANSWER_SECONDS = 10.0
SINK_PATIENCE_SECONDS = 120.0


@dataclass(frozen=True)
class ClusterPlan:
    """What a job asks of Ray. `node_resource` pins all workers to one node (process containers are there)."""

    job: EvalJobMessage
    workers: int
    cpus_per_worker: float
    node_resource: str | None
    cluster_grows: bool

    @property
    def bundles(self) -> list[dict[str, float]]:
        bundle: dict[str, float] = {"CPU": self.cpus_per_worker}
        if self.node_resource is not None:
            bundle[self.node_resource] = 0.001
        return [dict(bundle) for _ in range(self.workers)]


class RolloutCluster:
    """Implements `job_supervision.Cluster`. Everything in it belongs to the supervisor's process."""

    def __init__(self, plan: ClusterPlan, setup: WorkerSetup) -> None:
        self._plan = plan
        self._setup = setup  # its connector is filled in by `prepare`
        self._group: PlacementGroup | None = None
        self._workers: list[Any] = []

    @property
    def size(self) -> int:
        return self._plan.workers

    async def start(self, waiting: Callable[[str], Awaitable[None]]) -> None:
        """Placement group first, then the actors in it.

        Raises:
            CannotRun: the cluster can never give what the job asks for.
        """
        self._group = await asyncio.to_thread(
            create_placement_group, self._plan.bundles, f"job-{self._plan.job.job_id}"
        )
        await self._placed(self._group, waiting)
        self._workers = [self._create(index) for index in range(self._plan.workers)]
        await asyncio.gather(*(self._ask(worker, "ping") for worker in self._workers))

    async def _placed(self, group: PlacementGroup, waiting: Callable[[str], Awaitable[None]]) -> None:
        """Wait for the group. It never fails by itself, so its scheduling state is read.

        Others may use what it needs: how long it waits for them is the job's own deadline.
        """
        asked = f"{self._plan.workers} workers of {self._plan.cpus_per_worker:g} CPUs"
        pause_seconds, said = 0.01, False
        doubted_at: float | None = None
        while True:
            table = await asyncio.to_thread(placement, group)
            if table.get("state") == "CREATED":
                return
            if not await self._looks_impossible(table):
                doubted_at = None
            elif doubted_at is None:
                doubted_at = time.monotonic()
            elif time.monotonic() - doubted_at > IMPOSSIBLE_SECONDS:
                raise CannotRun(
                    f"the job asks for {asked}; the cluster has {await _resources()}: "
                    "ask for less by resources.workers and resources.cpus_per_worker"
                )
            if not said and pause_seconds >= 0.5:
                said = True
                await waiting(f"waits for {asked}")
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, 0.5)

    async def _looks_impossible(self, table: Mapping[str, Any]) -> bool:
        if self._plan.cluster_grows:
            return False
        state = table.get("stats", {}).get("scheduling_state", "")
        return state == "INFEASIBLE" or await self._exceeds_the_cluster()

    async def _exceeds_the_cluster(self) -> bool:
        """Whether the bundles together are more than all nodes have: Ray may call that NO_RESOURCES."""
        total: Mapping[str, float] = await asyncio.to_thread(cluster_resources)
        asked: Counter[str] = Counter()
        for bundle in self._plan.bundles:
            asked.update(bundle)
        return any(amount > total.get(name, 0.0) + 1e-6 for name, amount in asked.items())

    def _create(self, index: int) -> Any:
        job = self._plan.job
        options = {
            "num_cpus": self._plan.cpus_per_worker,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, index),
            "max_concurrency": 8,
        }
        benchmark = printable(f"{job.env_provider}/{job.benchmark_name}")[:100]
        return create_actor(RolloutWorker, options, job.job_id, index, benchmark)

    async def describe(self) -> BenchmarkDescription:
        """The job's benchmark as the first worker knows it.

        Raises:
            UsageError: provider, name or config is wrong.
        """
        description: BenchmarkDescription = await self._ask(self._workers[0], "describe", self._plan.job)
        return description

    async def prepare(self, index: int, connector: PolicyConnector) -> None:
        """Point a worker at a policy.

        Raises:
            WorkerLost: it died meanwhile.
        """
        setup = replace(self._setup, connector=connector)
        await self._ask(self._workers[index], "prepare", setup)

    async def run(self, index: int, runs: list[EpisodeRun]) -> list[RunReport]:
        """What came of the runs, once all that is to be committed is.

        Raises:
            WorkerLost: it died, or did not answer a ping meanwhile.
        """
        worker = self._workers[index]
        call = asyncio.ensure_future(self._ask(worker, "run", runs, timeout_seconds=None))
        try:
            while True:
                done, _ = await asyncio.wait({call}, timeout=PING_EVERY_SECONDS)
                if done:
                    reports: list[RunReport] = call.result()
                    return reports
                await self._ask(worker, "ping", timeout_seconds=PING_ANSWER_SECONDS)
        finally:
            call.cancel()

    async def replace(self, index: int) -> None:
        """A new actor in the same bundle, the old one dead for certain."""
        await asyncio.to_thread(kill_actor, self._workers[index])
        self._workers[index] = self._create(index)
        await self._ask(self._workers[index], "ping")

    async def settle(self, finished: FinishedEpisode) -> CommitOutcome:
        """Commit an episode whose fault the supervisor decided on.

        Raises:
            InfrastructureError: the sink did not acknowledge in time.
        """
        until = time.monotonic() + SINK_PATIENCE_SECONDS
        pause_seconds = 0.1
        parcel: Parcel | None = None
        while True:
            try:
                parcel = parcel or await asyncio.to_thread(packed, [finished], size_bytes(finished))
                sink = await asyncio.to_thread(self._setup.find_sink)
                outcomes = await ask(sink, "commit", parcel, timeout_seconds=self._setup.sink_timeout_seconds)
                return CommitOutcome(outcomes[0])
            except (RayError, InfrastructureError, TimeoutError, ValueError) as error:
                # A sink that restarts: sending again is safe, the ledger is idempotent.
                if time.monotonic() > until:
                    raise InfrastructureError(f"the result sink does not answer: {error}") from error
                await asyncio.sleep(pause_seconds * random.uniform(0.5, 1.0))  # noqa: S311
                pause_seconds = min(2 * pause_seconds, 2.0)

    async def drain(self) -> None:
        """See `Cluster.drain`. A worker that does not answer has its episode cut short, as by `stop`."""
        asked = (ask(worker, "drain", timeout_seconds=PING_ANSWER_SECONDS) for worker in self._workers)
        for answer in await asyncio.gather(*asked, return_exceptions=True):
            if isinstance(answer, BaseException):
                log.warning("worker_not_drained", job_id=self._plan.job.job_id, why=str(answer))

    async def stop(self) -> None:
        """Workers and placement group are gone when it returns. Idempotent."""
        workers, self._workers = self._workers, []
        for worker in workers:
            with contextlib.suppress(RayError):
                await asyncio.to_thread(kill_actor, worker)
        group, self._group = self._group, None
        if group is not None:
            await asyncio.to_thread(free_placement_group, group)

    async def _ask(
        self, worker: Any, method: str, *arguments: Any, timeout_seconds: float | None = START_SECONDS
    ) -> Any:
        try:
            return await ask(worker, method, *arguments, timeout_seconds=timeout_seconds)
        except RayTaskError as error:
            cause = error.cause
            raise (cause if isinstance(cause, Exception) else InfrastructureError(str(error))) from error
        except RayError as error:
            # The actor, its node or its memory: all of it is ours, and the worker is replaced.
            first_line = str(error).partition("\n")[0]
            raise WorkerLost(f"{type(error).__name__}: {first_line}") from error
        except TimeoutError as error:
            raise WorkerLost(f"no answer within {timeout_seconds} s") from error


async def _resources() -> str:
    total: Mapping[str, float] = await asyncio.to_thread(cluster_resources)
    shown = {
        name: value for name, value in total.items() if name in ("CPU", "GPU") or name.startswith("accel")
    }
    # Placement groups that reserve something of a node have resources named after both.
    named = [name for name in total if name.startswith("node:") and "_group_" not in name]
    nodes = len([name for name in named if "internal_head" not in name])
    amounts = ", ".join(f"{value:g} {name}" for name, value in sorted(shown.items()))
    return f"{amounts} on {nodes} node{'' if nodes == 1 else 's'}"
