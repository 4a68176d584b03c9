"""`orchestrator preflight`: whether submissions can run in the cluster of the settings."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.text import Text

from orchestrator.commands.session import ReadSettings, say
from orchestrator.domain.preflight import Level, PreflightReport
from orchestrator.logging import escape_control_characters
from orchestrator.preflight import OpenParts, preflight
from orchestrator.presentation import make_console

NOT_FIT = 3
STYLES = {Level.OK: "green", Level.WARNING: "yellow", Level.UNSAFE: "red", Level.BROKEN: "red"}
_STYLES_BY_MARK = {level.value: style for level, style in STYLES.items()} | {"accepted": "yellow"}


async def preflight_command(read_settings: ReadSettings, open_parts: OpenParts, *, as_json: bool) -> int:
    """Look, print the table, and say by the exit code whether submissions can run there."""
    settings = read_settings()
    if not as_json:
        say("looks at the cluster, and runs two canary pods there")
    report = await preflight(settings, open_parts)
    if as_json:
        print(json.dumps(as_plain_data(report), indent=2))
    else:
        print_report(report)
    return 0 if report.is_fine else NOT_FIT


def print_report(report: PreflightReport) -> None:
    """The table on stdout, its marks in colour on a terminal."""
    console = make_console(sys.stdout)
    for line in report.lines():
        text = Text(escape_control_characters(line))
        mark = line.split(maxsplit=1)[0] if line.startswith("  ") and line.strip() else ""
        if mark in _STYLES_BY_MARK:
            text.stylize(_STYLES_BY_MARK[mark], 2, 2 + len(mark))
        console.print(text, soft_wrap=True)
    sys.stdout.flush()


def as_plain_data(report: PreflightReport) -> dict[str, Any]:
    """The report for `--json`."""
    return {
        "place": report.place,
        "fit": report.is_fine,
        "verdict": report.verdict(),
        "findings": [
            {
                "name": str(each.name),
                "level": each.level.value,
                "accepted": report.mark(each) == "accepted",
                "what": each.what,
                "remedy": each.remedy or None,
            }
            for each in report.findings
        ],
    }
