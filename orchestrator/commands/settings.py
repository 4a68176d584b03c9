"""`orchestrator settings`: the settings in effect, or the reference page."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pydantic import SecretStr

from orchestrator.logging import MASK, escape_control_characters
from orchestrator.settings import Settings
from orchestrator.settings_loading import SettingsInEffect
from orchestrator.settings_reference import settings_by_section, settings_page, value_in_words
from orchestrator.settings_sources import Source


async def settings_command(read: Callable[[], SettingsInEffect[Settings]], *, as_json: bool) -> int:
    """Print every setting with its value and its place."""
    in_effect = read()
    print(json.dumps(_as_json(in_effect), indent=2) if as_json else _as_text(in_effect))
    return 0


async def reference_command() -> int:
    """Print the page `docs/settings.md`."""
    print(settings_page(Settings), end="")
    return 0


def _as_json(in_effect: SettingsInEffect[Settings]) -> dict[str, Any]:
    values = in_effect.settings.model_dump(mode="json")
    return {
        name: {
            "value": MASK if isinstance(getattr(in_effect.settings, name), SecretStr) else value,
            "source": _source(in_effect, name).value,
            "place": in_effect.given[name].place if name in in_effect.given else None,
        }
        for name, value in values.items()
    }


def _as_text(in_effect: SettingsInEffect[Settings]) -> str:
    sections = settings_by_section(Settings)
    rows = [
        [(one.name, _shown(in_effect, one.name), _place(in_effect, one.name)) for one in settings]
        for settings in sections.values()
    ]
    name_width = max(len(name) for section in rows for name, _, _ in section)
    value_width = min(max(len(value) for section in rows for _, value, _ in section), 40)
    lines = []
    for title, section in zip(sections, rows, strict=True):
        lines += ["", title]
        lines += [
            f"  {name:<{name_width}}  {value:<{value_width}}  {place}" for name, value, place in section
        ]
    return "\n".join(lines[1:])


def _shown(in_effect: SettingsInEffect[Settings], name: str) -> str:
    value = getattr(in_effect.settings, name)
    shown = MASK if isinstance(value, SecretStr) else value_in_words(name, value)
    return escape_control_characters(shown)


def _place(in_effect: SettingsInEffect[Settings], name: str) -> str:
    source = _source(in_effect, name)
    return source.value if source is Source.DEFAULT else f"{source.value} {in_effect.given[name].place}"


def _source(in_effect: SettingsInEffect[Settings], name: str) -> Source:
    return in_effect.given[name].source if name in in_effect.given else Source.DEFAULT
