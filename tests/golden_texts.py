"""Golden texts: what a person reads, kept word for word in `tests/golden/`."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

GOLDEN = Path(__file__).resolve().parent / "golden"


def check_golden(area: str, case: str, text: str) -> None:
    """Compare `text` with `tests/golden/<area>/<case>.txt`; with UPDATE_GOLDEN=1 write it there instead.

    The caller replaces what varies from run to run (paths, ids, ports, times) before.
    """
    path = GOLDEN / area / f"{case}.txt"
    text = text.rstrip("\n") + "\n"
    if os.environ.get("UPDATE_GOLDEN") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return
    expected = path.read_text() if path.exists() else ""
    difference = difflib.unified_diff(
        expected.splitlines(), text.splitlines(), str(path.relative_to(GOLDEN.parent)), "now", lineterm=""
    )
    assert text == expected, "\n".join(difference)
