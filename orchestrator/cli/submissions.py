"""`submission`: what an author does before a submission is evaluated."""

from __future__ import annotations

import typer

commands = typer.Typer(help="Write, check and pack a submission.", no_args_is_help=True)
