"""How a command ends, whatever ends it."""

from __future__ import annotations

import subprocess
import sys

PRINTS_MORE_THAN_A_PIPE_HOLDS = """
from orchestrator.cli.running import run_command
import typer

async def work():
    for number in range({lines}):
        print("a line", number{flush})
    return 0

app = typer.Typer()
app.command()(lambda: run_command(work(), debug=False))
app()
"""


def ended_while_reading_one_line(lines: int, flush: str) -> str:
    code = PRINTS_MORE_THAN_A_PIPE_HOLDS.format(lines=lines, flush=flush)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as command:
        assert command.stdout is not None
        assert command.stdout.readline() == "a line 0\n"
        command.stdout.close()
        assert command.stderr is not None
        said = command.stderr.read()
    assert command.returncode == 3
    return said


def test_a_reader_that_goes_away_is_told_in_one_line() -> None:
    for flush in ("", ", flush=True"):
        said = ended_while_reading_one_line(200_000, flush)

        assert said == "error: whoever read the output has gone, and did not get all of it\n"
