"""What a check found: one line for each thing that was looked at, and the verdict that they add up to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any


class Mark(StrEnum):
    """How one thing stands."""

    OK = "ok"
    WARNING = "warning"
    WRONG = "wrong"
    SKIPPED = "skipped"  # not applicable, or not to be told


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    `text` is one line; `detail` are lines to be shown as they are, such as a traceback; `advice` says what to
    do about it; `see` names the place of a document where the rule stands.
    """

    mark: Mark
    name: str
    text: str
    detail: str = ""
    advice: str = ""
    see: str = ""

    def as_json(self) -> dict[str, Any]:
        """The finding as an object of plain values; what is empty is left out."""
        optional = {"detail": self.detail, "advice": self.advice, "see": self.see}
        return {
            "name": self.name,
            "outcome": self.mark.value,
            "text": self.text,
            **{key: value for key, value in optional.items() if value},
        }


def _shown_to_nobody(finding: Finding) -> None:
    """A report that is only read at its end."""


@dataclass(slots=True)
class Report:
    """The findings in order; `show` sees each as soon as it is known."""

    subject: str
    show: Callable[[Finding], None] = _shown_to_nobody
    findings: list[Finding] = field(default_factory=list)

    def add(self, *findings: Finding) -> None:
        for finding in findings:
            self.findings.append(finding)
            self.show(finding)

    def count(self, mark: Mark) -> int:
        return sum(finding.mark is mark for finding in self.findings)

    @property
    def is_right(self) -> bool:
        """Whether nothing is wrong; warnings are allowed."""
        return not self.count(Mark.WRONG)

    def as_json(self) -> dict[str, Any]:
        """The report as an object of plain values."""
        return {
            "subject": self.subject,
            "verdict": "ok" if self.is_right else "wrong",
            "findings": [finding.as_json() for finding in self.findings],
        }


def sum_up(findings_of_tasks: Sequence[Sequence[Finding]]) -> list[Finding]:
    """The findings of all tasks: one line where they all say the same, else each."""
    first = list(findings_of_tasks[0])
    tasks = len(findings_of_tasks)
    if tasks > 1 and all(list(findings) == first for findings in findings_of_tasks):
        return [replace(finding, text=f"in each of {tasks} tasks: {finding.text}") for finding in first]
    return [finding for findings in findings_of_tasks for finding in findings]


def counted(count: int, noun: str) -> str:
    """ "1 problem", "2 problems"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
