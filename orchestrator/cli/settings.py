"""`settings`: what is set, and where."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.options import Session, with_session

commands = typer.Typer()


@commands.command(name="settings")
@with_session
def show_settings(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON on stdout.")] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="The reference page of all settings instead.")
    ] = False,
    *,
    session: Session,
) -> None:
    """Print the settings in effect, and where each one comes from. Secrets are not shown.

    Example: orchestrator settings --set lease_seconds=60
    """
    from orchestrator.commands.settings import reference_command, settings_command

    if markdown:
        session.run(reference_command())
    else:
        session.run(settings_command(session.settings_in_effect, as_json=as_json))
