"""What each command does, as coroutines that return its exit code."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg

from orchestrator.adapters.postgres.migrate import migrate
from orchestrator.adapters.postgres.outgoing import messages_of, take_rows
from orchestrator.adapters.postgres.pool import Database, open_pool
from orchestrator.app import data_directory, job_store
from orchestrator.domain.errors import InfrastructureError, InvalidJob, OrchestratorError, UsageError
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
from orchestrator.runtime import Liveness, control_plane, is_live, open_database
from orchestrator.settings import Settings
from orchestrator.waiting import uninterrupted

ReadSettings = Callable[[], Settings]
CONSUME_POLL_SECONDS = 0.5


async def evaluate_command(
    read_settings: ReadSettings, requests: Sequence[EvalRequest], *, output: Path | None, as_json: bool
) -> int:
    """Submit, follow, show; the control plane comes up for it unless one works on the database already."""
    settings = read_settings()
    if output is not None:
        check_bundle_directory(output)
    archives = data_directory(settings) / "artifacts"
    jobs = make_jobs(requests, archives)
    _say("starts the database" if settings.database_url is None else "connects to the database")
    async with open_database(settings) as database, _pool(database) as pool:
        follower = JobFollower(pool, settings, jobs)
        try:
            await follower.submit()
            results = await _evaluated(settings, database, pool, follower, _cpus(settings, jobs))
        except BaseException:
            # What is still to be ended: of an interrupted command nothing as a rule.
            with contextlib.suppress(TimeoutError, OrchestratorError):
                await uninterrupted(follower.cancel())
            raise
        finally:
            await uninterrupted(follower.remove_archives(archives))
        outcomes = await follower.outcomes()
        _show(results, as_json=as_json)
        if output is not None:
            write_bundle(output, results, outcomes)
        _say(_where(results, database, output))
    return exit_code(results)


async def _evaluated(
    settings: Settings,
    database: Database,
    pool: asyncpg.Pool[asyncpg.Record],
    follower: JobFollower,
    cpus: int,
) -> list[EvalResultMessage]:
    """The results, by a control plane that works on the database already, or else by one of our own."""
    with ProgressView() as view:
        if await is_live(pool):
            _say("a control plane works on this database already: only submits to it")
            results = await follower.follow(view.update, Liveness(pool).is_gone)
            if results is not None:
                return results
            _say("that control plane has gone")
        _say("starts Ray and the control plane")
        async with control_plane(settings, database, cpus=cpus):
            try:
                results = await follower.follow(view.update, Liveness(pool).is_gone)
            except asyncio.CancelledError:
                # While the supervisors are there to end their jobs in good order.
                _say("interrupted: cancels the jobs and cleans up")
                with contextlib.suppress(TimeoutError, OrchestratorError):
                    await uninterrupted(follower.cancel())
                raise
        if results is None:
            raise InfrastructureError(
                "the control plane ended by itself: run again, with --debug for its logs"
            )
        return results


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
                async with _pool(database) as pool:
                    await _until_gone(pool)
            finally:
                _say("stops")
    return 0


async def _until_gone(pool: asyncpg.Pool[asyncpg.Record]) -> None:
    """Wait until cancelled.

    Raises:
        InfrastructureError: the consumer has been gone for longer than a restart takes.
    """
    liveness = Liveness(pool)
    while not await liveness.is_gone():
        await asyncio.sleep(1.0)
    raise InfrastructureError("the control plane ended by itself: start it again, with --debug for its logs")


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
