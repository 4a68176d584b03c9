"""The actors of the control plane: thin Ray wrappers round plain classes, and how they find each other.

No wrapper does I/O in its constructor: an actor whose constructor raises is dead for good, whatever
`max_restarts` says. Each opens its own connections from a recipe, in a task that starts over when it fails.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import UUID, uuid4

import ray
import structlog
from ray.exceptions import RayActorError, RayError

from orchestrator.actors.job_supervision import JobSupervision
from orchestrator.actors.queue_consumer import QueueConsumer
from orchestrator.actors.result_sink import ResultSink
from orchestrator.domain.episodes import CommitOutcome, EpisodeRun, FinishedEpisode
from orchestrator.domain.errors import InfrastructureError
from orchestrator.ports import ClaimRefusal

log = structlog.get_logger(__name__)

FIRST_BACKOFF_SECONDS = 0.2
LAST_BACKOFF_SECONDS = 5.0
OPEN_SECONDS = 30.0
# Creating an actor on a busy machine takes seconds; a claim can wait for a lock for a third of a lease.
DECISION_SECONDS = 120.0
PING_SECONDS = 5.0
LAST_WORDS_SECONDS = 5.0


class Recipe(Protocol):
    """How an actor opens what it wraps, in its own process. Pickles; made by `app.py`."""

    @property
    def namespace(self) -> str: ...

    @property
    def generation(self) -> int: ...

    def set_up_process(self, **fields: object) -> None:
        """Logging, once in each process."""
        ...

    def open_sink(self) -> AbstractAsyncContextManager[ResultSink]: ...

    def open_consumer(self) -> AbstractAsyncContextManager[QueueConsumer]: ...

    def open_supervision(self, job_id: int, holder: UUID) -> AbstractAsyncContextManager[JobSupervision]: ...


def sink_name(generation: int) -> str:
    return f"result-sink-g{generation}"


def consumer_name(generation: int) -> str:
    return f"queue-consumer-g{generation}"


def supervisor_name(job_id: int) -> str:
    return f"job-{job_id}"


async def _again_and_again(name: str, serve: Callable[[], Any]) -> None:
    """Run `serve` until it returns, with backoff after each failure: the top of an actor's loop."""
    pause_seconds = FIRST_BACKOFF_SECONDS
    while True:
        started_at = time.monotonic()
        try:
            await serve()
            return
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("actor_loop_failed", actor=name)
        if time.monotonic() - started_at > 10 * LAST_BACKOFF_SECONDS:
            pause_seconds = FIRST_BACKOFF_SECONDS
        await asyncio.sleep(pause_seconds * random.uniform(0.5, 1.0))  # noqa: S311
        pause_seconds = min(2 * pause_seconds, LAST_BACKOFF_SECONDS)


class ResultSinkActor:
    """Detached; everything it holds can be sent again."""

    async def __init__(self, recipe: Recipe) -> None:  # type: ignore[misc]  # Ray awaits it
        recipe.set_up_process(actor=sink_name(recipe.generation))
        self._recipe = recipe
        self._sink: ResultSink | None = None
        self._open = asyncio.Event()
        self._stopping = asyncio.Event()
        self._main = asyncio.create_task(_again_and_again("ResultSink", self._serve))

    def __repr__(self) -> str:
        committed = self._sink.committed if self._sink else 0
        return f"ResultSink(generation {self._recipe.generation}, {committed} episodes committed)"

    async def _serve(self) -> None:
        async with self._recipe.open_sink() as sink:
            self._sink = sink
            self._open.set()
            try:
                await sink.work()
            finally:
                self._open.clear()

    async def commit(self, finished: list[FinishedEpisode]) -> list[CommitOutcome]:
        """See `ResultSink.commit`."""
        return await (await self._opened()).commit(finished)

    async def stage(self, run: EpisodeRun, part: int, messages: list[bytes]) -> bool:
        """See `ResultSink.stage`."""
        return await (await self._opened()).stage(run, part, messages)

    async def ping(self) -> str:
        return repr(self)

    async def stop(self) -> None:
        """Close the connections; the actor can be killed then without an abrupt end of anything."""
        self._main.cancel()
        await asyncio.wait({self._main}, timeout=LAST_WORDS_SECONDS)

    async def _opened(self) -> ResultSink:
        try:
            await asyncio.wait_for(self._open.wait(), OPEN_SECONDS)
        except TimeoutError as error:
            raise InfrastructureError("the result sink has no database yet") from error
        assert self._sink is not None
        return self._sink


