"""Puts the settings together from where they stand, and says in words what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings

from orchestrator.domain.errors import UsageError
from orchestrator.settings_reference import SettingDescription, describe_settings
from orchestrator.settings_sources import (
    Given,
    given_by_file,
    given_by_variables,
    nearest,
    settings_file,
)

Model = TypeVar("Model", bound=BaseSettings)


@dataclass(frozen=True, slots=True)
class SettingsInEffect(Generic[Model]):
    """The settings, and where those stand that are not the defaults."""

    settings: Model
    given: Mapping[str, Given]


def in_effect(
    model: type[Model], flags: Mapping[str, Given], file: Path | None = None
) -> SettingsInEffect[Model]:
    """See `settings.settings_in_effect`."""
    described = describe_settings(model)
    given = given_by_variables(described)
    if (path := settings_file(file)) is not None:
        given |= given_by_file(path, described, {name for name in described if described[name].is_path})
    given |= flags
    _refuse_truths_for_numbers(given, described)
    try:
        settings = model(**{name: _value(model, name, one) for name, one in given.items()})
    except ValidationError as error:
        items = error.errors(include_url=False, include_input=False)
        lines = dict.fromkeys(_complaint(item, given, described) for item in items)
        # The cause would quote what was given, secrets included.
        raise UsageError("\n".join(lines)) from None
    return SettingsInEffect(settings, {name: one for name, one in given.items() if not one.is_empty})


def _value(model: type[BaseSettings], name: str, given: Given) -> Any:
    known = name in model.model_fields
    return model.model_fields[name].default if known and given.is_empty else given.value


def _refuse_truths_for_numbers(
    given: Mapping[str, Given], described: Mapping[str, SettingDescription]
) -> None:
    """pydantic takes the `true` of a file for the number 1, which nobody meant."""
    for name, one in given.items():
        if isinstance(one.value, bool) and name in described and described[name].is_number:
            raise UsageError(f"{one.shown(secret=False)}: expected {described[name].allowed}")


def _complaint(
    item: ErrorDetails, given: Mapping[str, Given], described: Mapping[str, SettingDescription]
) -> str:
    reason = item["msg"].removeprefix("Value error, ")
    if not item["loc"]:
        return f"{reason} ({_places(reason, given, described)})"
    name = str(item["loc"][0])
    if name not in described:
        return f"{name} is not a setting{nearest(name, described)}"
    if item["type"] != "value_error":
        reason = f"expected {described[name].allowed}"
    return f"{given[name].shown(secret=described[name].secret)}: {reason}"


def _places(reason: str, given: Mapping[str, Given], described: Mapping[str, SettingDescription]) -> str:
    """Where the settings stand that a reason names."""
    places = []
    for name in dict.fromkeys(re.findall(r"\w+", reason)):
        if name in given:
            places.append(given[name].shown(secret=described[name].secret))
        elif name in described:
            places.append(f"{name} is {described[name].default} by default")
    return ", ".join(places)
