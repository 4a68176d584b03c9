"""What a table of the benchmark says of its rounds."""

from __future__ import annotations

import pytest

from bench.rounds import Case, Target, table


def a_case(target: Target, *rounds: tuple[float, float]) -> Case:
    case = Case("round trip", "µs", "floor", target)
    for measured, reference in rounds:
        case.add(measured, reference)
    return case


def test_the_ratio_is_the_median_of_paired_ones() -> None:
    """The second round ran on a machine that was ten times slower: both were."""
    case = a_case(Target(at_most=5), (40, 10), (400, 100), (60, 10))

    assert case.ratio == 4
    assert case.is_met


@pytest.mark.parametrize(("target", "met"), [(Target(at_most=3.9), False), (Target(at_least=4), True)])
def test_a_target_is_a_bound_from_above_or_below(target: Target, met: bool) -> None:
    assert a_case(target, (40, 10)).is_met is met


def test_each_case_has_a_line_with_its_spread_and_verdict() -> None:
    [_, line] = table([a_case(Target(at_most=3), (40, 10), (20, 10), (60, 10))])

    assert line.split()[-6:] == ["2.00", "to", "6.00", "≤", "3", "MISSED"]
