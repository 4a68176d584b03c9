"""Mistakes on the command line itself: one line that says what is wrong and what would do."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import typer
from typer.exceptions import TyperException
from typer.main import get_command

PROGRAM = "orchestrator"
# What typer takes over from pydantic, and by itself says in its own way.
PLAINER: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"input should be a valid integer, unable to parse string as an integer", "it has to be a whole number"),
    (r"input should be a valid number, unable to parse string as a number", "it has to be a number"),
    (r"input should be", "it has to be"),
    (r"value error, ", ""),
    (r"argument\(s\)", "argument"),
    (r"(?<=missing argument )\w+", lambda match: match[0].upper()),
    (r"\. did you mean (.*)\?", r"; did you mean \1?"),
    (r"no such command (\S+)", r"no such command: \1"),
)


def run_app(app: typer.Typer, arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name, and return its exit code; a mistake gives 2 and one line."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    command: Any = get_command(app)
    try:
        # Not standalone: by itself it prints a mistake as usage, hint and error, in three lines.
        code = command.main(given, prog_name=PROGRAM, standalone_mode=False)
    except TyperException as error:
        print(_mistake(error, _path(command, given)), file=sys.stderr)
        return error.exit_code
    return code if isinstance(code, int) else 0


def _mistake(error: TyperException, path: str) -> str:
    """What is wrong, the nearest that would do, and where to look; no arguments at all give the help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        return error.format_message()
    text = " ".join(_described(error).replace("'", "").split()).rstrip(".")
    text = text[0].lower() + text[1:]
    for pattern, plainer in PLAINER:
        text = re.sub(pattern, plainer, text, flags=re.IGNORECASE)
    return f"error: {_with_nearest(text)}; `{path} --help` shows how"


def _described(error: TyperException) -> str:
    if not hasattr(error, "possibilities"):
        return error.format_message()
    context: Any = getattr(error, "ctx", None)
    option = str(getattr(error, "option_name", ""))
    known = [name for parameter in context.command.params for name in parameter.opts] if context else []
    return f"no such option: {option}{_nearest(option, known)}"


def _with_nearest(text: str) -> str:
    """The text, with the nearest choice where it lists choices."""
    match = re.search(r"(\S+) is not one of (.+)$", text)
    return text if match is None else text + _nearest(match[1], match[2].split(", "))


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _path(command: Any, arguments: Sequence[str]) -> str:
    """The command that was meant, as far as the arguments name one."""
    names = [PROGRAM]
    for argument in arguments:
        command = getattr(command, "commands", {}).get(argument)
        if command is None:
            break
        names.append(argument)
    return " ".join(names)
