"""Ages and spans of time as people write them: 90s, 30m, 12h, 7d, 2w."""

from __future__ import annotations

import re

import typer

UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
LONGEST_AGE_SECONDS = 100 * 365 * 86_400.0  # dates of PostgreSQL have a beginning


def age(text: str) -> float:
    """Seconds of an age like 7d.

    Raises:
        typer.BadParameter: it is none.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)([smhdw])", text.strip())
    seconds = float(match[1]) * UNIT_SECONDS[match[2]] if match else 0.0
    if not 0 < seconds <= LONGEST_AGE_SECONDS:
        raise typer.BadParameter(
            f"{text!r} is no age: write a number and a unit, like 90s, 30m, 12h, 7d or 2w"
        )
    return seconds
