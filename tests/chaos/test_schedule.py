"""A seed gives one schedule, and a schedule does everything."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tests.chaos.schedule import Kind, schedule
from tests.golden_texts import check_golden


@given(seed=st.integers(), count=st.integers(0, 200))
def test_the_same_seed_gives_the_same_schedule(seed: int, count: int) -> None:
    assert schedule(seed, count, 2.0) == schedule(seed, count, 2.0)
    assert schedule(seed, count, 2.0) == schedule(seed, count + 1, 2.0)[:count]


def test_another_process_and_another_day_give_the_same_schedule() -> None:
    lines = [
        f"{fault.at_seconds:.3f} {fault.kind} {fault.pick:.3f} {fault.seconds}"
        for fault in schedule(7, 30, 2.0)
    ]

    check_golden("chaos", "schedule_of_seed_7", "\n".join(lines) + "\n")


@given(seed=st.integers(), rounds=st.integers(1, 5))
def test_every_kind_comes_as_often_as_any_other(seed: int, rounds: int) -> None:
    faults = schedule(seed, rounds * len(Kind), 1.0)

    assert set(Counter(fault.kind for fault in faults).values()) == {rounds}
    assert [fault.at_seconds for fault in faults] == sorted(fault.at_seconds for fault in faults)