class QueueConsumerActor:
    """Detached; owns nothing that must outlive it."""

    async def __init__(self, recipe: Recipe) -> None:  # type: ignore[misc]  # Ray awaits it
        recipe.set_up_process(actor=consumer_name(recipe.generation))
        self._recipe = recipe
        self._consumer: QueueConsumer | None = None
        self._stopping = False
        self._main = asyncio.create_task(_again_and_again("QueueConsumer", self._serve))

    def __repr__(self) -> str:
        state = "consuming" if self._consumer else "connecting"
        return f"QueueConsumer(generation {self._recipe.generation}, {state})"

    async def _serve(self) -> None:
        if self._stopping:
            return
        async with self._recipe.open_consumer() as consumer:
            self._consumer = consumer
            try:
                await consumer.work()
            finally:
                self._consumer = None

    async def ping(self) -> str:
        return repr(self)

    async def stop(self) -> None:
        """Take no more jobs; returns when the rows in hand are handed over."""
        self._stopping = True
        if self._consumer is not None:
            self._consumer.stop()
        _, pending = await asyncio.wait({self._main}, timeout=OPEN_SECONDS)
        if pending:
            self._main.cancel()
            await asyncio.wait({self._main}, timeout=LAST_WORDS_SECONDS)


class JobSupervisorActor:
    """Detached, named after its job; ends itself when the job is done or belongs to another incarnation.

    `holder` is given to the constructor, so that it survives Ray's restarts: the next process claims at once.
    """

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, recipe: Recipe, job_id: int, holder: UUID
    ) -> None:
        recipe.set_up_process(actor=supervisor_name(job_id), job_id=job_id)
        self._recipe = recipe
        self._job_id = job_id
        self._holder = holder
        self._supervision: JobSupervision | None = None
        self._told = asyncio.Event()
        self._decided: asyncio.Future[ClaimRefusal | None] = asyncio.get_running_loop().create_future()
        self._main = asyncio.create_task(self._supervise())

    def __repr__(self) -> str:
        progress = self._supervision.progress if self._supervision else "connects"
        return f"JobSupervisor(job {self._job_id}: {progress})"

    async def _supervise(self) -> None:
        try:
            async with self._recipe.open_supervision(self._job_id, self._holder) as supervision:
                self._supervision = supervision
                supervision.decided.add_done_callback(self._pass_on)
                await supervision.run()
        except asyncio.CancelledError:
            log.info("supervisor_stopped", job_id=self._job_id)
        except Exception as error:
            # Nothing is held, or its lease lapses: the reconciler comes back to the job.
            log.exception("supervisor_failed", job_id=self._job_id)
            if not self._decided.done():
                self._decided.set_exception(InfrastructureError(f"job {self._job_id}: {error}"))
                self._decided.exception()
        finally:
            await self._end()

    def _pass_on(self, decided: asyncio.Future[ClaimRefusal | None]) -> None:
        if not self._decided.done() and not decided.cancelled():
            self._decided.set_result(decided.result())

    async def _end(self) -> None:
        with suppress(TimeoutError):
            # Whoever created us may still be about to ask what the claim gave.
            await asyncio.wait_for(self._told.wait(), LAST_WORDS_SECONDS)
        me = ray.get_runtime_context().current_actor
        await asyncio.to_thread(ray.kill, me, no_restart=True)

    async def decided(self) -> str | None:
        """None when the job is held here, else the reason (a `ClaimRefusal`) why not."""
        decision = await asyncio.shield(self._decided)
        self._told.set()
        return None if decision is None else decision.value

    async def ping(self) -> str:
        return repr(self)

    async def stop(self) -> None:
        """Stop the workers and give the job up, for another supervisor to go on with."""
        self._told.set()
        self._main.cancel()
        await asyncio.wait({self._main}, timeout=OPEN_SECONDS)

    async def process_id(self) -> int:
        return os.getpid()


# An async actor runs up to 1,000 calls at once by default; all of these are bounded by their callers.
ResultSinkRemote = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)(ResultSinkActor)
QueueConsumerRemote = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)(QueueConsumerActor)
JobSupervisorRemote = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)(JobSupervisorActor)


