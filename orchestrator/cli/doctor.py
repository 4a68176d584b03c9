"""`doctor`: what is wrong here, and what to do."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.options import Session, with_session

commands = typer.Typer()


@commands.command()
@with_session
def doctor(
    fix: Annotated[
        bool, typer.Option("--fix", help="Clear leftovers of earlier runs without asking.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON on stdout; asks nothing.")] = False,
    *,
    session: Session,
) -> None:
    """Look for what is wrong with this machine, Ray, the database, and what earlier runs left.

    Leftovers are cleared with --fix, or if you agree on a terminal; never what is in use. Exits with 0 if
    nothing is wrong, 3 if something needs attention.

    Example: orchestrator doctor
    """
    from orchestrator.commands.doctor import doctor_command

    session.run(doctor_command(session.settings, fix=fix, as_json=as_json))
