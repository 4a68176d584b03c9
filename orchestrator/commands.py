"""What each command does, as coroutines that return its exit code."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import asyncpg

from orchestrator.adapters.postgres.migrate import migrate
from orchestrator.adapters.postgres.outgoing import messages_of, take_rows
from orchestrator.adapters.postgres.pool import Database, open_pool
from orchestrator.app import data_directory, job_store
from orchestrator.domain.errors import InvalidJob, UsageError
from orchestrator.domain.messages import OUTGOING_QUEUES, QUEUE_ADD_JOB, EvalJobMessage, EvalResultMessage
from orchestrator.evaluation import EvalRequest, JobFollower, exit_code, make_jobs
from orchestrator.presentation import (
    check_bundle_directory,
    make_console,
    results_json,
    results_table,
    write_bundle,
)
from orchestrator.progress import ProgressView
from orchestrator.runtime import control_plane, is_live, open_database
from orchestrator.settings import Settings

ReadSettings = Callable[[], Settings]
CONSUME_POLL_SECONDS = 0.5


async def evaluate_command(
    read_settings: ReadSettings, requests: Sequence[EvalRequest], *, output: Path | None, as_json: bool
) -> int:
    """Submit, follow, show; the control plane comes up for it unless one works on the database already."""
    settings = read_settings()
    if output is not None:
        check_bundle_directory(output)
    jobs = make_jobs(requests, data_directory(settings) / "artifacts")
    _say("starts the database")
    async with open_database(settings) as database, _pool(database) as pool:
        follower = JobFollower(pool, settings, jobs)
        async with AsyncExitStack() as stack:
            if await is_live(pool):
                _say("a control plane works on this database already: only submits to it")
            else:
                _say("starts Ray and the control plane")
                await stack.enter_async_context(control_plane(settings, database, cpus=_cpus(settings, jobs)))
            results = await _submit_and_follow(follower)
        outcomes = await follower.outcomes()
        _show(results, as_json=as_json)
        if output is not None:
            write_bundle(output, results, outcomes)
        _say(_where(results, database, output))
    return exit_code(results)


async def _submit_and_follow(follower: JobFollower) -> list[EvalResultMessage]:
    await follower.submit()
    try:
        with ProgressView() as view:
            return await follower.follow(view.update)
    except asyncio.CancelledError:
        _say("interrupted: cancels and cleans up")
        with contextlib.suppress(TimeoutError):
            await asyncio.shield(follower.cancel())
        raise


def _cpus(settings: Settings, jobs: Sequence[EvalJobMessage]) -> int:
    """Logical CPUs of a local Ray: enough for the workers asked for, however few cores there are."""
    wanted = sorted(
        (
            (job.resources.workers or settings.workers_per_job)
            * (job.resources.cpus_per_worker or settings.cpus_per_worker)
            for job in jobs
        ),
        reverse=True,
    )
    at_once = sum(wanted[: settings.max_concurrent_jobs])
    return max(os.cpu_count() or 1, int(-(-at_once // 1)))


def _show(results: Sequence[EvalResultMessage], *, as_json: bool) -> None:
    if as_json:
        print(results_json(results))
    else:
        make_console(sys.stdout).print(results_table(results))


def _where(results: Sequence[EvalResultMessage], database: Database, output: Path | None) -> str:
    ids = ", ".join(str(result.job_id) for result in results)
    stored = f"stored in table results of {database} as job {ids}"
    return stored if output is None else f"{stored}; bundle in {output}"


async def up_command(read_settings: ReadSettings) -> int:
    """Run until cancelled."""
    settings = read_settings()
    async with open_database(settings) as database:
        async with _pool(database) as pool:
            if await is_live(pool):
                raise UsageError(f"a control plane works on {database} already")
        _say("starts Ray and the control plane")
        async with control_plane(settings, database, cpus=os.cpu_count() or 1) as plane:
            _say(f"ready: installation {plane.installation.installation_id} on {database}; Ctrl-C ends it")
            try:
                await asyncio.Event().wait()
            finally:
                _say("stops")
    return 0


async def submit_command(read_settings: ReadSettings, path: Path) -> int:
    """Enqueue the job of a file as a validator would."""
    try:
        payload = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    message = EvalJobMessage.parse(_with_job_id(payload))
    async with open_database(settings := read_settings()) as database, _pool(database) as pool:
        fresh = await job_store(pool, settings).insert(message, enqueue=True, local=True)
    _say(f"job {message.job_id} {'is queued' if fresh else 'was there already, unchanged'}")
    print(message.job_id)
    return 0


def _with_job_id(payload: bytes) -> bytes:
    """The payload, with a fresh job_id where it names none."""
    try:
        content = json.loads(payload)
    except ValueError as error:
        raise InvalidJob(None, f"the job is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidJob(None, "the job is not a JSON object")
    content.setdefault("job_id", uuid.uuid4().int >> 65)
    return json.dumps(content).encode()


async def consume_command(read_settings: ReadSettings, queue: str, *, follow: bool, limit: int | None) -> int:
    """Print and acknowledge: a row is acknowledged once all its messages are written out."""
    if queue not in OUTGOING_QUEUES:
        names = ", ".join(OUTGOING_QUEUES)
        hint = "; add_job is consumed by the control plane" if queue == QUEUE_ADD_JOB else ""
        raise UsageError(f"no outgoing queue is named {queue!r}: there are {names}{hint}")
    printed = 0
    async with open_database(read_settings()) as database, _pool(database) as pool:
        while limit is None or printed < limit:
            async with take_rows(pool, queue, rows=1) as rows:
                for row in rows:
                    for message in messages_of(row):
                        print(json.dumps(message), flush=True)
                        printed += 1
            if not rows:
                if not follow:
                    break
                await asyncio.sleep(CONSUME_POLL_SECONDS)
    return 0


async def migrate_command(read_settings: ReadSettings) -> int:
    """Apply what is missing."""
    settings = read_settings()
    if settings.database_url is None:
        async with open_database(settings) as database:
            _say(f"{database} is up to date")
        return 0
    done = await migrate(settings.database_url.get_secret_value())
    for line in done:
        print(line)
    _say("up to date" if not done else f"{len(done)} changes applied")
    return 0


@asynccontextmanager
async def _pool(database: Database) -> AsyncIterator[asyncpg.Pool[asyncpg.Record]]:
    async with open_pool(database, application_name="orchestrator cli", max_size=2) as pool:
        yield pool


def _say(text: str) -> None:
    print(f"orchestrator: {text}", file=sys.stderr, flush=True)
