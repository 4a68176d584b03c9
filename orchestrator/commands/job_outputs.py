"""`orchestrator watch`, `results` and `logs`: what comes of jobs, while they run and after."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from orchestrator.client import AsyncClient, StatusChange
from orchestrator.client.following import POLL_SECONDS, Progress
from orchestrator.commands.jobs import print_table
from orchestrator.commands.session import ReadSettings, command_client, say
from orchestrator.domain.errors import UsageError
from orchestrator.domain.messages import EvalResultMessage
from orchestrator.evaluation import exit_code
from orchestrator.job_json import change_json
from orchestrator.logging import escape_control_characters
from orchestrator.presentation import (
    check_bundle_directory,
    episode_json,
    results_json,
    results_table,
    write_bundle,
)
from orchestrator.watching import WatchView


async def watch_command(read_settings: ReadSettings, job_id: int, *, as_json: bool) -> int:
    """Show the job until it ends; the exit code is that of `eval`."""
    async with command_client(read_settings()) as client:
        try:
            if as_json:
                await _print_events(client, job_id)
            else:
                await _watch(client, job_id)
        except asyncio.CancelledError:
            say(f"stops watching; job {job_id} goes on")
            raise
        result = await client.wait(job_id)
    if not as_json:
        print_table(results_table([result]))
    return exit_code([result])


async def _watch(client: AsyncClient, job_id: int) -> None:
    job = await client.get(job_id)
    if job.waits_for:
        say(f"job {job_id} waits for {job.waits_for}")
    with WatchView() as view:
        while True:
            (summary,) = await client.summaries([job_id])
            view.show(summary, await client.tasks(job_id))
            if summary.status.is_final:
                return
            await asyncio.sleep(POLL_SECONDS)


async def _print_events(client: AsyncClient, job_id: int) -> None:
    async with aclosing(client.stream(job_id)) as events:
        async for event in events:
            print(json.dumps(_event_json(event)), flush=True)


def _event_json(event: Progress) -> dict[str, Any]:
    if isinstance(event, StatusChange):
        return {"event": "status", **change_json(event)}
    return {"event": "episode", **episode_json(event)}


async def results_command(
    read_settings: ReadSettings, job_ids: Sequence[int], *, output: Path | None, as_json: bool
) -> int:
    """Print the results, and write the bundle where one is asked for."""
    if output is not None:
        check_bundle_directory(output)
    async with command_client(read_settings()) as client:
        results = [await _result(client, job_id) for job_id in job_ids]
        outcomes = {job_id: await client.outcomes(job_id) for job_id in job_ids} if output else {}
    if as_json:
        print(results_json(results))
    else:
        print_table(results_table(results))
    if output is not None:
        write_bundle(output, results, outcomes)
        say(f"bundle in {output}")
    return 0


async def _result(client: AsyncClient, job_id: int) -> EvalResultMessage:
    result = await client.result(job_id)
    if result is None:
        job = await client.get(job_id)
        raise UsageError(
            f"job {job_id} is {job.status} and has no result yet: `orchestrator watch {job_id}` waits for it"
        )
    return result


async def logs_command(
    read_settings: ReadSettings, job_id: int, *, tail_lines: int | None, tail_bytes: int
) -> int:
    """Print the end of what the submission has printed."""
    async with command_client(read_settings()) as client:
        text = await client.log(job_id, tail_bytes=tail_bytes)
    lines = text.splitlines()
    for line in lines if tail_lines is None else lines[-tail_lines:]:
        print(escape_control_characters(line))
    if not lines:
        say(f"the submission of job {job_id} has printed nothing")
    return 0
