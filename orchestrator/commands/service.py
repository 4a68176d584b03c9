"""`orchestrator up`, `submit`, `consume` and `db migrate`."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import asyncpg
from pgqueuer.domain.models import Job

from orchestrator.adapters.postgres.migrate import migrate
from orchestrator.adapters.postgres.outgoing import messages_of, take_rows
from orchestrator.client.job_messages import with_job_id
from orchestrator.commands.orphans import cancel_orphans
from orchestrator.commands.session import ReadSettings, command_client, command_pool, say
from orchestrator.domain.errors import InfrastructureError, InvalidJob, UsageError
from orchestrator.domain.messages import OUTGOING_QUEUES, QUEUE_ADD_JOB, EvalJobMessage
from orchestrator.runtime import Liveness, control_plane, open_database, stop_what_runs

CONSUME_POLL_SECONDS = 0.5


async def up_command(read_settings: ReadSettings) -> int:
    """Run until cancelled."""
    settings = read_settings()
    async with command_client(settings) as client:
        if await client.is_served():
            raise UsageError(f"a control plane works on {client.database} already")
        orphans = await cancel_orphans(client)
        say("starts Ray and the control plane")
        async with control_plane(settings, client.database, cpus=os.cpu_count() or 1) as plane:
            installation_id = plane.installation.installation_id
            say(f"ready: installation {installation_id} on {client.database}; Ctrl-C ends it")
            try:
                await orphans.see_off()
                await _until_gone(client.liveness())
            finally:
                say("stops")
    return 0


async def down_command(read_settings: ReadSettings) -> int:
    """Stop the control plane of the database on the cluster of `RAY_ADDRESS`; its jobs stay for the next one.

    Raises:
        UsageError: no cluster is named.
    """
    if not os.environ.get("RAY_ADDRESS"):
        raise UsageError("name the cluster that the control plane runs on: RAY_ADDRESS=HOST:6379, or auto")
    settings = read_settings()
    async with command_client(settings) as client:
        say(f"stops the control plane of {client.database}")
        if not await stop_what_runs(settings, client.database):
            say("none ran on this cluster")
    return 0


async def _until_gone(liveness: Liveness) -> None:
    """Wait until cancelled.

    Raises:
        InfrastructureError: the consumer has been gone for longer than a restart takes.
    """
    while not await liveness.is_gone():
        await asyncio.sleep(1.0)
    raise InfrastructureError("the control plane ended by itself: start it again, with --debug for its logs")


async def submit_command(read_settings: ReadSettings, path: Path) -> int:
    """Enqueue the job of a file as a validator would."""
    try:
        payload = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    try:
        message = EvalJobMessage.parse(with_job_id(payload))
    except InvalidJob as error:
        # The file is what the person knows; the job_id may be one of ours.
        place = "standard input" if str(path) == "-" else str(path)
        raise UsageError(f"{place}: {error.reason}") from error
    async with command_client(read_settings()) as client:
        fresh = await client.enqueue(message, local=True)
    say(f"job {message.job_id} {'is queued' if fresh else 'was there already, unchanged'}")
    print(message.job_id)
    return 0


async def consume_command(read_settings: ReadSettings, queue: str, *, follow: bool, limit: int | None) -> int:
    """Print and acknowledge: a row is acknowledged once all its messages are written out."""
    if queue not in OUTGOING_QUEUES:
        names = ", ".join(OUTGOING_QUEUES)
        hint = "; add_job is consumed by the control plane" if queue == QUEUE_ADD_JOB else ""
        raise UsageError(f"no outgoing queue is named {queue!r}: there are {names}{hint}")
    async with open_database(read_settings()) as database, command_pool(database) as pool:
        # Who reads may have enough, as `head` does: what was not written out is not acknowledged.
        await _consume(pool, queue, follow=follow, limit=limit)
    return 0


async def _consume(
    pool: asyncpg.Pool[asyncpg.Record], queue: str, *, follow: bool, limit: int | None
) -> None:
    printed = 0
    while limit is None or printed < limit:
        async with take_rows(pool, queue, rows=1) as rows:
            for row in rows:
                printed += _print_messages(row)
        if not rows:
            if not follow:
                break
            await asyncio.sleep(CONSUME_POLL_SECONDS)


def _print_messages(row: Job) -> int:
    """Write out the messages of a row; how many.

    Raises:
        InfrastructureError: it holds none.
    """
    try:
        messages = messages_of(row)
    except ValueError as error:
        raise InfrastructureError(
            f"row {row.id} of queue {row.entrypoint} holds no message of ours, and stays there: {error}"
        ) from error
    for message in messages:
        print(json.dumps(message), flush=True)
    return len(messages)


async def migrate_command(read_settings: ReadSettings) -> int:
    """Apply what is missing."""
    settings = read_settings()
    if settings.database_url is None:
        async with open_database(settings) as database:
            say(f"{database} is up to date")
        return 0
    done = await migrate(settings.database_url.get_secret_value())
    for line in done:
        print(line)
    say("up to date" if not done else f"{len(done)} changes applied")
    return 0
