"""`orchestrator eval`: submit, follow, show."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from orchestrator.adapters.postgres.pool import Database
from orchestrator.client import AsyncClient
from orchestrator.commands.orphans import cancel_orphans
from orchestrator.commands.session import ReadSettings, command_client, say
from orchestrator.domain.errors import InfrastructureError, OrchestratorError
from orchestrator.domain.messages import EvalJobMessage, EvalResultMessage
from orchestrator.evaluation import EvalRequest, JobFollower, exit_code, make_jobs
from orchestrator.presentation import (
    check_bundle_directory,
    make_console,
    results_json,
    results_table,
    write_bundle,
)
from orchestrator.progress import ProgressView
from orchestrator.runtime import control_plane
from orchestrator.settings import Settings
from orchestrator.stores import data_directory
from orchestrator.waiting import uninterrupted


async def evaluate_command(
    read_settings: ReadSettings, requests: Sequence[EvalRequest], *, output: Path | None, as_json: bool
) -> int:
    """Submit, follow, show; the control plane comes up for it unless one works on the database already."""
    settings = read_settings()
    if output is not None:
        check_bundle_directory(output)
    archives = data_directory(settings) / "artifacts"
    jobs = make_jobs(requests, archives, say)
    say("opens the embedded database" if settings.database_url is None else "connects to the database")
    async with command_client(settings) as client:
        follower = JobFollower(client, jobs)
        try:
            await follower.submit()
            async with client.keeping_alive(follower.job_ids):
                results = await _evaluated(client, follower, _cpus(settings, jobs))
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
        say(_where(results, client.database, output))
    return exit_code(results)


async def _evaluated(client: AsyncClient, follower: JobFollower, cpus: int) -> list[EvalResultMessage]:
    """The results, by a control plane that works on the database already, or else by one of our own."""
    with ProgressView() as view:
        if await client.is_served():
            say("a control plane works on this database already: only submits to it")
            results = await follower.follow(view.update, client.liveness().is_gone)
            if results is not None:
                return results
            say("that control plane has gone")
        orphans = await cancel_orphans(client)
        say("starts Ray and the control plane")
        async with control_plane(client.settings, client.database, cpus=cpus):
            try:
                results = await follower.follow(view.update, client.liveness().is_gone)
            except asyncio.CancelledError:
                # While the supervisors are there to end their jobs in good order.
                say("interrupted: cancels the jobs and cleans up")
                with contextlib.suppress(TimeoutError, OrchestratorError):
                    await uninterrupted(follower.cancel())
                raise
            if results is not None:
                await orphans.see_off()
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
