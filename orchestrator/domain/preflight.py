"""What a look at the cluster finds before submissions run there, and what of it forbids to start."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum


class Unsafe(StrEnum):
    """What may be found unsafe, by the names by which an operator accepts it."""

    RIGHTS = "rights"
    POD_SECURITY = "pod-security"
    ADMISSION_POLICY = "admission-policy"
    NETWORK_POLICY = "network-policy"
    NETWORK = "network"
    CANARY = "canary"  # nothing was shown
    CONTAINER = "container"


class Level(StrEnum):
    """How it stands with one thing."""

    OK = "ok"
    WARNING = "warning"  # works, and is safe as far as can be shown; a person should look at it
    UNSAFE = "unsafe"  # a submission could do what it must not; starts only where that is accepted by name
    BROKEN = "broken"  # no submission can run


@dataclass(frozen=True, slots=True)
class Finding:
    """One row: what was seen, and what a person can do about it; "" where nothing is to be done."""

    name: str
    level: Level
    what: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class PreflightReport:
    """All that was found in one namespace; `accepted` are names of what may be unsafe there."""

    place: str
    findings: tuple[Finding, ...]
    accepted: frozenset[str] = field(default_factory=frozenset)

    @property
    def refusals(self) -> tuple[Finding, ...]:
        """What forbids to start."""
        return tuple(each for each in self.findings if self._refuses(each))

    @property
    def is_fine(self) -> bool:
        """Whether submissions may run there."""
        return not self.refusals

    def _refuses(self, finding: Finding) -> bool:
        if finding.level is Level.BROKEN:
            return True
        return finding.level is Level.UNSAFE and finding.name not in self.accepted

    def mark(self, finding: Finding) -> str:
        """Its level as a word, which says where it is accepted."""
        if finding.level is Level.UNSAFE and not self._refuses(finding):
            return "accepted"
        return finding.level.value

    def lines(self) -> Iterator[str]:
        """The table: a row for each finding, and below it what to do."""
        yield f"preflight of {self.place}"
        marks = [self.mark(each) for each in self.findings]
        widths = max(map(len, marks)), max(len(each.name) for each in self.findings)
        for each, mark in zip(self.findings, marks, strict=True):
            yield f"  {mark:<{widths[0]}}  {each.name:<{widths[1]}}  {each.what}"
            if each.remedy and mark not in ("ok", "accepted"):
                yield f"  {'':<{widths[0]}}  {'':<{widths[1]}}  to do: {each.remedy}"
        yield self.verdict()

    def verdict(self) -> str:
        """Whether submissions may run there, in one line."""
        if self.is_fine:
            return "submissions can run here"
        names = ", ".join(each.name for each in self.refusals)
        acceptable = ",".join(each.name for each in self.refusals if each.level is Level.UNSAFE)
        hint = (
            f"; ORCHESTRATOR_KUBERNETES_ACCEPT_UNSAFE={acceptable} would accept what is unsafe"
            if acceptable
            else ""
        )
        return f"no submission runs here: {names}{hint}"

    def __str__(self) -> str:
        return "\n".join(self.lines())


def finding(name: str, problems: Sequence[str], level: Level, good: str, remedy: str) -> Finding:
    """What was looked at: `good` without any problem, else all of them at this level."""
    if not problems:
        return Finding(name, Level.OK, good)
    return Finding(name, level, "; ".join(problems), remedy)
