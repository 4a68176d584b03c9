"""Ray's environment variables, set before `ray` is imported: it reads them at its import, and never again."""

from __future__ import annotations

import os
import secrets


def prepare_ray_environment() -> None:
    """State the authentication mode; left to itself, Ray writes a token under the home directory.

    A cluster that somebody named keeps its mode (`disabled` unless said otherwise). A local one gets a token
    of its own: its ports are on loopback, but other users of the machine can reach those.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    elif "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
