"""Commands run in this process, as a person would call them: exit code, stdout and stderr."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from typer.testing import CliRunner

from orchestrator.cli import app


@dataclass(frozen=True)
class Ran:
    """What a command did. `printed` is all that a terminal would show."""

    code: int
    stdout: str
    stderr: str

    @property
    def printed(self) -> str:
        return f"{self.stderr}{self.stdout}"


def run_cli(*arguments: str | Path, stdin: str = "") -> Ran:
    """Not from inside an event loop: a command has one of its own."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    return Ran(result.exit_code, result.stdout, result.stderr)
