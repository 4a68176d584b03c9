"""Whether a process grows with the jobs that it serves: pure, from samples to one line for each quantity."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

# A part of the run is left out at its beginning: imports, pools and caches that fill once.
WARM_UP = 1 / 4
LEAST_POINTS = 9
# A slope is a median over pairs of points; of more points than this, only every second one is paired.
MOST_PAIRED = 400
MEBIBYTE = 2**20


@dataclass(frozen=True, slots=True)
class Sample:
    """One process at one time. `jobs` had ended by then; `uss_bytes` is what it shares with nobody."""

    role: str
    pid: int
    jobs: int
    rss_bytes: int
    uss_bytes: int
    descriptors: int
    threads: int


@dataclass(frozen=True, slots=True)
class Bound:
    """How much something may grow: so much in 1,000 jobs, and in a short run so much in all.

    The second is an allocator's wobble, which is no leak however short the run was.
    """

    per_1000_jobs: float
    in_a_run: float

    def allows(self, slope: float, jobs: int) -> bool:
        """Whether growth by `slope` in 1,000 jobs, seen over so many jobs, is none."""
        return slope * jobs / 1000 <= max(self.in_a_run, self.per_1000_jobs * jobs / 1000)


BOUNDS: Mapping[str, Bound] = {
    "rss": Bound(8 * MEBIBYTE, 8 * MEBIBYTE),
    "uss": Bound(4 * MEBIBYTE, 4 * MEBIBYTE),
    "descriptors": Bound(2, 2),
    "threads": Bound(2, 2),
    "processes": Bound(2, 2),
}
QUANTITIES: Mapping[str, Callable[[Sample], float]] = {
    "rss": lambda sample: sample.rss_bytes,
    "uss": lambda sample: sample.uss_bytes,
    "descriptors": lambda sample: sample.descriptors,
    "threads": lambda sample: sample.threads,
}


@dataclass(frozen=True, slots=True)
class Growth:
    """One quantity of a role after the warm-up: medians of the first and the last third, and the slope."""

    role: str
    quantity: str
    processes: int  # that had the role during the run
    jobs: int  # that ended meanwhile
    first: float
    last: float
    slope: float  # in 1,000 jobs

    @property
    def is_flat(self) -> bool:
        return BOUNDS[self.quantity].allows(self.slope, self.jobs)

    def __str__(self) -> str:
        first, last, slope = (_shown(self.quantity, each) for each in (self.first, self.last, self.slope))
        return (
            f"{self.role}: {self.quantity} grew from {first} to {last} over {self.jobs} jobs, "
            f"by {slope} in 1,000 jobs"
        )


Point = tuple[int, float]
"""How many jobs had ended, and a quantity."""


def growths(samples: Sequence[Sample]) -> list[Growth]:
    """What can be said of each role: nothing of one that was hardly seen.

    Of a role whose process lives on, that process is looked at, the longest-lived one where it was restarted.
    Of one that has a new process for each job, each process counts once, with the most that it had: what
    every next one begins with must not grow either. `processes` is how many there are at once.
    """
    of_roles: dict[str, dict[int, list[Sample]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        of_roles[sample.role][sample.pid].append(sample)
    moments = sorted({sample.jobs for sample in samples})
    found = []
    for role, processes in sorted(of_roles.items()):
        longest = max(processes.values(), key=len)
        lives_on = len(longest) > sum(map(len, processes.values())) / 2
        for quantity, value in QUANTITIES.items():
            points = (
                [(sample.jobs, value(sample)) for sample in longest]
                if lives_on
                else [(each[0].jobs, max(map(value, each))) for each in processes.values()]
            )
            found += _growth(role, quantity, len(processes), points)
        found += _growth(role, "processes", len(processes), _at_once(processes, moments))
    return found


def _at_once(processes: Mapping[int, Sequence[Sample]], moments: Sequence[int]) -> list[Point]:
    """How many processes were seen between the ends of two jobs; none counts, too."""
    seen: dict[int, set[int]] = defaultdict(set)
    for pid, samples in processes.items():
        for sample in samples:
            seen[sample.jobs].add(pid)
    return [(jobs, float(len(seen[jobs]))) for jobs in moments]


def _growth(role: str, quantity: str, processes: int, points: Sequence[Point]) -> list[Growth]:
    points = sorted(points)[int(len(points) * WARM_UP) :]
    if len(points) < LEAST_POINTS or points[0][0] == points[-1][0]:
        return []
    third = len(points) // 3
    return [
        Growth(
            role,
            quantity,
            processes,
            points[-1][0] - points[0][0],
            median(value for _, value in points[:third]),
            median(value for _, value in points[-third:]),
            1000 * slope(points),
        )
    ]


def slope(points: Sequence[Point]) -> float:
    """The median slope over all pairs of points (Theil 1950, Sen 1968): outliers do not move it."""
    while len(points) > MOST_PAIRED:
        points = points[::2]
    return median((y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in combinations(points, 2) if x2 != x1)


def table(found: Sequence[Growth], judged: Callable[[str], bool]) -> list[str]:
    """For people: memory in MiB. Roles that are not `judged` have no verdict."""
    lines = [
        f"{'process':<18}{'count':>6}  {'quantity':<12}{'first':>11}{'last':>11}"
        f"{'per 1,000 jobs':>16}  verdict"
    ]
    for each in found:
        verdict = ("flat" if each.is_flat else "GROWS") if judged(each.role) else "not ours"
        first, last, slope = (_shown(each.quantity, value) for value in (each.first, each.last, each.slope))
        lines.append(
            f"{each.role:<18}{each.processes:>6}  {each.quantity:<12}"
            f"{first:>11}{last:>11}{slope:>16}  {verdict}"
        )
    return lines


def _shown(quantity: str, value: float) -> str:
    return f"{value / MEBIBYTE:.1f} MiB" if quantity in ("rss", "uss") else f"{value:.1f}"
