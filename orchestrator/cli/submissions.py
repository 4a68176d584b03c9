"""`submission`: what an author does before a submission is evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.options import Session, key_and_value, with_session

commands = typer.Typer(help="Write, check and pack a submission.", no_args_is_help=True)


@commands.command()
@with_session
def init(
    directory: Annotated[Path, typer.Argument(help="A new or empty directory.")],
    benchmark: Annotated[
        str, typer.Option("--benchmark", "-b", help="PROVIDER/NAME that it is to play.")
    ] = "gymnasium/CartPole-v1",
    *,
    session: Session,
) -> None:
    """Write a small submission that works, as a start.

    Example: orchestrator submission init my-policy
    """
    from orchestrator.commands.submissions import init_command

    session.run(init_command(directory, benchmark))


@commands.command()
@with_session
def check(
    submission: Annotated[Path | None, typer.Argument(help="A submission's directory, or archive.")] = None,
    address: Annotated[
        str | None, typer.Option(help="HOST:PORT of a policy server, to check in place of a submission.")
    ] = None,
    benchmark: Annotated[str | None, typer.Option("--benchmark", "-b", help="PROVIDER/NAME.")] = None,
    episodes: Annotated[int, typer.Option(min=1, help="Episodes of each task.")] = 2,
    all_tasks: Annotated[
        bool, typer.Option("--all-tasks", help="Play every task of the benchmark, not the first alone.")
    ] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="The seed, as `eval --seed` takes it.")] = None,
    config: Annotated[
        list[str] | None, typer.Option("--config", "-c", help="KEY=VALUE (JSON) for the benchmark's config.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON on stdout.")] = False,
    *,
    session: Session,
) -> None:
    """Check a submission by the code that will judge it, or a policy server against docs/protocol.md.

    Exits 0 where nothing is wrong, warnings allowed, and 1 where something is.

    Example: orchestrator submission check examples/cartpole --benchmark gymnasium/CartPole-v1
    """
    from orchestrator.commands.submissions import CheckRequest, check_command

    settings = dict(map(key_and_value, config or []))
    request = CheckRequest(submission, address, benchmark, episodes, all_tasks, seed, settings)
    session.run(check_command(session.settings, request, as_json=as_json))
