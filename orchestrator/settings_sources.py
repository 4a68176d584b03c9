"""Where values of settings stand (variables, a file, flags), and how each is shown without its secret."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from orchestrator import fault_plan
from orchestrator.domain.errors import UsageError
from orchestrator.logging import escape_control_characters, mask_secrets

ENV_PREFIX = "ORCHESTRATOR_"
FILE_VARIABLE = "ORCHESTRATOR_SETTINGS_FILE"
# Of the submission host and of containers, and the file's name: ours too, but no settings.
OTHER_VARIABLES = frozenset(
    {"ORCHESTRATOR_SESSION_KEY", "ORCHESTRATOR_CONTAINER", fault_plan.VARIABLE, FILE_VARIABLE}
)
MAX_SHOWN_CHARS = 80
TOML_HINTS = {
    "Invalid value": '; a text stands in quotes, like log_level = "DEBUG"',
    "Cannot overwrite a value": "; the same setting stands there twice",
}


class Source(StrEnum):
    """What a value comes from, the weakest first."""

    DEFAULT = "default"
    VARIABLE = "variable"
    FILE = "file"
    FLAG = "flag"


@dataclass(frozen=True, slots=True)
class Given:
    """A value as somebody gave it. `place` is where to look for it; an empty value stands for the default."""

    value: Any = field(repr=False)  # it may be a secret
    source: Source
    place: str

    @property
    def is_empty(self) -> bool:
        return isinstance(self.value, str) and self.value == ""

    def shown(self, *, secret: bool) -> str:
        """Place and value for a person; the place alone where the value is secret."""
        if secret:
            return self.place
        text = str(self.value).lower() if isinstance(self.value, bool) else repr(self.value)
        # Somebody may have put a URL with a password into the wrong setting.
        text = escape_control_characters(mask_secrets(text))
        if len(text) > MAX_SHOWN_CHARS:
            text = text[: MAX_SHOWN_CHARS - 3] + "..."
        return f"{self.place}{' = ' if self.source is Source.FILE else '='}{text}"


def given_by_variables(names: Collection[str]) -> dict[str, Given]:
    """The values of the `ORCHESTRATOR_` variables that are set and not empty.

    Raises:
        UsageError: there is one that is no setting: it would be silently without effect.
    """
    known = {f"{ENV_PREFIX}{name}".upper(): name for name in names}
    found = {}
    for variable in sorted(os.environ):
        upper = variable.upper()
        if upper in known:
            if value := os.environ[variable]:
                found[known[upper]] = Given(value, Source.VARIABLE, variable)
        elif upper.startswith(ENV_PREFIX) and upper not in OTHER_VARIABLES:
            raise UsageError(f"{variable} is not a setting{nearest(upper, [*known, FILE_VARIABLE])}")
    return found


def settings_file(named: Path | None) -> Path | None:
    """The file to read: the one named for this command, or else that of `ORCHESTRATOR_SETTINGS_FILE`."""
    if named is not None:
        return named
    by_variable = os.environ.get(FILE_VARIABLE)
    return Path(by_variable) if by_variable else None


def given_by_file(path: Path, names: Collection[str], paths: Collection[str]) -> dict[str, Given]:
    """The values of a TOML file; a relative path in it (a setting of `paths`) starts at the file's directory.

    Raises:
        UsageError: it cannot be read, is no TOML, or has a key that is no setting.
    """
    content = _parsed(path)
    found = {}
    for key, value in content.items():
        if key not in names:
            raise UsageError(f"{path}: {_unknown_key(key, value, names)}")
        if key in paths and isinstance(value, str) and value and not value.startswith("~"):
            value = str(path.absolute().parent / value)
        found[key] = Given(value, Source.FILE, f"{path}: {key}")
    return found


def _parsed(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise UsageError(
            f"the settings file {path} cannot be read: {error.strerror or type(error).__name__}"
        ) from None
    except UnicodeDecodeError as error:
        raise UsageError(f"the settings file {path} is not UTF-8, from byte {error.start} on") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"the settings file {path} is no TOML: {_toml_complaint(str(error))}") from None


def _toml_complaint(text: str) -> str:
    """Place first, then what is wrong and what is often the cause; `tomllib` gives both in one text."""
    found = re.fullmatch(r"(.*) \(at (line \d+, column \d+|end of document)\)", text, re.DOTALL)
    what, place = (found[1], f"{found[2]}: ") if found else (text, "")
    hint = next((hint for beginning, hint in TOML_HINTS.items() if what.startswith(beginning)), "")
    return f"{place}{what[:1].lower()}{what[1:]}{hint}"


def _unknown_key(key: str, value: object, names: Collection[str]) -> str:
    shown = _printable_name(key)
    if isinstance(value, dict):
        return f"[{shown}] is a table: settings stand at the top, without tables"
    return f"{shown} is not a setting{nearest(key, names)}"


def given_by_assignments(assignments: Sequence[str], names: Collection[str]) -> dict[str, Given]:
    """The values of `--set NAME=VALUE` flags; of two with one name, the later.

    Raises:
        UsageError: one is not NAME=VALUE, or its name is no setting.
    """
    found = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        # What is not a name is not shown: the secret itself may stand there.
        if not equals or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
            raise UsageError("--set takes NAME=VALUE, like --set lease_seconds=60")
        if name not in names:
            raise UsageError(f"--set: {_printable_name(name)} is not a setting{nearest(name, names)}")
        found[name] = Given(value, Source.FLAG, f"--set {name}")
    return found


def given_by_options(options: Mapping[str, tuple[str, Any]]) -> dict[str, Given]:
    """The values of options of their own: by option, the setting and what was given; None is nothing."""
    return {
        name: Given(value, Source.FLAG, option)
        for option, (name, value) in options.items()
        if value is not None
    }


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` with the known name that comes nearest; "" where none is near."""
    by_plain_name = {_plain_name(each): each for each in known}
    close = difflib.get_close_matches(_plain_name(name), by_plain_name, n=1)
    return f"; did you mean {by_plain_name[close[0]]}?" if close else ""


def _plain_name(name: str) -> str:
    return name.lower().replace("-", "_").removeprefix(ENV_PREFIX.lower())


def _printable_name(name: str) -> str:
    shown = escape_control_characters(mask_secrets(name))
    return shown if len(shown) <= MAX_SHOWN_CHARS else shown[: MAX_SHOWN_CHARS - 3] + "..."
