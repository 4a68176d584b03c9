"""`watch`, `results` and `logs`: what comes of jobs, while they run and after."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.jobs import MAX_ID, JobArgument, JsonOption
from orchestrator.cli.options import Session, with_session

commands = typer.Typer()


@commands.command()
@with_session
def watch(
    job: JobArgument,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON line for each event instead.")] = False,
    *,
    session: Session,
) -> None:
    """Follow a job until it ends.

    Ctrl-C stops watching, not the job. The exit codes are those of eval.

    Example: orchestrator watch 1795406813014671
    """
    from orchestrator.commands.job_outputs import watch_command

    session.run(watch_command(session.settings, job, as_json=as_json))


@commands.command()
@with_session
def results(
    job: Annotated[list[int], typer.Argument(metavar="JOB...", min=0, max=MAX_ID, help="Ids of ended jobs.")],
    output: Annotated[Path | None, typer.Option(help="Directory for a bundle of the results.")] = None,
    as_json: JsonOption = False,
    *,
    session: Session,
) -> None:
    """Show the results of jobs, as eval does.

    Example: orchestrator results 1795406813014671 --output results/today
    """
    from orchestrator.commands.job_outputs import results_command

    session.run(results_command(session.settings, job, output=output, as_json=as_json))


@commands.command()
@with_session
def logs(
    job: JobArgument,
    tail: Annotated[int | None, typer.Option(min=1, help="Only so many lines, the last ones.")] = None,
    tail_bytes: Annotated[int, typer.Option(min=1, max=2**30, help="Only so many bytes.")] = 64 * 1024,
    *,
    session: Session,
) -> None:
    """Print what a job's submission has printed.

    While the job runs, this works where its container can be reached from; the log comes with the result.

    Example: orchestrator logs 1795406813014671 --tail 50
    """
    from orchestrator.commands.job_outputs import logs_command

    session.run(logs_command(session.settings, job, tail_lines=tail, tail_bytes=tail_bytes))
