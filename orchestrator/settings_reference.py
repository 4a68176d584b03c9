"""What each setting is, in words: for the reference page, for errors, and for `orchestrator settings`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic_settings import BaseSettings

from orchestrator.settings_sources import ENV_PREFIX, FILE_VARIABLE

REGENERATE = "make docs"

_INTRODUCTION = f"""# Settings

All that an operator may set. This page is made from [settings.py](../orchestrator/settings.py) by
`{REGENERATE}`.

A setting can stand in three places. The one named last here wins:

1. A variable: `{ENV_PREFIX}` and the setting's name in capitals.
2. A TOML file, named by `--settings FILE` or by `{FILE_VARIABLE}`, with lines like
   `lease_seconds = 60`. A relative path in it starts at the file's directory.
3. A flag of the command: `--set lease_seconds=60`, which may be given several times, or an option of its own
   (`--database-url`, `--data-dir`).

An empty value stands for the default. A list is given with commas (`"a,b"`), in a file also as one
(`["a", "b"]`). A name that is no setting and a value that is not allowed are refused; the message names the
place and what is allowed. `orchestrator settings` prints the settings in effect, and where each comes from.
Secrets are never printed.
"""

MIN_GROUPED = 10_000
_BINARY_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB")
_TIME_UNITS = ((86_400, "d"), (3600, "h"), (60, "min"))


@dataclass(frozen=True, slots=True)
class SettingDescription:
    """One setting in words. `allowed` is what its value may be, `text` its docstring."""

    name: str
    allowed: str
    default: str
    text: str
    secret: bool
    is_path: bool
    is_number: bool

    @property
    def variable(self) -> str:
        return f"{ENV_PREFIX}{self.name.upper()}"


@cache
def describe_settings(model: type[BaseSettings]) -> Mapping[str, SettingDescription]:
    """Every setting of the class by name, in its order."""
    properties: dict[str, dict[str, Any]] = model.model_json_schema()["properties"]
    described = {}
    for name, field in model.model_fields.items():
        kinds = _kinds(properties[name])
        described[name] = SettingDescription(
            name=name,
            allowed=" or ".join(_allowed(kind, name) for kind in kinds),
            default=value_in_words(name, field.default),
            text=" ".join((field.description or "").split()),
            secret=any(kind.get("writeOnly") for kind in kinds),
            is_path=any(kind.get("format") == "path" for kind in kinds),
            is_number=any(kind.get("type") in ("integer", "number") for kind in kinds),
        )
    return described


def settings_by_section(model: type[BaseSettings]) -> dict[str, list[SettingDescription]]:
    """The settings under the titles that stand above them in the source: comment lines of dashes."""
    described = describe_settings(model)
    sections: dict[str, list[SettingDescription]] = {}
    title = ""
    for line in inspect.getsource(model).splitlines():
        if heading := re.fullmatch(r"    # -{3,} (.+)", line):
            title = heading[1]
        elif (name := re.match(r"    ([a-z]\w*): ", line)) and name[1] in described:
            sections.setdefault(title, []).append(described[name[1]])
    return sections


def _kinds(schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The alternatives of a JSON schema, but for null: nothing is given by giving nothing."""
    return [kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null"]


def _allowed(kind: Mapping[str, Any], name: str) -> str:
    if "const" in kind:
        return str(kind["const"])
    if "enum" in kind:
        return f"one of {', '.join(map(str, kind['enum']))}"
    match kind.get("type"):
        case "boolean":
            return "true or false"
        case "integer" | "number":
            return _allowed_number(kind, name)
        case "array":
            return "a list of texts"
        case "string" if kind.get("format") == "path":
            return "a path"
        case "string":
            return _allowed_text(kind)
        case other:
            return f"JSON of type {other}"


def _allowed_number(kind: Mapping[str, Any], name: str) -> str:
    number = "a whole number" if kind["type"] == "integer" else "a number"
    unit = next((f" of {unit}" for unit in ("seconds", "bytes") if name.endswith(f"_{unit}")), "")
    above, least, most = (kind.get(bound) for bound in ("exclusiveMinimum", "minimum", "maximum"))
    limits = ""
    if above is not None:
        limits = f" above {_number(name, above)}"
    elif least is not None:
        limits = f" from {_number(name, least)}"
    if most is not None:
        up_to = " to " if least is not None else ", at most " if limits else " of at most "
        limits += f"{up_to}{_number(name, most)}"
    return f"{number}{unit}{limits}"


def _allowed_text(kind: Mapping[str, Any]) -> str:
    text = "a text"
    least, most = kind.get("minLength"), kind.get("maxLength")
    if most is not None:
        text += f" of {least or 0} to {most} characters"
    elif least is not None:
        text += f" of at least {least} characters"
    return text


def value_in_words(name: str, value: object) -> str:
    """A setting's value for a person; bytes and seconds with a larger unit besides."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return _number(name, value)
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _number(name: str, value: float) -> str:
    plain = f"{value:_f}".rstrip("0").rstrip(".") if value >= MIN_GROUPED else f"{value:g}"
    larger = _larger_bytes(value) if name.endswith("_bytes") else None
    if name.endswith("_seconds"):
        larger = _larger_seconds(value)
    return plain if larger is None else f"{plain} ({larger})"


def _larger_bytes(value: float) -> str | None:
    for power, unit in reversed(list(enumerate(_BINARY_UNITS, start=1))):
        if value >= 1024**power:
            return f"{value / 1024**power:.4g} {unit}"
    return None


def _larger_seconds(value: float) -> str | None:
    for seconds, unit in _TIME_UNITS:
        if value >= max(seconds, 120):
            return f"{value / seconds:.4g} {unit}"
    return None


def settings_page(model: type[BaseSettings]) -> str:
    """The page `docs/settings.md`."""
    sections = settings_by_section(model).items()
    return "\n".join([_INTRODUCTION, *(_section(title, settings) for title, settings in sections)])


def _section(name: str, settings: Sequence[SettingDescription]) -> str:
    lines = [f"## {name[:1].upper()}{name[1:]}", "", "| setting | value | default | |", "|---|---|---|---|"]
    for setting in settings:
        cells = (
            f"`{setting.name}`<br>`{setting.variable}`",
            f"{setting.allowed} (secret)" if setting.secret else setting.allowed,
            setting.default,
            setting.text,
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])
