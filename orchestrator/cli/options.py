"""The options that every command takes, given to it as one value."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from orchestrator.cli.running import run_command

if TYPE_CHECKING:
    from orchestrator.settings import Settings
    from orchestrator.settings_loading import SettingsInEffect

SESSION_PARAMETER = "session"


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What the command line says besides a command's own arguments. Each field is an option."""

    database_url: Annotated[
        str | None,
        typer.Option("--database-url", help="PostgreSQL to use, postgresql://...; default: an embedded one."),
    ] = None
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="Where the embedded PostgreSQL keeps its data.")
    ] = None
    containers: Annotated[
        str | None,
        typer.Option("--containers", help="Where submissions run: process (on this machine) or kubernetes."),
    ] = None
    settings_file: Annotated[
        Path | None,
        typer.Option("--settings", metavar="FILE", help="TOML file of settings; wins over variables."),
    ] = None
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="A setting for this command; may be given several times."
        ),
    ] = None
    debug: Annotated[bool, typer.Option("--debug", help="Show logs, and tracebacks of errors.")] = False

    def settings(self) -> Settings:
        """The settings for this command.

        Raises:
            UsageError: a value is not allowed, there is no such setting, or the file cannot be read.
        """
        return self.settings_in_effect().settings

    def settings_in_effect(self) -> SettingsInEffect[Settings]:
        """The settings for this command, and where each one stands.

        Raises:
            UsageError: as `settings`.
        """
        from orchestrator.settings import Settings, settings_in_effect
        from orchestrator.settings_sources import given_by_assignments, given_by_options

        options = {
            "--database-url": ("database_url", self.database_url),
            "--data-dir": ("data_dir", self.data_dir),
            "--containers": ("containers", self.containers),
            "--debug": ("log_level", "DEBUG" if self.debug else None),
        }
        flags = given_by_assignments(self.assignments or [], Settings.model_fields)
        return settings_in_effect(flags | given_by_options(options), self.settings_file)

    def run(self, work: Coroutine[Any, Any, int]) -> None:
        """Run a command to its end and exit with its code."""
        run_command(work, debug=self.debug)


def with_session(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameter `session` is made from the options of `Session`, after its own."""
    signature = inspect.signature(command, eval_str=True)
    own = [
        each.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for each in signature.parameters.values()
        if each.name != SESSION_PARAMETER
    ]
    hints = get_type_hints(Session, include_extras=True)
    shared = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(Session)
    ]

    @functools.wraps(command)
    def wrapped(**options: Any) -> None:
        session = Session(**{each.name: options.pop(each.name) for each in shared})
        command(**options, **{SESSION_PARAMETER: session})

    parameters = [*own, *shared]
    wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    # typer resolves annotations by name, which would find those of `command`.
    wrapped.__annotations__ = {each.name: each.annotation for each in parameters}
    return wrapped


def key_and_value(text: str) -> tuple[str, Any]:
    """Key and value of KEY=VALUE; what is no JSON is a text.

    Raises:
        BadParameter: there is no key, or no "=".
    """
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise typer.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="'--config'")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value
