"""`prune`: what keeps an installation small."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.ages import age
from orchestrator.cli.options import Session, with_session

commands = typer.Typer()


@commands.command()
@with_session
def prune(
    older_than: Annotated[
        float | None,
        typer.Option(parser=age, metavar="AGE", help="Drop what is older, like 7d; default: as set."),
    ] = None,
    queue: Annotated[str | None, typer.Option(help="Only this queue.")] = None,
    results_older_than: Annotated[
        float | None,
        typer.Option(parser=age, metavar="AGE", help="Also queued results; the table results keeps them."),
    ] = None,
    traces_older_than: Annotated[
        float | None,
        typer.Option(parser=age, metavar="AGE", help="Also recorded actions of jobs that ended before."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Counts as JSON on stdout.")] = False,
    *,
    session: Session,
) -> None:
    """Drop telemetry that nobody consumed, held queue rows, and the queues' log, above an age or a count.

    A running control plane does so by itself; jobs and their results are always kept.

    Example: orchestrator prune --older-than 7d --dry-run
    """
    from orchestrator.commands.maintenance import PruneRequest, prune_command

    request = PruneRequest(older_than, results_older_than, traces_older_than, queue, dry_run)
    session.run(prune_command(session.settings, request, as_json=as_json))
