"""The command line: what each command takes, says and exits with. One module for each group of commands."""

from __future__ import annotations

import sys

import typer

from orchestrator.cli import (
    doctor,
    evaluation,
    job_outputs,
    jobs,
    maintenance,
    packing,
    preflight,
    replay,
    service,
    settings,
    submissions,
    tokens,
)
from orchestrator.cli.usage import run_app
from orchestrator.ray_environment import prepare_ray_environment

app = typer.Typer(
    name="orchestrator",
    help="Evaluates policies that nobody has to trust: queue in, isolated rollouts, one result out.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(evaluation.commands)
app.add_typer(service.commands)
app.add_typer(jobs.commands)
app.add_typer(job_outputs.commands)
app.add_typer(settings.commands)
app.add_typer(replay.commands)
app.add_typer(maintenance.commands)
app.add_typer(doctor.commands)
app.add_typer(preflight.commands)
app.add_typer(service.database_commands, name="db")
app.add_typer(tokens.commands, name="token")
submissions.commands.add_typer(packing.commands)
app.add_typer(submissions.commands, name="submission")


def main() -> None:
    """The console script."""
    prepare_ray_environment()
    sys.exit(run_app(app))
