"""A leak is found, and a process that only wobbles is not taken for one."""

from __future__ import annotations

import random

import pytest

from tests.soak.growth import MEBIBYTE, Allowance, Sample, growths, table

ALLOWED = Allowance()


def samples(
    leak_bytes: float = 0.0, leak_descriptors: float = 0.0, leak_threads: float = 0.0, count: int = 120
) -> list[Sample]:
    """A process that fills its caches in its first minute, wobbles by 2 MiB, and leaks so much a job."""
    chance = random.Random(3)
    return [
        Sample(
            "sink",
            10,
            jobs := 5 * number,
            int(
                90 * MEBIBYTE
                + min(number, 20) * MEBIBYTE
                + chance.uniform(0, 2) * MEBIBYTE
                + leak_bytes * jobs
            ),
            30 + chance.randrange(3) + int(leak_descriptors * jobs),
            12 + int(leak_threads * jobs),
        )
        for number in range(count)
    ]


def test_a_process_that_wobbles_has_not_grown() -> None:
    [growth] = growths(samples())

    assert growth.beyond(ALLOWED) == []


@pytest.mark.parametrize(
    ("leak", "what"),
    [
        ({"leak_bytes": 60_000}, "memory_bytes"),
        ({"leak_descriptors": 0.05}, "descriptors"),
        ({"leak_threads": 0.05}, "threads"),
    ],
)
def test_a_leak_of_little_a_job_is_found(leak: dict[str, float], what: str) -> None:
    [growth] = growths(samples(**leak))

    [found] = growth.beyond(ALLOWED)

    assert found.startswith(f"sink: {what} grew from")


def test_the_process_that_lived_longest_stands_for_its_role() -> None:
    restarted = [Sample("sink", 11, 1, 2**40, 1, 1)] * 5

    [growth] = growths([*restarted, *samples()])

    assert growth.beyond(ALLOWED) == []


def test_a_process_that_was_hardly_seen_says_nothing() -> None:
    assert growths(samples(count=8)) == []


def test_each_role_has_its_line() -> None:
    assert [line.split()[0] for line in table(growths(samples()))] == ["process", "sink"]
