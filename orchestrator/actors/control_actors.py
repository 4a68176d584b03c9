"""The detached actors of the control plane: thin Ray wrappers round plain classes.

No wrapper does I/O in its constructor: an actor whose constructor raises is dead for good, whatever
`max_restarts` says. Each opens its own connections from a recipe, in a task that starts over when it fails.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial
from typing import Any, Protocol
from uuid import UUID

import ray
import structlog

from orchestrator.actors.job_supervision import JobSupervision
from orchestrator.actors.parcels import Parcel
from orchestrator.actors.queue_consumer import QueueConsumer
from orchestrator.actors.ray_calls import kill_actor
from orchestrator.actors.result_sink import ResultSink
from orchestrator.actors.tenure import CONSUMER_PREFIX, Tenure
from orchestrator.domain.episodes import CommitOutcome, EpisodeRun
from orchestrator.domain.errors import InfrastructureError
from orchestrator.ports import ClaimRefusal

log = structlog.get_logger(__name__)

SINK_PREFIX = "result-sink-g"
SUPERVISOR_PREFIX = "job-"
CONTROL_SHARE = 0.001

FIRST_BACKOFF_SECONDS = 0.2
LAST_BACKOFF_SECONDS = 5.0
OPEN_SECONDS = 30.0
LAST_WORDS_SECONDS = 5.0
KILL_TRIES = 3
FETCH_SECONDS = 20.0


class Recipe(Protocol):
    """How an actor opens what it wraps, in its own process. Pickles, compares by value; made by `app.py`."""

    @property
    def namespace(self) -> str: ...

    @property
    def generation(self) -> int: ...

    @property
    def drain_seconds(self) -> float:
        """How long episodes under way may take to their end when a supervisor is stopped."""
        ...

    @property
    def control_resource(self) -> str | None:
        """The custom resource of the nodes that the actors of the control plane run on; None: of any."""
        ...

    def set_up_process(self, **fields: object) -> None:
        """Logging, and the end with the node, once in each process."""
        ...

    def open_sink(self) -> AbstractAsyncContextManager[ResultSink]: ...

    def open_consumer(self) -> AbstractAsyncContextManager[QueueConsumer]: ...

    def open_supervision(self, job_id: int, holder: UUID) -> AbstractAsyncContextManager[JobSupervision]: ...


def sink_name(generation: int) -> str:
    return f"{SINK_PREFIX}{generation}"


def consumer_name(generation: int) -> str:
    return f"{CONSUMER_PREFIX}{generation}"


def supervisor_name(job_id: int) -> str:
    return f"{SUPERVISOR_PREFIX}{job_id}"


async def end_this_actor(name: str) -> None:
    """End the actor that this process is, for good; where Ray does not, the process."""
    for _ in range(KILL_TRIES):
        try:
            me = ray.get_runtime_context().current_actor
            await asyncio.wait_for(
                asyncio.to_thread(kill_actor, me, no_restart=True), timeout=LAST_WORDS_SECONDS
            )
        except Exception:
            log.exception("actor_not_ended", actor=name)
        await asyncio.sleep(LAST_WORDS_SECONDS)  # the kill ends us here
    # Ray may start another process, with new connections to the cluster. It finds its place or its job in
    # other hands, and ends itself; or it finds that free, and goes on with it.
    log.error("actor_exits", actor=name)
    os._exit(1)


def control_options(control_resource: str | None) -> dict[str, Any]:
    """The scheduling options of what belongs to the control plane: no CPU, and its nodes if they are known.

    The amount is the smallest that Ray counts exactly: the resource is a name of nodes, not a limit.
    """
    resources = {} if control_resource is None else {control_resource: CONTROL_SHARE}
    return {"num_cpus": 0, "resources": resources}


class ServiceLoop:
    """The top of an actor: runs `serve` until it returns, with backoff after each failure.

    `serve` sets `opened` while it works.
    """

    def __init__(self, name: str, serve: Callable[[], Awaitable[None]]) -> None:
        self._name = name
        self._serve = serve
        self._last_error = "no answer yet"
        self.opened = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    async def ready(self, timeout_seconds: float) -> str | None:
        """None once it works; else, when the time is over, what keeps it from that."""
        try:
            await asyncio.wait_for(self.opened.wait(), timeout_seconds)
        except TimeoutError:
            return self._last_error
        return None

    async def end(self, patience_seconds: float) -> None:
        """Wait until `serve` has returned by itself, then cancel it."""
        if patience_seconds:
            await asyncio.wait({self._task}, timeout=patience_seconds)
        self._task.cancel()
        await asyncio.wait({self._task}, timeout=LAST_WORDS_SECONDS)

    async def _run(self) -> None:
        pause_seconds = FIRST_BACKOFF_SECONDS
        while True:
            started_at = time.monotonic()
            try:
                await self._serve()
                return
            except Exception as error:
                self._last_error = str(error) or type(error).__name__
                log.exception("actor_loop_failed", actor=self._name)
            finally:
                self.opened.clear()
            if time.monotonic() - started_at > 10 * LAST_BACKOFF_SECONDS:
                pause_seconds = FIRST_BACKOFF_SECONDS
            await asyncio.sleep(pause_seconds * random.uniform(0.5, 1.0))  # noqa: S311 - not for secrets
            pause_seconds = min(2 * pause_seconds, LAST_BACKOFF_SECONDS)


class ResultSinkActor:
    """Detached; everything it holds can be sent again."""

    async def __init__(self, recipe: Recipe) -> None:  # type: ignore[misc]  # Ray awaits it
        recipe.set_up_process(actor=sink_name(recipe.generation))
        self._recipe = recipe
        self._sink: ResultSink | None = None
        self._loop = ServiceLoop("ResultSink", self._serve)

    def __repr__(self) -> str:
        committed = self._sink.committed if self._sink else 0
        return f"ResultSink(generation {self._recipe.generation}, {committed} episodes committed)"

    async def _serve(self) -> None:
        tenure = Tenure(self._recipe.namespace, SINK_PREFIX, self._recipe.generation)
        async with self._recipe.open_sink() as sink:
            self._sink = sink
            self._loop.opened.set()
            is_over = await tenure.during(sink.work())
        if is_over:
            await end_this_actor(sink_name(self._recipe.generation))

    async def commit(self, parcel: Parcel) -> list[CommitOutcome]:
        """See `ResultSink.commit_fetched`; the parcel holds a list of `FinishedEpisode`."""
        sink = await self._opened()
        return await sink.commit_fetched(parcel.size_bytes, partial(parcel.unpacked, FETCH_SECONDS))

    async def stage(self, run: EpisodeRun, part: int, parcel: Parcel) -> bool:
        """See `ResultSink.stage_fetched`; the parcel holds a list of messages."""
        sink = await self._opened()
        return await sink.stage_fetched(run, part, parcel.size_bytes, partial(parcel.unpacked, FETCH_SECONDS))

    async def serves(self, recipe: Recipe) -> bool:
        """Whether it works by this very recipe: generation, database and settings."""
        return self._recipe == recipe

    async def ready(self, timeout_seconds: float) -> str | None:
        """None once the database is open; else, when the time is over, why it is not."""
        return await self._loop.ready(timeout_seconds)

    async def stop(self) -> None:
        """Close the connections; the actor can be killed then without an abrupt end of anything."""
        await self._loop.end(0)

    async def _opened(self) -> ResultSink:
        why = await self._loop.ready(OPEN_SECONDS)
        if why is not None or self._sink is None:
            raise InfrastructureError(f"the result sink has no database: {why}")
        return self._sink


class QueueConsumerActor:
    """Detached; owns nothing that must outlive it."""

    async def __init__(self, recipe: Recipe) -> None:  # type: ignore[misc]  # Ray awaits it
        recipe.set_up_process(actor=consumer_name(recipe.generation))
        self._recipe = recipe
        self._consumer: QueueConsumer | None = None
        self._stopping = False
        self._loop = ServiceLoop("QueueConsumer", self._serve)

    def __repr__(self) -> str:
        state = "consuming" if self._consumer else "connecting"
        return f"QueueConsumer(generation {self._recipe.generation}, {state})"

    async def _serve(self) -> None:
        if self._stopping:
            return
        tenure = Tenure(self._recipe.namespace, CONSUMER_PREFIX, self._recipe.generation)
        async with self._recipe.open_consumer() as consumer:
            if self._stopping:
                return
            self._consumer = consumer
            self._loop.opened.set()
            try:
                is_over = await tenure.during(consumer.work())
            finally:
                self._consumer = None
        if is_over:
            await end_this_actor(consumer_name(self._recipe.generation))

    async def serves(self, recipe: Recipe) -> bool:
        """Whether it works by this very recipe: generation, database and settings."""
        return self._recipe == recipe

    async def ready(self, timeout_seconds: float) -> str | None:
        """None once the database is open; else, when the time is over, why it is not."""
        return await self._loop.ready(timeout_seconds)

    async def stop(self) -> None:
        """Take no more jobs; returns when the rows in hand are handed over."""
        self._stopping = True
        if self._consumer is not None:
            self._consumer.stop()
        await self._loop.end(OPEN_SECONDS)


class JobSupervisorActor:
    """Detached, named after its job; ends itself when the job is done or belongs to another incarnation.

    `holder` is given to the constructor, so that it survives Ray's restarts: the next process claims at once.
    """

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, recipe: Recipe, job_id: int, holder: UUID, benchmark: str = ""
    ) -> None:
        recipe.set_up_process(actor=supervisor_name(job_id), job_id=job_id)
        self._recipe = recipe
        self._job_id = job_id
        self._holder = holder
        self._benchmark = benchmark
        self._supervision: JobSupervision | None = None
        self._told = asyncio.Event()
        self._decided: asyncio.Future[ClaimRefusal | None] = asyncio.get_running_loop().create_future()
        self._main = asyncio.create_task(self._supervise())

    def __repr__(self) -> str:
        progress = self._supervision.progress if self._supervision else "connects"
        return f"JobSupervisor(job {self._job_id}, {self._benchmark}: {progress})"

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
        """End this actor for good."""
        with suppress(TimeoutError):
            # Whoever created us may still be about to ask what the claim gave.
            await asyncio.wait_for(self._told.wait(), LAST_WORDS_SECONDS)
        await end_this_actor(supervisor_name(self._job_id))

    async def decided(self) -> str | None:
        """None when the job is held here, else the reason (a `ClaimRefusal`) why not."""
        decision = await asyncio.shield(self._decided)
        self._told.set()
        return None if decision is None else decision.value

    async def serves(self, recipe: Recipe) -> bool:
        """Whether it works by this very recipe: generation, and with it the sink, database and settings."""
        return self._recipe == recipe

    async def ping(self) -> str:
        return repr(self)

    async def report_missing(self, container_id: UUID) -> None:
        """Somebody found that this container of the job is not there any more."""
        if self._supervision is not None:
            await self._supervision.report_missing(container_id)

    async def stop(self, drain_seconds: float = 0.0) -> None:
        """Stop the workers and give the job up, for another supervisor to go on with.

        Episodes under way have this time to come to their end; what is cut short then runs again elsewhere.
        """
        self._told.set()
        if drain_seconds > 0 and self._supervision is not None and await self._supervision.drain():
            await asyncio.wait({self._main}, timeout=drain_seconds)
        self._main.cancel()
        await asyncio.wait({self._main}, timeout=OPEN_SECONDS)

    async def process_id(self) -> int:
        return os.getpid()


# An async actor runs up to 1,000 calls at once by default; all of these are bounded by their callers. What
# they are given is in memory from then on, so what may be large comes in parcels.
ResultSinkRemote = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)(ResultSinkActor)
QueueConsumerRemote = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)(QueueConsumerActor)
JobSupervisorRemote = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)(JobSupervisorActor)
