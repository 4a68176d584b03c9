"""`orchestrator token create`, `list` and `revoke`."""

from __future__ import annotations

import json
import sys

from rich import box
from rich.table import Table

from orchestrator.adapters.postgres.api_tokens import (
    ApiToken,
    Scope,
    create_token,
    list_tokens,
    revoke_token,
)
from orchestrator.commands.session import ReadSettings, command_pool, say
from orchestrator.domain.errors import UsageError
from orchestrator.logging import escape_control_characters
from orchestrator.presentation import NOTHING, make_console
from orchestrator.runtime import open_database


async def create_token_command(
    read_settings: ReadSettings, name: str, *, read_only: bool, valid_seconds: float | None
) -> int:
    """Print the new token on stdout, alone, so that a script can take it."""
    scopes = {Scope.READ} if read_only else {Scope.READ, Scope.WRITE}
    async with open_database(read_settings()) as database, command_pool(database) as pool:
        made = await create_token(pool, name, scopes, valid_seconds=valid_seconds)
    until = (
        "until it is revoked" if made.token.expires_at is None else f"until {made.token.expires_at:%F %R} UTC"
    )
    say(f"token {name!r} is valid {until}, and shown only now: keep it as you keep a password")
    print(made.secret)
    return 0


async def list_tokens_command(read_settings: ReadSettings, *, as_json: bool) -> int:
    """Print all tokens."""
    async with open_database(read_settings()) as database, command_pool(database) as pool:
        tokens = await list_tokens(pool)
    if as_json:
        print(json.dumps([_as_json(token) for token in tokens], indent=2))
        return 0
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("name", "scopes", "state", "created (UTC)", "expires (UTC)"):
        table.add_column(title)
    for token in tokens:
        expires = NOTHING if token.expires_at is None else f"{token.expires_at:%F %R}"
        name = escape_control_characters(token.name)
        table.add_row(
            name, ", ".join(sorted(token.scopes)), _state(token), f"{token.created_at:%F %R}", expires
        )
    make_console(sys.stdout).print(
        table if tokens else "no token was made yet: `orchestrator token create NAME`"
    )
    return 0


async def revoke_token_command(read_settings: ReadSettings, name: str) -> int:
    """End the token of this name.

    Raises:
        UsageError: there is none in use.
    """
    async with open_database(read_settings()) as database, command_pool(database) as pool:
        if not await revoke_token(pool, name):
            raise UsageError(f"no token in use is named {name!r}: `orchestrator token list` shows all")
    say(f"token {name!r} is revoked")
    return 0


def _state(token: ApiToken) -> str:
    if token.revoked_at is not None:
        return "revoked"
    return "valid" if token.is_valid else "expired"


def _as_json(token: ApiToken) -> dict[str, object]:
    return {
        "token_id": str(token.token_id),
        "name": token.name,
        "scopes": sorted(token.scopes),
        "state": _state(token),
        "created_at": token.created_at.isoformat(),
        "expires_at": None if token.expires_at is None else token.expires_at.isoformat(),
        "revoked_at": None if token.revoked_at is None else token.revoked_at.isoformat(),
    }
