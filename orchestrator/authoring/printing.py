"""How a person sees a report: a line for each finding, what belongs to it below, the verdict last."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from orchestrator.authoring.findings import Finding, Mark, Report, counted
from orchestrator.logging import escape_control_characters

_SIGNS = {
    Mark.OK: ("✓", "green"),
    Mark.WARNING: ("!", "yellow"),
    Mark.WRONG: ("✗", "red"),
    Mark.SKIPPED: ("-", "dim"),
}
_ASCII_SIGNS = {"✓": "+", "✗": "x", "→": ">"}


class ReportPrinter:
    """Prints on `console`, `subject` above the first finding; terminals that know no ✓ get a plain sign."""

    def __init__(self, console: Console, subject: str) -> None:
        self._console = console
        self._title: str | None = subject
        self._is_plain = not console.encoding.lower().startswith("utf")

    def finding(self, finding: Finding) -> None:
        sign, style = _SIGNS[finding.mark]
        line = Text(f"  {self._sign(sign)} ", style=style)
        line.append(f"{finding.name}: ", style="dim" if finding.mark is Mark.SKIPPED else "default")
        line.append(escape_control_characters(finding.text), style="default")
        if finding.see:
            line.append(f" [{finding.see}]", style="dim")
        self._print(line)
        for text in escape_control_characters(finding.detail).rstrip("\n").splitlines():
            self._print(Text(f"      {text}".rstrip()))
        if finding.advice:
            self._print(Text(f"    {self._sign('→')} {finding.advice}"))

    def verdict(self, report: Report) -> None:
        wrong, warnings = report.count(Mark.WRONG), report.count(Mark.WARNING)
        if wrong:
            self._print(Text(f"wrong: {counted(wrong, 'problem')}", style="bold red"))
        elif warnings:
            self._print(Text(f"ok, with {counted(warnings, 'warning')}", style="bold yellow"))
        else:
            self._print(Text("ok", style="bold green"))

    def _sign(self, sign: str) -> str:
        return _ASCII_SIGNS.get(sign, sign) if self._is_plain else sign

    def _print(self, line: Text) -> None:
        title, self._title = self._title, None
        if title is not None:
            self._print(Text(escape_control_characters(title), style="bold"))
        # Lines are for the terminal to wrap: who copies a path or a traceback gets it whole.
        self._console.print(line, soft_wrap=True)
