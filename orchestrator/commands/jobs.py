"""`orchestrator jobs`, `status`, `cancel` and `retry`: what jobs there are, and what becomes of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping

from rich.console import RenderableType

from orchestrator.client import AsyncClient
from orchestrator.commands.session import ReadSettings, command_client, say
from orchestrator.domain.errors import UsageError
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.reports import JobSummary
from orchestrator.job_json import held_json, job_json, summary_json
from orchestrator.job_views import held_table, job_report, jobs_table
from orchestrator.presentation import make_console

HINTED_HELD_ROWS = 100


async def jobs_command(
    read_settings: ReadSettings,
    *,
    statuses: Collection[JobStatus],
    benchmark: str | None,
    tags: Mapping[str, str],
    limit: int,
    as_json: bool,
) -> int:
    """Print the newest jobs that meet all that is given."""
    everything = not (statuses or benchmark or tags)
    async with command_client(read_settings()) as client:
        found = await client.jobs(statuses=statuses or None, benchmark=benchmark, tags=tags, limit=limit + 1)
        jobs = found[:limit]
        if as_json:
            print_json({"jobs": [summary_json(job) for job in jobs]})
            return 0
        if jobs:
            print_table(jobs_table(jobs))
        elif everything:
            say(f"no jobs on {client.database} yet: `orchestrator eval` and `submit` make some")
        else:
            say(f"no job on {client.database} is like that")
        if len(found) > limit:
            say(f"only the newest {limit} are shown: --limit shows more")
        if everything:
            await _hint_at_held_rows(client)
    return 0


async def _hint_at_held_rows(client: AsyncClient) -> None:
    held = len(await client.held_rows(HINTED_HELD_ROWS))
    if held:
        number = f"{held} or more" if held == HINTED_HELD_ROWS else str(held)
        say(f"queue rows that cannot become a job: {number}; `orchestrator jobs --held` shows them")


async def held_command(read_settings: ReadSettings, *, limit: int, as_json: bool) -> int:
    """Print the `add_job` rows that were set aside, with reasons."""
    async with command_client(read_settings()) as client:
        rows = await client.held_rows(limit)
        if as_json:
            print_json({"held": [held_json(row) for row in rows]})
        elif rows:
            print_table(held_table(rows))
            say("`orchestrator retry --held ROW` has a row taken once more")
        else:
            say(f"no queue row is held on {client.database}")
    return 0


async def status_command(read_settings: ReadSettings, job_id: int, *, as_json: bool) -> int:
    """Print all that there is to know of the job."""
    async with command_client(read_settings()) as client:
        job = await client.get(job_id)
    if as_json:
        print_json(job_json(job))
    else:
        print_table(job_report(job))
    return 0


async def cancel_command(
    read_settings: ReadSettings, job_id: int, *, reason: str, wait: bool, as_json: bool
) -> int:
    """Cancel the job, wait until it has ended, and say what came of it."""
    async with command_client(read_settings()) as client:
        before = (await client.get(job_id)).status
        job = await client.cancel(job_id, reason, wait=wait)
    if as_json:
        print_json(summary_json(job))
    else:
        print(_what_became(before, job))
    return 0


def _what_became(before: JobStatus, job: JobSummary) -> str:
    if before.is_final:
        return f"job {job.job_id} has ended already: {job.status}"
    if not job.status.is_final:
        return f"job {job.job_id} is {job.status} and will end: its supervisor is told to cancel it"
    if job.status is JobStatus.CANCELLED:
        return f"job {job.job_id} was {before} and is CANCELLED now: {job.detail}"
    return f"job {job.job_id} ended {job.status} before it could be cancelled"


async def retry_command(
    read_settings: ReadSettings, job_id: int | None, *, held_row: int | None, force: bool
) -> int:
    """Submit the job once more and print the new id, or have a held row taken once more."""
    if (job_id is None) == (held_row is None):
        raise UsageError("give the id of a job, or --held with the id of a queue row")
    async with command_client(read_settings()) as client:
        if job_id is not None:
            fresh = await client.retry(job_id, force=force)
            say(f"job {fresh} is queued: the same as job {job_id}, with the same seeds")
            print(fresh)
        elif held_row is not None:
            await client.retry_held(held_row)
            say(f"row {held_row} is in the queue again")
        if not await client.is_served():
            say("no control plane works on this database: `orchestrator up` starts one")
    return 0


def print_json(content: object) -> None:
    """One JSON document on stdout."""
    print(json.dumps(content, indent=2))


def print_table(table: RenderableType) -> None:
    """What a person reads, on stdout."""
    make_console(sys.stdout).print(table)
