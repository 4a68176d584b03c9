"""Mistakes on the command line, the help of every command, and shell completion."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from typer.main import get_command

from orchestrator.cli import app
from orchestrator.cli.usage import run_app
from tests.golden_texts import check_golden

if TYPE_CHECKING:
    from tests.unit.cli.conftest import CommandLine

MISTAKES = """
evl
eval
eval x --bencmark y
eval x --benchmark a/b --episodes many
eval x --benchmark a/b --config seed
submit
consume
status
status abc
status 1 2
status 9223372036854775808
jobs --status runing
jobs --tag team
jobs --limit
jobs --limit 0
jobs --held --failed
results
logs 1 --tail 0
retry 1 --held 2
db migrat
--verison
"""


def test_a_mistake_gives_one_line_that_helps(orchestrator: CommandLine, capsys: Any) -> None:
    lines = []
    for command in MISTAKES.split("\n")[1:-1]:
        # As it stands, without the options of a test: these would be taken for a missing value.
        code = run_app(app, command.split())
        out, err = capsys.readouterr()
        assert (code, out, err.count("\n")) == (2, "", 1), command
        lines += [f"$ orchestrator {command}", err]

    check_golden("jobs", "mistakes", "\n".join(lines))


def commands(command: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every command of the app, groups left out."""
    command = command or get_command(app)
    below = getattr(command, "commands", None)
    if below is None:
        yield path
    for name, sub in (below or {}).items():
        yield from commands(sub, (*path, name))


@pytest.mark.parametrize("path", list(commands()), ids=" ".join)
def test_the_help_of_every_command_has_an_example(path: tuple[str, ...], capsys: Any) -> None:
    code = run_app(app, [*path, "--help"])

    shown = capsys.readouterr().out
    example = f"Example: orchestrator {' '.join(path)}"
    assert code == 0
    assert example in " ".join(shown.split())
    # The list of all commands shows the first line only, and cuts it where it is long.
    command = get_command(app)
    for name in path:
        command = command.commands[name]  # type: ignore[attr-defined]
    assert inspect.cleandoc(command.help or "").splitlines()[0].endswith(".")


def test_no_arguments_give_the_help_and_2(capsys: Any) -> None:
    assert run_app(app, []) == 2
    assert "Usage: orchestrator" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("shell", "words"),
    [("bash", "complete -o default -F"), ("zsh", "#compdef orchestrator"), ("fish", "complete --command")],
)
def test_shells_get_a_completion_script(
    shell: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    # By itself typer looks at the parent process for the shell.
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")

    with pytest.raises(SystemExit) as ended:
        run_app(app, ["--show-completion", shell])

    assert not ended.value.code
    script = capsys.readouterr().out
    assert words in script
    assert "_ORCHESTRATOR_COMPLETE" in script


def test_completion_completes_commands() -> None:
    asked = {"_ORCHESTRATOR_COMPLETE": "complete_bash", "COMP_WORDS": "orchestrator ca", "COMP_CWORD": "1"}
    code = "import sys; sys.argv[0] = 'orchestrator'; from orchestrator.cli import main; main()"

    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True, check=False
    )

    assert done.stdout.split() == ["cancel"]


def test_debug_shows_the_traceback_of_an_error(orchestrator: CommandLine) -> None:
    plain, debugged = orchestrator("status", 9), orchestrator("status", 9, "--debug")

    assert (plain.code, debugged.code) == (2, 2)
    assert "Traceback" not in plain.err
    assert "Traceback" in debugged.err
    assert debugged.err.splitlines()[-1] == plain.err.strip()


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_seen_enough_is_no_error(orchestrator: CommandLine, unbuffered: str) -> None:
    code = (
        "import os, sys; from orchestrator.cli import main\n"
        "read, write = os.pipe(); os.close(read); os.dup2(write, 1)\n"
        "sys.argv[0] = 'orchestrator'; main()"
    )
    arguments = ("jobs", "--json", "--database-url", orchestrator.database.dsn)

    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")
