"""`replay`: check that recorded episodes can be repeated."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.options import Session, with_session

commands = typer.Typer()


@commands.command()
@with_session
def replay(
    job: Annotated[int, typer.Argument(min=0, help="The job's id.")],
    episode: Annotated[
        str | None, typer.Argument(help="The episode's number in its task; TASK:EPISODE names both.")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", "-t", help="The task, where the job has several.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every episode of the job, or of --task.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON on stdout.")] = False,
    *,
    session: Session,
) -> None:
    """Run the recorded actions of an episode again and compare what comes of it, bit for bit.

    Exits with 0 if all is equal, 1 if something differs, 3 if an episode cannot be replayed.

    Example: orchestrator replay 1795406813014671 3 --task reach-v3
    """
    from orchestrator.commands.replay import replay_command

    session.run(replay_command(session.settings, job, episode, task, every=every, as_json=as_json))
