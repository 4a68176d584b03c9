"""What `eval` does with jobs beyond the client: makes them of submissions, follows them, cleans up after."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from orchestrator.adapters.artifacts.contents import survey
from orchestrator.adapters.artifacts.pack import PackedArchive, existing_archive, pack_directory
from orchestrator.adapters.benchmarks.registry import load_benchmark
from orchestrator.adapters.postgres.server_files import make_data_dir
from orchestrator.client import AsyncClient
from orchestrator.client.archives import remove_archives
from orchestrator.client.job_messages import new_job_id
from orchestrator.domain.episodes import EpisodeOutcome
from orchestrator.domain.errors import UsageError
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.messages import EvalJobMessage, EvalResultMessage
from orchestrator.progress import JobProgress, progress_of
from orchestrator.stores import EXTERNAL_SCHEME

POLL_SECONDS = 0.25
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


def make_jobs(
    requests: Sequence[EvalRequest], archives: Path, tell: Callable[[str], None] = lambda text: None
) -> list[EvalJobMessage]:
    """A job for each request, its benchmark known and its archive packed.

    `tell` hears what an archive leaves out that its author may miss.

    Raises:
        UsageError: no such submission or benchmark, or a config that the benchmark cannot use.
    """
    first_id = new_job_id()
    # Nothing is packed before all are known to be good: nobody would remove it.
    jobs = [_make_job(request, first_id + index) for index, request in enumerate(requests)]
    submissions = sorted({request.submission for request in requests})
    artifacts = {submission: _artifact(submission, archives, tell) for submission in submissions}
    return [
        job.model_copy(update=artifacts[request.submission])
        for job, request in zip(jobs, requests, strict=True)
    ]


def _make_job(request: EvalRequest, job_id: int) -> EvalJobMessage:
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
    }
    if request.workers is not None:
        job["resources"] = {"workers": request.workers}
    message = EvalJobMessage.parse(json.dumps(job))
    load_benchmark(provider, name, message.config, message.benchmark_spec)
    return message


def _artifact(submission: str, archives: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    path = Path(submission)
    if path.is_dir():
        contents = survey(path)  # what is no submission makes nothing
        for each in contents.left_out:
            if each.surprising:
                tell(f"left out of the archive: {path / each.path}, {each.reason}")
        # Before the archives' own directory makes it, with a mode that may shut the embedded server out.
        with contextlib.suppress(OSError):  # which whoever writes there tells
            make_data_dir(archives.parent)
        packed = pack_directory(path, archives, contents)
    elif path.is_file() and path.name.endswith(ARCHIVE_SUFFIXES):
        packed = existing_archive(path)
    elif re.fullmatch(r"[A-Za-z0-9_.\-]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}", submission):
        if not 0 < int(submission.rpartition(":")[2]) < 2**16:
            raise UsageError(f"{submission!r} is no address: ports go from 1 to 65535")
        return {"artifact_url": f"{EXTERNAL_SCHEME}://{submission}"}
    else:
        missing = "" if path.exists() else "does not exist, and so "
        raise UsageError(
            f"{submission!r} {missing}is no submission: "
            "give a directory with agent.py or main.py, a .tar.gz, or HOST:PORT"
        )
    return _file_artifact(packed)


def _file_artifact(packed: PackedArchive) -> dict[str, Any]:
    return {
        "artifact_url": f"file://{quote(str(packed.path))}",
        "artifact_sha256": packed.sha256,
        "artifact_size_bytes": packed.size_bytes,
    }


class JobFollower:
    """Submits jobs as those of the local command line, and follows them until each has its result."""

    def __init__(self, client: AsyncClient, jobs: Sequence[EvalJobMessage]) -> None:
        self._client = client
        self._jobs = jobs

    @property
    def job_ids(self) -> list[int]:
        return [job.job_id for job in self._jobs]

    async def submit(self) -> None:
        """Enqueue all jobs; they end with this process, unless it keeps them alive."""
        for job in self._jobs:
            await self._client.enqueue(job, local=True, followed=True)

    async def follow(
        self, show: Callable[[Sequence[JobProgress]], None], given_up: Callable[[], Awaitable[bool]]
    ) -> list[EvalResultMessage] | None:
        """The results once every job has one, or None when `given_up` says so; `show` sees each change."""
        while True:
            jobs = [progress_of(summary) for summary in await self._client.summaries(self.job_ids)]
            show(jobs)
            if all(job.status.is_final for job in jobs):
                return await self._client.results(self.job_ids)
            if await given_up():
                return None
            await asyncio.sleep(POLL_SECONDS)

    async def cancel(self) -> None:
        """Cancel every job, and wait until each has ended, whoever ends it."""
        cancelling = [
            self._client.cancel(job_id, "interrupted", timeout_seconds=CANCEL_SECONDS)
            for job_id in self.job_ids
        ]
        for ended in await asyncio.gather(*cancelling, return_exceptions=True):
            if isinstance(ended, BaseException):
                raise ended

    async def outcomes(self) -> dict[int, list[EpisodeOutcome]]:
        """The outcomes of each job, in plan order."""
        return {job_id: await self._client.outcomes(job_id) for job_id in self.job_ids}

    async def remove_archives(self, archives: Path) -> None:
        """Delete the archives that were packed for these jobs, unless another unfinished job needs one."""
        await remove_archives(self._client, self._jobs, archives)


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
