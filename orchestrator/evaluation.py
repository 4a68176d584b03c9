"""What the command line does with jobs: make them, submit them, follow them, read their results."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

import asyncpg

from orchestrator.adapters.artifacts.pack import PackedArchive, existing_archive, pack_directory
from orchestrator.adapters.benchmarks.registry import load_benchmark
from orchestrator.adapters.postgres.job_store import PostgresJobStore
from orchestrator.adapters.postgres.pool import retrying
from orchestrator.adapters.postgres.progress import read_progress, unfinished_artifacts
from orchestrator.app import EXTERNAL_SCHEME, job_store, ledger
from orchestrator.domain.episodes import EpisodeOutcome
from orchestrator.domain.errors import InfrastructureError, UsageError
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.messages import EvalJobMessage, EvalResultMessage
from orchestrator.progress import JobProgress
from orchestrator.settings import Settings

T = TypeVar("T")

POLL_SECONDS = 0.25
PATIENCE_SECONDS = 60.0
CANCEL_SECONDS = 60.0
ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar", ".zip")


@dataclass(frozen=True, slots=True)
class EvalRequest:
    """One submission on one benchmark, as asked for on the command line."""

    submission: str
    benchmark: str
    episodes: int | None = None
    workers: int | None = None
    seed: int | None = None
    config: tuple[tuple[str, Any], ...] = ()
    timeout_seconds: float | None = None


def make_jobs(requests: Sequence[EvalRequest], archives: Path) -> list[EvalJobMessage]:
    """A job for each request, its benchmark known and its archive packed.

    Raises:
        UsageError: no such submission or benchmark, or a config that the benchmark cannot use.
    """
    first_id = time.time_ns() // 1_000_000 * 1000 + random.randrange(900)  # noqa: S311 - an id, no secret
    return [_make_job(request, first_id + index, archives) for index, request in enumerate(requests)]


def _make_job(request: EvalRequest, job_id: int, archives: Path) -> EvalJobMessage:
    provider, _, name = request.benchmark.partition("/")
    if not name:
        raise UsageError(
            f"{request.benchmark!r} names no benchmark: write PROVIDER/NAME, like gymnasium/CartPole-v1"
        )
    config: dict[str, Any] = dict(request.config)
    if request.seed is not None:
        config["seed"] = request.seed
    if request.episodes is not None:
        config["episodes_per_task"] = request.episodes
    job: dict[str, Any] = {
        "job_id": job_id,
        "submission_id": request.submission,
        "env_provider": provider,
        "benchmark_name": name,
        "config": config,
        "timeout_seconds": request.timeout_seconds,
        **_artifact(request.submission, archives),
    }
    if request.workers is not None:
        job["resources"] = {"workers": request.workers}
    message = EvalJobMessage.parse(json.dumps(job))
    load_benchmark(provider, name, message.config, message.benchmark_spec)
    return message


def _artifact(submission: str, archives: Path) -> dict[str, Any]:
    path = Path(submission)
    if path.is_dir():
        packed = pack_directory(path, archives)
    elif path.is_file() and path.name.endswith(ARCHIVE_SUFFIXES):
        packed = existing_archive(path)
    elif re.fullmatch(r"[A-Za-z0-9_.\-]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}", submission):
        return {"artifact_url": f"{EXTERNAL_SCHEME}://{submission}"}
    else:
        missing = "" if path.exists() else "does not exist, and so "
        raise UsageError(
            f"{submission!r} {missing}is no submission: "
            "give a directory with agent.py, a .tar.gz, or HOST:PORT"
        )
    return _file_artifact(packed)


def _file_artifact(packed: PackedArchive) -> dict[str, Any]:
    return {
        "artifact_url": f"file://{quote(str(packed.path))}",
        "artifact_sha256": packed.sha256,
        "artifact_size_bytes": packed.size_bytes,
    }


class JobFollower:
    """Submits jobs to a database, and follows them there until each has its result."""

    def __init__(
        self, pool: asyncpg.Pool[asyncpg.Record], settings: Settings, jobs: Sequence[EvalJobMessage]
    ) -> None:
        self._pool = pool
        self._store: PostgresJobStore = job_store(pool, settings)
        self._ledger = ledger(pool, settings)
        self._jobs = jobs

    async def submit(self) -> None:
        """Enqueue all jobs, as those of the local command line."""
        for job in self._jobs:
            await self._store.insert(job, enqueue=True, local=True)

    async def follow(
        self, show: Callable[[Sequence[JobProgress]], None], given_up: Callable[[], Awaitable[bool]]
    ) -> list[EvalResultMessage] | None:
        """The results once every job has one, or None when `given_up` says so; `show` sees each change."""
        while True:
            jobs = await self._progress()
            show(jobs)
            if all(job.status.is_final for job in jobs):
                return [await self._result(job.job_id) for job in jobs]
            if await given_up():
                return None
            await asyncio.sleep(POLL_SECONDS)

    async def _progress(self) -> list[JobProgress]:
        labels = {job.job_id: f"{job.env_provider}/{job.benchmark_name}" for job in self._jobs}
        rows = await self._patiently(lambda: read_progress(self._pool, list(labels)))
        return [
            JobProgress(
                job_id=row.job_id,
                label=labels[row.job_id],
                status=row.status,
                done=row.done,
                planned=row.planned or None,
                successes=row.successes,
                detail=row.detail,
            )
            for row in rows
        ]

    async def cancel(self) -> None:
        """Ask for every job to be cancelled, and wait until each has ended, whoever ends it."""
        for job in self._jobs:
            await self._patiently(partial(self._store.request_cancel, job.job_id, "interrupted"))
        async with asyncio.timeout(CANCEL_SECONDS):
            while not all(job.status.is_final for job in await self._progress()):
                for job in self._jobs:
                    await self._store.finish_unheld(
                        job.job_id, JobStatus.CANCELLED, "interrupted", self._store.failed_result
                    )
                await asyncio.sleep(POLL_SECONDS)

    async def _patiently(self, operation: Callable[[], Awaitable[T]]) -> T:
        return await retrying(operation, deadline_seconds=PATIENCE_SECONDS)

    async def outcomes(self) -> dict[int, list[EpisodeOutcome]]:
        """The outcomes of each job, in plan order."""
        return {
            job.job_id: await self._patiently(partial(self._ledger.outcomes, job.job_id))
            for job in self._jobs
        }

    async def remove_archives(self, archives: Path) -> None:
        """Delete the archives that were packed for these jobs, unless another unfinished job needs one."""
        packed = {job.artifact_url for job in self._jobs if job.artifact_url}
        needed = await self._patiently(lambda: unfinished_artifacts(self._pool))
        for url in packed - needed:
            path = Path(unquote(urlsplit(url).path))
            if path.parent == archives:
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            archives.rmdir()

    async def _result(self, job_id: int) -> EvalResultMessage:
        result = await self._patiently(partial(self._store.result, job_id))
        if result is None:
            raise InfrastructureError(f"job {job_id} is final without a result")
        return result


def exit_code(results: Sequence[EvalResultMessage]) -> int:
    """0 completed, 1 the submission failed, 2 wrong usage, 3 the infrastructure failed, 130 interrupted."""
    codes = [_exit_code(result) for result in results]
    return max(codes, default=0)


def _exit_code(result: EvalResultMessage) -> int:
    if result.status is JobStatus.COMPLETED:
        return 0
    if result.status is JobStatus.CANCELLED:
        return 130
    if result.status is JobStatus.TIMEOUT:
        return 1
    failure = (result.extra_data or {}).get("failure", "infrastructure")
    return {"submission": 1, "job": 2}.get(failure, 3)
