"""`token`: who may use the HTTP API."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.ages import age
from orchestrator.cli.options import Session, with_session

commands = typer.Typer(help="Tokens of the HTTP API.", no_args_is_help=True)

MOST_NAME_CHARS = 100
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="What people call the token.")]


@commands.command()
@with_session
def create(
    name: NameArgument,
    read_only: Annotated[bool, typer.Option("--read-only", help="It cannot submit or cancel jobs.")] = False,
    valid_for: Annotated[
        float | None,
        typer.Option(parser=age, metavar="AGE", help="It ends by itself after this, like 90d."),
    ] = None,
    *,
    session: Session,
) -> None:
    """Make a token and print it, this once: only its hash is stored.

    Example: orchestrator token create ci --valid-for 90d
    """
    from orchestrator.commands.tokens import create_token_command

    if not name.strip() or len(name) > MOST_NAME_CHARS or not name.isprintable():
        raise typer.BadParameter(f"a name has 1 to {MOST_NAME_CHARS} visible characters", param_hint="'NAME'")
    session.run(create_token_command(session.settings, name, read_only=read_only, valid_seconds=valid_for))


@commands.command(name="list")
@with_session
def list_(
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
    *,
    session: Session,
) -> None:
    """List the tokens there are and were; never what proves them.

    Example: orchestrator token list
    """
    from orchestrator.commands.tokens import list_tokens_command

    session.run(list_tokens_command(session.settings, as_json=as_json))


@commands.command()
@with_session
def revoke(name: NameArgument, *, session: Session) -> None:
    """End a token from now on.

    Example: orchestrator token revoke ci
    """
    from orchestrator.commands.tokens import revoke_token_command

    session.run(revoke_token_command(session.settings, name))
