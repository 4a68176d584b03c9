"""`orchestrator doctor`: what is wrong with this installation, and the leftovers of earlier runs cleared."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from typing import Any

from orchestrator.commands.session import ReadSettings, say
from orchestrator.diagnosis.examination import clear, examine
from orchestrator.diagnosis.findings import Diagnosis, Leftover, State, in_a_thread
from orchestrator.logging import escape_control_characters

NEEDS_ATTENTION = 3
MARKS = {State.OK: "✓", State.ATTENTION: "!", State.BROKEN: "✗"}
PLAIN_MARKS = {State.OK: "+", State.ATTENTION: "!", State.BROKEN: "x"}
SHOWN_LEFTOVERS = 10


async def doctor_command(read_settings: ReadSettings, *, fix: bool, as_json: bool) -> int:
    """Look, clear leftovers if asked to, and look again; 0 if nothing is wrong at the end."""
    settings = read_settings()
    gone: list[Leftover] = []
    asked = False
    async with AsyncExitStack() as stack:
        found = await examine(settings, stack)
        leftovers = [leftover for one in found for leftover in one.finding.leftovers]
        if leftovers and not fix and not as_json and _on_a_terminal():
            _print(found)
            asked = True
        if leftovers and (fix or (asked and await _agreed(leftovers))):
            gone, kept = await clear(leftovers)
            _say_what_became_of(gone, kept)
    if gone:
        async with AsyncExitStack() as stack:
            found = await examine(settings, stack)
    if as_json:
        print(json.dumps(_as_json(found, gone), indent=2))
    elif not asked or gone:
        _print(found, only_wrong=asked)
    return 0 if all(one.finding.state is State.OK for one in found) else NEEDS_ATTENTION


def report(found: Sequence[Diagnosis], *, only_wrong: bool = False, plain: bool = False) -> Iterator[str]:
    """The findings by area, a line each, with what to do below; `only_wrong` leaves out the good ones."""
    marks = PLAIN_MARKS if plain else MARKS
    width = max(len(one.name) for one in found)
    wrong = [one for one in found if one.finding.state is not State.OK]
    area = None
    for one in wrong if only_wrong else found:
        if one.area != area:
            yield from ([] if area is None else [""])
            area = one.area
            yield area
        yield f"  {marks[one.finding.state]} {one.name:<{width}}  {one.finding.what}"
        for leftover in one.finding.leftovers[:SHOWN_LEFTOVERS]:
            yield f"      - {leftover.what}"
        if (more := len(one.finding.leftovers) - SHOWN_LEFTOVERS) > 0:
            yield f"      - and {more} more"
        if one.finding.remedy:
            yield f"      to do: {one.finding.remedy}"
    if area is not None:
        yield ""
    verb = "needs" if len(wrong) == 1 else "need"
    yield (
        f"{len(wrong)} of {len(found)} {verb} attention"
        if wrong
        else f"nothing is wrong: {len(found)} looked at"
    )


def _print(found: Sequence[Diagnosis], *, only_wrong: bool = False) -> None:
    for line in report(found, only_wrong=only_wrong, plain=not _has_marks(sys.stdout.encoding)):
        print(escape_control_characters(line))
    sys.stdout.flush()


def _has_marks(encoding: str) -> bool:
    try:
        "".join(MARKS.values()).encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _on_a_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


async def _agreed(leftovers: Sequence[Leftover]) -> bool:
    count = "it" if len(leftovers) == 1 else f"all {len(leftovers)}"
    print(f"\nLeftovers of earlier runs: clear {count}? [y/N] ", end="", file=sys.stderr, flush=True)
    # In a thread of its own: Ctrl-C is to be heard meanwhile.
    answer = await in_a_thread(sys.stdin.readline)
    return answer.strip().lower() in ("y", "yes")


def _say_what_became_of(gone: Sequence[Leftover], kept: Sequence[Leftover]) -> None:
    for leftover in gone:
        say(f"cleared {leftover.what}")
    for leftover in kept:
        say(f"could not clear {leftover.what}: it is in use by now, or resists (--debug says why)")


def _as_json(found: Sequence[Diagnosis], gone: Sequence[Leftover]) -> dict[str, Any]:
    return {
        "checks": [
            {
                "area": one.area,
                "name": one.name,
                "state": one.finding.state.value,
                "what": one.finding.what,
                "remedy": one.finding.remedy or None,
                "leftovers": [leftover.what for leftover in one.finding.leftovers],
            }
            for one in found
        ],
        "cleared": [leftover.what for leftover in gone],
    }
