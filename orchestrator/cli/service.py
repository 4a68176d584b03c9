"""`up`, `submit`, `consume` and `db`: the control plane, and both ends of its queues."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.options import Session, with_session

commands = typer.Typer()
database_commands = typer.Typer(help="The database's schema.", no_args_is_help=True)


@commands.command()
@with_session
def up(*, session: Session) -> None:
    """Run the control plane until Ctrl-C.

    Example: orchestrator up
    """
    from orchestrator.commands.service import up_command

    session.run(up_command(session.settings))


@commands.command()
@with_session
def down(*, session: Session) -> None:
    """Stop a control plane that runs on a cluster by itself, as of `serve deploy` or of a killed `eval`.

    Its jobs are handed over: the next control plane of the database goes on with them.

    It is the cluster of the variable RAY_ADDRESS.

    Example: orchestrator down
    """
    from orchestrator.commands.service import down_command

    session.run(down_command(session.settings))


@commands.command()
@with_session
def submit(
    job: Annotated[Path, typer.Argument(help="A job message as JSON; - reads standard input.")],
    *,
    session: Session,
) -> None:
    """Enqueue `add_job`.

    Example: orchestrator submit job.json
    """
    from orchestrator.commands.service import submit_command

    session.run(submit_command(session.settings, job))


@commands.command()
@with_session
def consume(
    queue: Annotated[str, typer.Argument(help="eval_result, job_status_update, episode_data, ...")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more until Ctrl-C.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after so many messages.")] = None,
    *,
    session: Session,
) -> None:
    """Print what a validator would receive, a JSON line each, and acknowledge it.

    Example: orchestrator consume eval_result
    """
    from orchestrator.commands.service import consume_command

    session.run(consume_command(session.settings, queue, follow=follow, limit=limit))


@database_commands.command()
@with_session
def migrate(*, session: Session) -> None:
    """Bring the database to this version's schema; does nothing where it is.

    Example: orchestrator db migrate --database-url postgresql://user:password@host/name
    """
    from orchestrator.commands.service import migrate_command

    session.run(migrate_command(session.settings))
