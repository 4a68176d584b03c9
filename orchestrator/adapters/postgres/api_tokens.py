"""Bearer tokens of the HTTP API: made once, shown once, kept as hashes."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, TypeAlias
from uuid import UUID

import asyncpg

from orchestrator.adapters.postgres.fence import only_row
from orchestrator.domain.errors import UsageError

if TYPE_CHECKING:
    Pool: TypeAlias = asyncpg.Pool[asyncpg.Record]

TOKEN_PREFIX = "orc_"  # noqa: S105 - lets scanners of leaked secrets know one
RANDOM_BYTES = 32
_COLUMNS = """token_id, name, scopes, created_at, expires_at, revoked_at,
    revoked_at IS NULL AND coalesce(expires_at, 'infinity') > clock_timestamp() AS is_valid"""


class Scope(StrEnum):
    """What a token allows."""

    READ = "read"
    WRITE = "write"


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiToken:
    """A token as it is listed: never what proves it. Times are the database's."""

    token_id: UUID
    name: str
    scopes: frozenset[Scope]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    is_valid: bool


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token that was just made: the only time that its secret is known."""

    token: ApiToken
    secret: str = field(repr=False)


async def create_token(
    pool: Pool, name: str, scopes: Collection[Scope], *, valid_seconds: float | None = None
) -> NewToken:
    """A new token for `valid_seconds`, or until it is revoked.

    Raises:
        UsageError: a token of this name is there, and not revoked.
    """
    secret = TOKEN_PREFIX + secrets.token_urlsafe(RANDOM_BYTES)
    try:
        row = await pool.fetchrow(
            f"""INSERT INTO api_tokens (name, sha256, scopes, expires_at)
                VALUES ($1, $2, $3, clock_timestamp() + $4::interval) RETURNING {_COLUMNS}""",  # noqa: S608
            name,
            _hash(secret),
            sorted(scope.value for scope in scopes),
            None if valid_seconds is None else timedelta(seconds=valid_seconds),
        )
    except asyncpg.UniqueViolationError:
        raise UsageError(
            f"a token named {name!r} is there already: revoke it, or choose another name"
        ) from None
    return NewToken(_token(only_row(row)), secret)


async def list_tokens(pool: Pool) -> list[ApiToken]:
    """All tokens that were ever made, the newest first."""
    rows = await pool.fetch(f"SELECT {_COLUMNS} FROM api_tokens ORDER BY created_at DESC, name")  # noqa: S608
    return [_token(row) for row in rows]


async def revoke_token(pool: Pool, name: str) -> bool:
    """End a token from now on; False where none of this name is in use."""
    row = await pool.fetchval(
        """UPDATE api_tokens SET revoked_at = clock_timestamp()
           WHERE name = $1 AND revoked_at IS NULL RETURNING token_id""",
        name,
    )
    return row is not None


async def find_token(pool: Pool, secret: str) -> ApiToken | None:
    """The valid token that the secret proves, or None.

    The look-up is by the hash of 256 random bits: its time tells nothing that helps to guess one.
    """
    row = await pool.fetchrow(f"SELECT {_COLUMNS} FROM api_tokens WHERE sha256 = $1", _hash(secret))  # noqa: S608
    if row is None or not row["is_valid"]:
        return None
    return _token(row)


def _hash(secret: str) -> bytes:
    # Not a password: nobody can try 2^256 of them, so no slow hash is needed.
    return hashlib.sha256(secret.encode()).digest()


def _token(row: asyncpg.Record) -> ApiToken:
    fields = {**row, "scopes": frozenset(Scope(scope) for scope in row["scopes"])}
    return ApiToken(**fields)
