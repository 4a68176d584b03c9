"""Whether a process grows with the jobs that it serves: pure, from samples to one line for each role."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

# A part of the run is left out at its beginning: imports, pools and caches that fill once.
WARM_UP = 1 / 4
MEBIBYTE = 2**20


@dataclass(frozen=True, slots=True)
class Sample:
    """One process at one time. `jobs` had ended by then; `memory_bytes` is what it shares with nobody."""

    role: str
    pid: int
    jobs: int
    memory_bytes: int
    descriptors: int
    threads: int


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a process may have more at the end of a run than after its warm-up, whatever the number of jobs.

    A leak grows with the jobs and passes it when the run is long enough; an allocator's wobble does not.
    """

    memory_bytes: int = 12 * MEBIBYTE
    descriptors: int = 6
    threads: int = 4


@dataclass(frozen=True, slots=True)
class Growth:
    """The process of a role that lived longest: medians of the first and the last third after the warm-up."""

    role: str
    samples: int
    jobs: int  # that ended between the two
    memory_bytes: tuple[float, float]
    descriptors: tuple[float, float]
    threads: tuple[float, float]

    def beyond(self, allowance: Allowance) -> list[str]:
        """What grew too much, in words."""
        found = []
        for name in ("memory_bytes", "descriptors", "threads"):
            first, last = getattr(self, name)
            if last - first > getattr(allowance, name):
                found.append(f"{self.role}: {name} grew from {first:.0f} to {last:.0f} over {self.jobs} jobs")
        return found


def growths(samples: Sequence[Sample], at_least: int = 9) -> list[Growth]:
    """One for each role that has a process with so many samples after the warm-up."""
    of_processes: dict[tuple[str, int], list[Sample]] = defaultdict(list)
    for sample in samples:
        of_processes[sample.role, sample.pid].append(sample)
    longest: dict[str, list[Sample]] = {}
    for (role, _), found in of_processes.items():
        if len(found) > len(longest.get(role, [])):
            longest[role] = found
    return [
        _growth(role, warm)
        for role, found in sorted(longest.items())
        if len(warm := found[int(len(found) * WARM_UP) :]) >= at_least
    ]


def _growth(role: str, samples: Sequence[Sample]) -> Growth:
    third = len(samples) // 3
    first, last = samples[:third], samples[-third:]

    def medians(name: str) -> tuple[float, float]:
        return median(getattr(each, name) for each in first), median(getattr(each, name) for each in last)

    before, after = medians("jobs")
    return Growth(
        role,
        len(samples),
        int(after - before),
        medians("memory_bytes"),
        medians("descriptors"),
        medians("threads"),
    )


def table(found: Sequence[Growth]) -> list[str]:
    """For people: memory in MiB."""
    lines = [f"{'process':<24}{'samples':>8}{'jobs':>6}{'MiB':>16}{'descriptors':>14}{'threads':>10}"]
    for each in found:
        memory = "{:.1f} to {:.1f}".format(*(value / MEBIBYTE for value in each.memory_bytes))
        descriptors = "{:.0f} to {:.0f}".format(*each.descriptors)
        threads = "{:.0f} to {:.0f}".format(*each.threads)
        lines.append(
            f"{each.role:<24}{each.samples:>8}{each.jobs:>6}{memory:>16}{descriptors:>14}{threads:>10}"
        )
    return lines
