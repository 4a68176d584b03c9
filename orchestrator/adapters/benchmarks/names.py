"""What to say when a name is not known: everything there is, and what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from orchestrator.domain.errors import UsageError


def unknown_name(kind: str, name: str, known: Iterable[str], *, note: str = "") -> UsageError:
    """The error for a `kind` ("benchmark provider") of an unknown `name`, ready to be raised."""
    names = sorted(known)
    by_folded_name = {candidate.casefold(): candidate for candidate in names}
    nearest = difflib.get_close_matches(name.casefold(), by_folded_name, n=1, cutoff=0.5)
    guess = f" Did you mean {by_folded_name[nearest[0]]!r}?" if nearest else ""
    listing = ", ".join(names) if names else "none"
    return UsageError(f"unknown {kind} {name[:200]!r}.{guess} There are: {listing}.{' ' * bool(note)}{note}")
