"""`jobs`, `status`, `cancel` and `retry`: what jobs there are, and what becomes of them."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.options import Session, with_session
from orchestrator.domain.lifecycle import JobStatus

commands = typer.Typer()

MAX_ID = 2**63 - 1
JobArgument = Annotated[int, typer.Argument(metavar="JOB", min=0, max=MAX_ID, help="The job's id.")]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON on stdout, as docs/client.md describes it.")]

FAILED = (JobStatus.FAILED, JobStatus.TIMEOUT)


@commands.command()
@with_session
def jobs(
    status: Annotated[
        list[JobStatus] | None,
        typer.Option(case_sensitive=False, help="Only jobs of this status; may be given several times."),
    ] = None,
    failed: Annotated[bool, typer.Option("--failed", help="Only jobs that ended FAILED or TIMEOUT.")] = False,
    benchmark: Annotated[
        str | None, typer.Option("--benchmark", "-b", help="PROVIDER/NAME, or either of them.")
    ] = None,
    tag: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Only jobs with this tag, or all of these."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many, of the newest.")] = 50,
    held: Annotated[
        bool, typer.Option("--held", help="Instead of jobs: queue rows that cannot become one, with reasons.")
    ] = False,
    as_json: JsonOption = False,
    *,
    session: Session,
) -> None:
    """List jobs, the newest first.

    Example: orchestrator jobs --status RUNNING --benchmark metaworld/MT10
    """
    from orchestrator.commands.jobs import held_command, jobs_command

    if held:
        if status or failed or benchmark or tag:
            raise typer.BadParameter("goes with --limit and --json only", param_hint="'--held'")
        session.run(held_command(session.settings, limit=limit, as_json=as_json))
        return
    session.run(
        jobs_command(
            session.settings,
            statuses={*(status or ()), *(FAILED if failed else ())},
            benchmark=benchmark,
            tags=dict(_pair(text) for text in tag or []),
            limit=limit,
            as_json=as_json,
        )
    )


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise typer.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="'--tag'")
    return key, value


@commands.command()
@with_session
def status(job: JobArgument, as_json: JsonOption = False, *, session: Session) -> None:
    """Show how a job stands, and all that happened to it.

    It says what the job waits for, when and why its status changed, and who has held it.

    Example: orchestrator status 1795406813014671
    """
    from orchestrator.commands.jobs import status_command

    session.run(status_command(session.settings, job, as_json=as_json))


@commands.command()
@with_session
def cancel(
    job: JobArgument,
    reason: Annotated[str, typer.Option(help="Why; stands in the job's result.")] = "cancelled on request",
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not wait until it has ended.")] = False,
    as_json: JsonOption = False,
    *,
    session: Session,
) -> None:
    """Cancel a job, and wait until it has ended.

    The outcomes so far are in its result. It works without a control plane, too.

    Example: orchestrator cancel 1795406813014671 --reason "wrong checkpoint"
    """
    from orchestrator.commands.jobs import cancel_command

    session.run(cancel_command(session.settings, job, reason=reason, wait=not no_wait, as_json=as_json))


@commands.command()
@with_session
def retry(
    job: Annotated[
        int | None, typer.Argument(metavar="[JOB]", min=0, max=MAX_ID, help="A job that has ended.")
    ] = None,
    held: Annotated[
        int | None, typer.Option(metavar="ROW", min=0, max=MAX_ID, help="Instead of a job: a held queue row.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Also a job that COMPLETED.")] = False,
    *,
    session: Session,
) -> None:
    """Submit a job once more, with the same seeds.

    It prints the id of the new job; a job never has a second result.

    Example: orchestrator retry 1795406813014671
    """
    from orchestrator.commands.jobs import retry_command

    session.run(retry_command(session.settings, job, held_row=held, force=force))