@dataclass(frozen=True)
class RaySupervisors:
    """`reconciler.Supervisors` on Ray: one detached actor a job, found by its name."""

    recipe: Recipe

    async def ensure(self, job_id: int) -> ClaimRefusal | None:
        """Create the supervisor unless it exists, and return what its claim gave.

        Raises:
            InfrastructureError: it could not be created, or could not claim.
        """
        last: Exception | None = None
        for attempt in range(3):
            try:
                supervisor = await asyncio.to_thread(self._create, job_id)
                answer = await asyncio.wait_for(_answer(supervisor.decided.remote()), DECISION_SECONDS)
                return None if answer is None else ClaimRefusal(answer)
            except (RayActorError, TimeoutError) as error:
                # It ended just now (an earlier one with the same name, as a rule), or is being restarted.
                last = error
                await asyncio.sleep(0.2 * 2**attempt)
            except RayError as error:
                raise InfrastructureError(f"job {job_id}: {_first_line(error)}") from error
        raise InfrastructureError(f"job {job_id}: its supervisor does not come up: {last}")

    async def revive(self, job_id: int) -> None:
        """Restart a supervisor that does not answer; else make sure that there is one."""
        existing = await asyncio.to_thread(self._find, job_id)
        if existing is not None:
            try:
                await asyncio.wait_for(_answer(existing.ping.remote()), PING_SECONDS)
                return
            except TimeoutError:
                # Frozen. Killed without `no_restart` Ray starts a new process under the same holder.
                log.warning("frozen_supervisor_killed", job_id=job_id)
                await asyncio.to_thread(ray.kill, existing, no_restart=False)
                return
            except RayActorError:
                pass
        await self.ensure(job_id)

    def _find(self, job_id: int) -> Any:
        try:
            return ray.get_actor(supervisor_name(job_id), self.recipe.namespace)
        except ValueError:
            return None

    def _create(self, job_id: int) -> Any:
        return JobSupervisorRemote.options(
            name=supervisor_name(job_id),
            namespace=self.recipe.namespace,
            lifetime="detached",
            get_if_exists=True,
        ).remote(self.recipe, job_id, uuid4())


async def _answer(reference: Any) -> Any:
    return await reference


def _first_line(error: Exception) -> str:
    return next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


@asynccontextmanager
async def running_control_plane(recipe: Recipe) -> AsyncIterator[None]:
    """Consumer and sink of this generation for the block; stopped at its end, with the supervisors."""
    await start_control_plane(recipe)
    try:
        yield
    finally:
        await stop_control_plane(recipe)


async def start_control_plane(recipe: Recipe) -> None:
    """Make sure that sink and consumer of this generation run; older ones are stopped."""
    options = {"namespace": recipe.namespace, "lifetime": "detached", "get_if_exists": True}
    for actor, name in (
        (ResultSinkRemote, sink_name(recipe.generation)),
        (QueueConsumerRemote, consumer_name(recipe.generation)),
    ):
        handle = await asyncio.to_thread(actor.options(name=name, **options).remote, recipe)
        await asyncio.wait_for(_answer(handle.ping.remote()), DECISION_SECONDS)
    for name in await asyncio.to_thread(_ours, recipe.namespace, "queue-consumer-g", "result-sink-g"):
        if name not in (sink_name(recipe.generation), consumer_name(recipe.generation)):
            await _stop(name, recipe.namespace)


async def stop_control_plane(recipe: Recipe) -> None:
    """Stop consumers first, then supervisors (their jobs stay claimable), then sinks."""
    for prefix in ("queue-consumer-g", "job-", "result-sink-g"):
        for name in await asyncio.to_thread(_ours, recipe.namespace, prefix):
            await _stop(name, recipe.namespace)


def _ours(namespace: str, *prefixes: str) -> list[str]:
    named = ray.util.list_named_actors(all_namespaces=True)
    return sorted(
        actor["name"]
        for actor in named
        if actor["namespace"] == namespace and actor["name"].startswith(prefixes)
    )


async def _stop(name: str, namespace: str) -> None:
    try:
        handle = await asyncio.to_thread(ray.get_actor, name, namespace)
        with suppress(TimeoutError, RayError):
            await asyncio.wait_for(_answer(handle.stop.remote()), 2 * OPEN_SECONDS)
        await asyncio.to_thread(ray.kill, handle, no_restart=True)
    except (ValueError, RayError) as error:
        log.info("actor_gone_already", actor=name, why=str(error).splitlines()[0])
