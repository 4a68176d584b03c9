"""`prune`: what keeps an installation small."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from orchestrator.cli.options import Session, with_session

commands = typer.Typer()

UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
LONGEST_AGE_SECONDS = 100 * 365 * 86_400.0  # dates of PostgreSQL have a beginning


def _age(text: str) -> float:
    """Seconds of an age like 7d."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)([smhdw])", text.strip())
    seconds = float(match[1]) * UNIT_SECONDS[match[2]] if match else 0.0
    if not 0 < seconds <= LONGEST_AGE_SECONDS:
        raise typer.BadParameter(
            f"{text!r} is no age: write a number and a unit, like 90s, 30m, 12h, 7d or 2w"
        )
    return seconds


@commands.command()
@with_session
def prune(
    older_than: Annotated[
        float | None,
        typer.Option(parser=_age, metavar="AGE", help="Drop what is older, like 7d; default: as set."),
    ] = None,
    queue: Annotated[str | None, typer.Option(help="Only this queue.")] = None,
    results_older_than: Annotated[
        float | None,
        typer.Option(parser=_age, metavar="AGE", help="Also queued results; the table results keeps them."),
    ] = None,
    traces_older_than: Annotated[
        float | None,
        typer.Option(parser=_age, metavar="AGE", help="Also recorded actions of jobs that ended before."),
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
