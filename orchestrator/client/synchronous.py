"""The client for programs without an event loop: each call runs on a loop in a thread of the client's own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import AsyncGenerator, Coroutine, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from orchestrator.client.asynchronous import CANCEL_SECONDS, CANCELLED_ON_REQUEST, AsyncClient
from orchestrator.client.connection import PATIENCE_SECONDS
from orchestrator.client.following import Progress
from orchestrator.client.submission_logs import DEFAULT_TAIL_BYTES
from orchestrator.domain.episodes import EpisodeOutcome
from orchestrator.domain.errors import UsageError
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.messages import EvalJobMessage, EvalResultMessage
from orchestrator.domain.reports import HeldRow, JobInfo, JobSummary, TaskCounts
from orchestrator.settings import Settings

T = TypeVar("T")

END_SECONDS = 30.0


class Client:
    """`AsyncClient` without `await`: `with Client(database_url) as client: ...`.

    The methods are those of AsyncClient. May be used from several threads; Ctrl-C ends the call that waits,
    and nothing of the client stays behind after the block.
    """

    def __init__(
        self,
        database_url: str | None = None,
        *,
        data_dir: Path | None = None,
        settings: Settings | None = None,
        patience_seconds: float = PATIENCE_SECONDS,
        application_name: str = "orchestrator client",
    ) -> None:
        self._client = AsyncClient(
            database_url,
            data_dir=data_dir,
            settings=settings,
            patience_seconds=patience_seconds,
            application_name=application_name,
        )
        self._loop: LoopThread | None = None

    def __enter__(self) -> Self:
        self._loop = LoopThread()
        try:
            self._run(self._client.__aenter__())
        except BaseException:
            self._end_loop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._run(self._client.__aexit__(kind, error, trace))
        finally:
            self._end_loop()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop is None:
            work.close()
            raise UsageError("the client is not open: use it in a `with` block")
        return self._loop.run(work)

    def _end_loop(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.close()

    # ------------------------------------------------------------------------------------ submitting

    def submit(
        self,
        message: EvalJobMessage | Mapping[str, Any] | None = None,
        /,
        *,
        local: bool = False,
        **fields: Any,
    ) -> int:
        return self._run(self._client.submit(message, local=local, **fields))

    def retry(self, job_id: int, *, force: bool = False) -> int:
        return self._run(self._client.retry(job_id, force=force))

    def retry_held(self, row_id: int) -> None:
        self._run(self._client.retry_held(row_id))

    def cancel(
        self,
        job_id: int,
        reason: str = CANCELLED_ON_REQUEST,
        *,
        wait: bool = True,
        timeout_seconds: float = CANCEL_SECONDS,
    ) -> JobSummary:
        return self._run(self._client.cancel(job_id, reason, wait=wait, timeout_seconds=timeout_seconds))

    # --------------------------------------------------------------------------------------- reading

    def get(self, job_id: int) -> JobInfo:
        return self._run(self._client.get(job_id))

    def jobs(
        self,
        *,
        statuses: Iterable[JobStatus] | None = None,
        benchmark: str | None = None,
        tags: Mapping[str, str] | None = None,
        limit: int = 50,
    ) -> list[JobSummary]:
        return self._run(self._client.jobs(statuses=statuses, benchmark=benchmark, tags=tags, limit=limit))

    def summaries(self, job_ids: Sequence[int]) -> list[JobSummary]:
        return self._run(self._client.summaries(job_ids))

    def tasks(self, job_id: int) -> list[TaskCounts]:
        return self._run(self._client.tasks(job_id))

    def held_rows(self, limit: int = 50) -> list[HeldRow]:
        return self._run(self._client.held_rows(limit))

    def result(self, job_id: int) -> EvalResultMessage | None:
        return self._run(self._client.result(job_id))

    def outcomes(self, job_id: int) -> list[EpisodeOutcome]:
        return self._run(self._client.outcomes(job_id))

    def log(self, job_id: int, *, tail_bytes: int = DEFAULT_TAIL_BYTES) -> str:
        return self._run(self._client.log(job_id, tail_bytes=tail_bytes))

    def is_served(self) -> bool:
        return self._run(self._client.is_served())

    # ------------------------------------------------------------------------------------- following

    def wait(self, job_id: int, timeout_seconds: float | None = None) -> EvalResultMessage:
        return self._run(self._client.wait(job_id, timeout_seconds))

    def results(
        self, job_ids: Sequence[int], timeout_seconds: float | None = None
    ) -> list[EvalResultMessage]:
        return self._run(self._client.results(job_ids, timeout_seconds))

    def stream(self, job_id: int, timeout_seconds: float | None = None) -> Generator[Progress, None, None]:
        events = self._client.stream(job_id, timeout_seconds)
        try:
            while (progress := self._run(_next(events))) is not None:
                yield progress
        finally:
            if self._loop is not None:
                self._run(_close(events))


for _name, _method in vars(Client).items():
    if not _name.startswith("_"):
        _method.__doc__ = getattr(AsyncClient, _name).__doc__


async def _next(events: AsyncGenerator[Progress, None]) -> Progress | None:
    return await anext(events, None)


async def _close(events: AsyncGenerator[Progress, None]) -> None:
    await events.aclose()


class LoopThread:
    """An event loop in a thread of its own, until `close`."""

    def __init__(self) -> None:
        self._ready: concurrent.futures.Future[asyncio.AbstractEventLoop] = concurrent.futures.Future()
        self._ends = asyncio.Event()
        self._thread = threading.Thread(target=self._main, name="orchestrator-client", daemon=True)
        self._thread.start()
        self._loop = self._ready.result()

    def _main(self) -> None:
        with asyncio.Runner() as runner:
            self._ready.set_result(runner.get_loop())
            runner.run(self._until_closed())

    async def _until_closed(self) -> None:
        await self._ends.wait()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` returns or raises; an interrupted wait cancels it, and sees it end."""
        running: list[asyncio.Task[Any] | None] = []

        async def noted() -> T:
            running.append(asyncio.current_task())
            return await work

        future = asyncio.run_coroutine_threadsafe(noted(), self._loop)
        try:
            return future.result()
        except BaseException:
            if not future.done():  # not its own error: Ctrl-C, as a rule
                self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in running if task])
                concurrent.futures.wait([future], END_SECONDS)
            raise

    def close(self) -> None:
        """End the loop, with whatever still runs on it."""
        self._loop.call_soon_threadsafe(self._ends.set)
        self._thread.join(END_SECONDS)
