"""A leak is found, and a process that only wobbles is not taken for one."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tests.soak.growth import BOUNDS, MEBIBYTE, Growth, Sample, growths, slope, table


def samples(
    leak_bytes: float = 0.0, leak_descriptors: float = 0.0, leak_threads: float = 0.0, count: int = 120
) -> list[Sample]:
    """A process that fills its caches in its first minute, wobbles by 2 MiB, and leaks so much a job."""
    chance = random.Random(3)
    found = []
    for number in range(count):
        jobs = 5 * number
        held = (90 + min(number, 20)) * MEBIBYTE + int(leak_bytes * jobs + chance.uniform(0, 2) * MEBIBYTE)
        descriptors = 30 + chance.randrange(3) + int(leak_descriptors * jobs)
        threads = 12 + int(leak_threads * jobs)
        found.append(Sample("sink", 10, jobs, held + 40 * MEBIBYTE, held, descriptors, threads))
    return found


def one_for_each_job(leak_bytes: float = 0.0, left: float = 0.0, jobs: int = 100) -> list[Sample]:
    """A process for each job, seen three times; each begins with so much more than the one before, and of so
    many of them the process stays for ever."""
    chance = random.Random(5)
    found = []
    for job in range(jobs):
        size = int((60 + chance.uniform(0, 2)) * MEBIBYTE + leak_bytes * job)
        born = Sample("supervisors", 100 + job, job, size, size, 20, 8)
        found += [replace(born, uss_bytes=size // (3 - age)) for age in range(3)]
        staying = range(job + 1, jobs) if int(left * (job + 1)) > int(left * job) else ()
        found += [replace(born, jobs=later) for later in staying]
    return found


def growing(found: list[Growth]) -> set[str]:
    return {growth.quantity for growth in found if not growth.is_flat}


def test_a_process_that_wobbles_has_not_grown() -> None:
    found = growths(samples())

    assert {growth.quantity for growth in found} == set(BOUNDS)
    assert growing(found) == set()


@pytest.mark.parametrize(
    ("leak", "what"),
    [
        ({"leak_bytes": 25_000}, {"rss", "uss"}),
        ({"leak_descriptors": 0.02}, {"descriptors"}),
        ({"leak_threads": 0.02}, {"threads"}),
    ],
)
def test_a_leak_of_little_a_job_is_found(leak: dict[str, float], what: set[str]) -> None:
    found = growths(samples(**leak))

    assert growing(found) == what


def test_a_longer_run_finds_a_smaller_leak() -> None:
    leak_bytes = 6_000

    assert growing(growths(samples(leak_bytes=leak_bytes))) == set()
    assert growing(growths(samples(leak_bytes=leak_bytes, count=1200))) == {"uss"}


def test_a_peak_now_and_then_is_no_growth() -> None:
    peaks = [
        replace(sample, uss_bytes=sample.uss_bytes * 2) if number % 7 == 6 else sample
        for number, sample in enumerate(samples())
    ]

    assert growing(growths(peaks)) == set()


def test_processes_of_one_job_each_are_flat_where_each_is_like_the_one_before() -> None:
    found = growths(one_for_each_job())

    assert growing(found) == set()
    assert {growth.processes for growth in found} == {100}


def test_a_process_that_begins_larger_with_every_job_is_found() -> None:
    found = growths(one_for_each_job(leak_bytes=150_000))

    assert growing(found) == {"rss", "uss"}


def test_processes_that_stay_are_found() -> None:
    found = growths(one_for_each_job(left=0.05))

    assert growing(found) == {"processes"}


def test_the_process_that_lived_longest_stands_for_its_role() -> None:
    restarted = [Sample("sink", 11, 1, 2**40, 2**40, 1, 1)] * 5

    found = growths([*restarted, *samples()])

    assert growing(found) == set()
    assert {growth.processes for growth in found} == {2}


def test_a_process_that_was_hardly_seen_says_nothing() -> None:
    assert growths(samples(count=8)) == []


def test_the_slope_of_a_line_is_its_own_whatever_lies_far_off() -> None:
    points = [(x, 3.0 * x) for x in range(50)]
    points[7] = (7, 1e9)

    assert slope(points) == pytest.approx(3.0)


def test_the_table_has_a_line_for_each_quantity_and_says_what_grows() -> None:
    lines = table(growths(samples(leak_descriptors=0.1)), judged=lambda role: role == "sink")

    assert lines[0].split()[:2] == ["process", "count"]
    assert [line.split()[-1] for line in lines[1:]] == ["flat", "flat", "GROWS", "flat", "flat"]


def test_what_is_not_ours_has_no_verdict() -> None:
    lines = table(growths(samples(leak_descriptors=0.1)), judged=lambda role: False)

    assert all(line.endswith("not ours") for line in lines[1:])
