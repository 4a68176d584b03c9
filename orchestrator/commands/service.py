"""`orchestrator up`, `submit`, `consume` and `db migrate`."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from orchestrator.adapters.postgres.migrate import migrate
from orchestrator.adapters.postgres.outgoing import messages_of, take_rows
from orchestrator.client.job_messages import make_message, new_job_id
from orchestrator.commands.orphans import cancel_orphans
from orchestrator.commands.session import ReadSettings, command_client, command_pool, say
from orchestrator.domain.errors import InfrastructureError, InvalidJob, UsageError
from orchestrator.domain.messages import OUTGOING_QUEUES, QUEUE_ADD_JOB
from orchestrator.runtime import Liveness, control_plane, open_database

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
    message = make_message(_with_job_id(payload))
    async with command_client(read_settings()) as client:
        fresh = await client.enqueue(message, local=True)
    say(f"job {message.job_id} {'is queued' if fresh else 'was there already, unchanged'}")
    print(message.job_id)
    return 0


def _with_job_id(payload: bytes) -> dict[str, Any]:
    """The payload's fields, with a fresh job_id where it names none."""
    try:
        content = json.loads(payload)
    except ValueError as error:
        raise InvalidJob(None, f"the job is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidJob(None, "the job is not a JSON object")
    content.setdefault("job_id", new_job_id())
    return content


async def consume_command(read_settings: ReadSettings, queue: str, *, follow: bool, limit: int | None) -> int:
    """Print and acknowledge: a row is acknowledged once all its messages are written out."""
    if queue not in OUTGOING_QUEUES:
        names = ", ".join(OUTGOING_QUEUES)
        hint = "; add_job is consumed by the control plane" if queue == QUEUE_ADD_JOB else ""
        raise UsageError(f"no outgoing queue is named {queue!r}: there are {names}{hint}")
    printed = 0
    async with open_database(read_settings()) as database, command_pool(database) as pool:
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
            say(f"{database} is up to date")
        return 0
    done = await migrate(settings.database_url.get_secret_value())
    for line in done:
        print(line)
    say("up to date" if not done else f"{len(done)} changes applied")
    return 0
