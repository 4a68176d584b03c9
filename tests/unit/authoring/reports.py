"""A report as a person sees it."""

from __future__ import annotations

from io import StringIO

from orchestrator.authoring.findings import Report
from orchestrator.authoring.printing import ReportPrinter
from orchestrator.presentation import make_console


def as_text(report: Report) -> str:
    text = StringIO()
    printer = ReportPrinter(make_console(text, columns=200), report.subject)
    for finding in report.findings:
        printer.finding(finding)
    printer.verdict(report)
    return text.getvalue()
