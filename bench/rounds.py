"""Rounds of a case, each paired with a reference measured right before it, and what they amount to: pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True)
class Round:
    """One measurement and its reference, in the same unit."""

    measured: float
    reference: float

    @property
    def ratio(self) -> float:
        return self.measured / self.reference


@dataclass(frozen=True, slots=True)
class Target:
    """What the median of the ratios has to be."""

    at_most: float | None = None
    at_least: float | None = None

    def is_met(self, ratio: float) -> bool:
        return (self.at_most is None or ratio <= self.at_most) and (
            self.at_least is None or ratio >= self.at_least
        )

    def __str__(self) -> str:
        return f"≤ {self.at_most:g}" if self.at_most is not None else f"≥ {self.at_least:g}"


@dataclass
class Case:
    """A line of the table: `what` in `unit`, against `reference`."""

    what: str
    unit: str
    reference: str
    target: Target
    rounds: list[Round] = field(default_factory=list)

    def add(self, measured: float, reference: float) -> None:
        self.rounds.append(Round(measured, reference))

    @property
    def ratio(self) -> float:
        """The median of the rounds' ratios: what both suffer in a round cancels out."""
        return median(each.ratio for each in self.rounds)

    @property
    def is_met(self) -> bool:
        return self.target.is_met(self.ratio)

    def line(self) -> str:
        ratios = sorted(each.ratio for each in self.rounds)
        measured = median(each.measured for each in self.rounds)
        reference = median(each.reference for each in self.rounds)
        return (
            f"{self.what:<52}{_short(measured):>10}{_short(reference):>10} {self.unit:<9}"
            f"{self.ratio:>8.2f}{f'{ratios[0]:.2f} to {ratios[-1]:.2f}':>16}{self.target!s:>9}"
            f"  {'met' if self.is_met else 'MISSED'}"
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "unit": self.unit,
            "reference": self.reference,
            "target": str(self.target),
            "ratio": self.ratio,
            "met": self.is_met,
            "rounds": [[each.measured, each.reference] for each in self.rounds],
        }


def table(cases: Sequence[Case]) -> list[str]:
    """For people: medians of both, the median of the paired ratios, their spread, and the target."""
    head = f"{'case':<52}{'measured':>10}{'reference':>10} {'unit':<9}{'ratio':>8}{'spread':>16}{'target':>9}"
    return [head, *(case.line() for case in cases)]


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
