"""How each fault of a schedule is done to a world."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import psutil

from tests.chaos import sockets
from tests.chaos.cluster import Actor
from tests.chaos.jobs import ChaosJob
from tests.chaos.schedule import Fault, Kind
from tests.chaos.world import Installation, World
from tests.kubernetes_double import PodControl

T = TypeVar("T")

VICTIM_SECONDS = 30.0  # how long a fault waits for somebody whom it can happen to
REPLICA = "ServeReplica:orchestrator:ControlPlane"
ACTORS = {
    "consumer": "QueueConsumerActor",
    "supervisor": "JobSupervisorActor",
    "worker": "RolloutWorkerProcess",
    "sink": "ResultSinkActor",
    "Serve replica": REPLICA,
}
EVICTIONS: Sequence[Callable[[PodControl], None]] = (
    PodControl.evict_by_kubelet,
    PodControl.evict_by_api,
    PodControl.preempt,
    PodControl.delete_by_taint_manager,
    PodControl.delete_by_another,
    PodControl.kill_node,
)


@dataclass(frozen=True, slots=True)
class Done:
    """A fault that was done. `over_at`, in seconds since the epoch, is its end: recovery begins there."""

    fault: Fault
    victim: str
    at: float
    over_at: float
    job_id: int | None = None
    costs_an_episode: bool = False  # it may be taken for a fault of the submission


class NoVictim(Exception):
    """Nobody was there whom it could happen to."""


class Injector:
    """Does faults to a world, one at a time."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._frozen: set[int] = set()

    async def do(self, fault: Fault) -> Done:
        """Returns when it is over, or was done for good.

        Raises:
            NoVictim: there was nobody for so long.
        """
        verb, _, what = fault.kind.partition(" ")
        if what in ACTORS:
            return await (self._kill_actor if verb == "kill" else self._freeze_actor)(fault, ACTORS[what])
        doing: dict[Kind, Callable[[Fault], Awaitable[Done]]] = {
            Kind.KILL_COMMAND: self._kill_command,
            Kind.KILL_SUBMISSION: self._kill_submission,
            Kind.KILL_RAYLET: self._kill_raylet,
            Kind.KILL_GCS: self._kill_gcs,
            Kind.KILL_POSTGRES: self._kill_postgres,
            Kind.FREEZE_SUBMISSION: self._freeze_submission,
            Kind.FREEZE_POSTGRES: self._freeze_postgres,
            Kind.CUT_DATABASE: self._end_sessions,
            Kind.CUT_API_SERVER: self._take_api_server_away,
            Kind.EVICT_POD: self._evict_pod,
            Kind.RPC_RESET: partial(self._cut_rpc, how=_reset),
            Kind.RPC_HALF_CLOSE: partial(self._cut_rpc, how=_half_close),
            Kind.RPC_STALL: partial(self._cut_rpc, how=_stall),
            Kind.RPC_LATENCY: partial(self._cut_rpc, how=_delay),
            Kind.RPC_SLICE: self._slice_rpc,
        }
        return await doing[fault.kind](fault)

    def thaw_all(self) -> None:
        """Whoever still stands goes on."""
        for pid in self._frozen:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._frozen.clear()

    # ------------------------------------------------------------------------------- of the control plane

    async def _kill_actor(self, fault: Fault, kind: str) -> Done:
        actor = await self._actor(fault, kind)
        job_id, at = await self._job_of(actor), time.time()
        with suppress(ProcessLookupError):
            os.kill(actor.pid, signal.SIGKILL)
        return Done(fault, _told(actor), at, at, job_id)

    async def _freeze_actor(self, fault: Fault, kind: str) -> Done:
        actor = await self._actor(fault, kind)
        job_id, at = await self._job_of(actor), time.time()
        await self._freeze([actor.pid], fault.seconds)
        return Done(fault, _told(actor), at, time.time(), job_id)

    async def _actor(self, fault: Fault, kind: str) -> Actor:
        async def candidates() -> list[Actor]:
            with suppress(TimeoutError):
                actors = await self._world.cluster.actors()
                return [each for each in actors if each.kind == kind and psutil.pid_exists(each.pid)]
            return []

        return await self._one_of(candidates, fault)

    async def _job_of(self, actor: Actor) -> int | None:
        """The job of a supervisor or a worker."""
        if actor.name.startswith("job-"):
            return int(actor.name.removeprefix("job-"))
        if actor.kind == ACTORS["worker"]:
            return await asyncio.to_thread(self._job_of_worker, actor.pid)
        return None

    def _job_of_worker(self, pid: int) -> int | None:
        """The job whose submission the worker talks to."""
        with suppress(psutil.Error):
            ours = {each.raddr for each in psutil.Process(pid).net_connections("tcp") if each.raddr}
            for _, job, submission in self._submissions():
                with suppress(psutil.Error):
                    for each in psutil.Process(submission).net_connections("tcp"):
                        if each.laddr in ours:
                            return job.job_id
        return None

    async def _kill_command(self, fault: Fault) -> Done:
        async def candidates() -> list[int]:
            return [] if self._world.command.pid is None else [self._world.command.pid]

        pid = await self._one_of(candidates, fault)
        at = time.time()
        os.kill(pid, signal.SIGKILL)
        return Done(fault, f"process {pid}", at, at)

    # ----------------------------------------------------------------------------------------- below it

    async def _kill_raylet(self, fault: Fault) -> Done:
        at = time.time()
        pid = await asyncio.to_thread(self._world.cluster.kill_raylet, fault.pick)
        await asyncio.sleep(fault.seconds)
        await asyncio.to_thread(self._world.cluster.add_node)
        return Done(fault, f"process {pid}", at, at)

    async def _kill_gcs(self, fault: Fault) -> Done:
        at = time.time()
        pid = await asyncio.to_thread(self._world.cluster.kill_gcs)
        await asyncio.sleep(fault.seconds)
        await asyncio.to_thread(self._world.cluster.start_gcs)
        return Done(fault, f"process {pid}", at, time.time())

    async def _kill_postgres(self, fault: Fault) -> Done:
        server, *_ = await self._postgres(fault)
        at = time.time()
        server.kill()  # its guardian starts it again
        return Done(fault, f"process {server.pid}", at, at)

    async def _freeze_postgres(self, fault: Fault) -> Done:
        processes = [process.pid for process in await self._postgres(fault)]
        at = time.time()
        await self._freeze(processes, fault.seconds)
        return Done(fault, f"{len(processes)} processes", at, time.time())

    async def _postgres(self, fault: Fault) -> list[psutil.Process]:
        async def candidates() -> list[list[psutil.Process]]:
            processes = self._world.postgres_processes()
            return [processes] if processes else []

        return await self._one_of(candidates, fault)

    async def _end_sessions(self, fault: Fault) -> Done:
        at = time.time()
        query = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        ended = await self._world.installations[0].line.ask(lambda connection: connection.fetchval(query))
        return Done(fault, f"{ended} sessions", at, at)

    async def _take_api_server_away(self, fault: Fault) -> Done:
        at = time.time()
        with self._world.api.outage():
            await asyncio.sleep(fault.seconds)
        return Done(fault, "the API server", at, time.time())

    # ---------------------------------------------------------------------------------- of submissions

    async def _kill_submission(self, fault: Fault) -> Done:
        _, job, pid = await self._submission(fault)
        at = time.time()
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return Done(fault, f"process {pid}", at, at, job.job_id, costs_an_episode=True)

    async def _freeze_submission(self, fault: Fault) -> Done:
        _, job, pid = await self._submission(fault)
        at = time.time()
        await self._freeze([pid], fault.seconds)
        return Done(fault, f"process {pid}", at, time.time(), job.job_id, costs_an_episode=True)

    async def _evict_pod(self, fault: Fault) -> Done:
        async def candidates() -> list[PodControl]:
            return [
                pod for pod in self._world.double.pods() if pod.object["status"].get("phase") == "Running"
            ]

        pod = await self._one_of(candidates, fault)
        how = EVICTIONS[int(fault.pick * 1e6) % len(EVICTIONS)]
        job_id = pod.object["metadata"].get("labels", {}).get("orchestrator.dev/job")
        at = time.time()
        how(pod)
        return Done(fault, f"{pod.name}: {how.__name__}", at, at, int(job_id) if job_id else None)

    async def _cut_rpc(self, fault: Fault, how: Callable[[list[tuple[int, int]], float], None]) -> Done:
        async def candidates() -> list[tuple[ChaosJob, int, list[int]]]:
            found = [
                (job, pid, sockets.connections_of(pid)) for _, job, pid in await self._found_submissions()
            ]
            return [each for each in found if each[2]]

        job, pid, descriptors = await self._one_of(candidates, fault)
        at = time.time()
        try:
            await asyncio.to_thread(how, [(pid, descriptor) for descriptor in descriptors], fault.seconds)
        except PermissionError:
            raise
        except OSError:
            pass  # the connection, or the process, ended just now
        # Twice in one episode it is the submission's fault.
        return Done(fault, f"{len(descriptors)} of {pid}", at, time.time(), job.job_id, costs_an_episode=True)

    async def _slice_rpc(self, fault: Fault) -> Done:
        _, job, pid = await self._submission(fault)
        at, mark = time.time(), job.directory / "slice"
        mark.touch()
        await asyncio.sleep(fault.seconds)
        mark.unlink()
        return Done(fault, f"process {pid}", at, time.time(), job.job_id)

    async def _submission(self, fault: Fault) -> tuple[Installation, ChaosJob, int]:
        return await self._one_of(self._found_submissions, fault)

    async def _found_submissions(self) -> list[tuple[Installation, ChaosJob, int]]:
        return await asyncio.to_thread(self._submissions)

    def _submissions(self) -> list[tuple[Installation, ChaosJob, int]]:
        """The submissions that serve now."""
        found = []
        for installation in self._world.installations:
            for job in installation.unfinished:
                pid = job.process()
                if pid is not None and psutil.pid_exists(pid) and job.plays():
                    found.append((installation, job, pid))
        return found

    # ------------------------------------------------------------------------------------------ common

    async def _freeze(self, pids: list[int], seconds: float) -> None:
        self._frozen.update(pids)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(seconds)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._frozen.difference_update(pids)

    async def _one_of(self, candidates: Callable[[], Awaitable[list[T]]], fault: Fault) -> T:
        until = time.monotonic() + VICTIM_SECONDS
        while not (found := await candidates()):
            if time.monotonic() > until:
                raise NoVictim(fault.kind)
            await asyncio.sleep(0.1)
        return found[int(fault.pick * len(found))]


def _told(actor: Actor) -> str:
    return f"{actor.name or actor.kind}, process {actor.pid}"


def _reset(connections: list[tuple[int, int]], _: float) -> None:
    for pid, descriptor in connections:
        with sockets.stolen(pid, descriptor) as connection:
            sockets.reset(connection)


def _half_close(connections: list[tuple[int, int]], _: float) -> None:
    for pid, descriptor in connections:
        with sockets.stolen(pid, descriptor) as connection:
            sockets.half_close(connection)


def _stall(connections: list[tuple[int, int]], seconds: float) -> None:
    pid, descriptor = connections[0]
    with sockets.stolen(pid, descriptor) as connection, sockets.deaf(connection):
        time.sleep(seconds)


def _delay(connections: list[tuple[int, int]], seconds: float) -> None:
    pid, descriptor = connections[0]
    with sockets.stolen(pid, descriptor) as connection:
        sockets.delay(connection, seconds)
