"""Runs a command as the console script does, but in this process, and shows what a person saw."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from typer.testing import CliRunner

from orchestrator.cli import app


@dataclass(frozen=True)
class CommandRun:
    """A command with its exit code and both of its streams."""

    arguments: tuple[str, ...]
    exit_code: int
    stdout: str
    stderr: str

    @property
    def transcript(self) -> str:
        """What a terminal showed, results first."""
        command = shlex.join(("orchestrator", *self.arguments))
        return f"$ {command}\n{self.stdout}{self.stderr}exit code {self.exit_code}\n"


def run_command_line(*arguments: object, stdin: bytes | str = "") -> CommandRun:
    """Run `orchestrator` with these arguments. Not for async tests: it has an event loop of its own."""
    words = tuple(map(str, arguments))
    environment = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    result = CliRunner(env=environment).invoke(app, words, input=stdin, prog_name="orchestrator")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return CommandRun(words, result.exit_code, result.stdout, result.stderr)
