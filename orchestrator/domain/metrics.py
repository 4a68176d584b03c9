"""What is measured while jobs run: the whole list, and how a process says that something happened.

Labels have the values listed here and no others, so that nobody's jobs can make a monitoring system grow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from orchestrator.domain.episodes import FaultClass
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.messages import OUTGOING_QUEUES, QUEUE_ADD_JOB

OTHER = "other"


class MetricKind(StrEnum):
    """How values are put together."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One thing that is measured. `labels`: each label's name and the values that it can have."""

    name: str
    kind: MetricKind
    meaning: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    boundaries: tuple[float, ...] = ()

    def bounded(self, given: Mapping[str, str]) -> dict[str, str]:
        """The labels as they are exported: a value that is not listed becomes `other`."""
        return {
            label: value if (value := given.get(label, OTHER)) in values else OTHER
            for label, values in self.labels.items()
        }


class ReconcilerAction(StrEnum):
    """What the reconciler does for somebody who did not."""

    JOB_ENDED = "job_ended"
    JOB_CANCELLED = "job_cancelled"
    JOB_REVIVED = "job_revived"
    JOB_STARTED = "job_started"
    SUPERVISOR_ENDED = "supervisor_ended"
    CONTAINER_REMOVED = "container_removed"
    CONTAINER_MISSING = "container_missing"
    FAILED = "failed"


UNFINISHED = tuple(status.value for status in JobStatus if not status.is_final)
FINAL = tuple(status.value for status in JobStatus if status.is_final)
LATENCIES = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
DURATIONS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)

JOBS = Metric("orchestrator_jobs", MetricKind.GAUGE, "jobs that have not ended", {"status": UNFINISHED})
JOBS_ENDED = Metric(
    "orchestrator_jobs_ended", MetricKind.COUNTER, "jobs that ended, by how", {"status": FINAL}
)
CLAIM_TO_FIRST_STEP = Metric(
    "orchestrator_claim_to_first_step_seconds",
    MetricKind.HISTOGRAM,
    "from a job's first claim to the beginning of its first episode; observed when the job ends",
    boundaries=DURATIONS,
)
QUEUE_ROWS = Metric(
    "orchestrator_queue_rows",
    MetricKind.GAUGE,
    "rows that wait in a queue, up to 100000",
    {"queue": (QUEUE_ADD_JOB, *OUTGOING_QUEUES)},
)
QUEUE_OLDEST = Metric(
    "orchestrator_queue_oldest_seconds",
    MetricKind.GAUGE,
    "age of the oldest of these rows; 0 where none waits",
    {"queue": (QUEUE_ADD_JOB, *OUTGOING_QUEUES)},
)
EPISODES = Metric(
    "orchestrator_episodes",
    MetricKind.COUNTER,
    "episodes with an outcome, committed",
    {"outcome": ("success", "failure", "fault")},
)
STEPS = Metric("orchestrator_steps", MetricKind.COUNTER, "steps of these episodes")
FAULTS = Metric(
    "orchestrator_faults",
    MetricKind.COUNTER,
    "episodes that a submission lost by a fault, by its class",
    {"fault": tuple(fault.value for fault in FaultClass)},
)
POLICY_LATENCY = Metric(
    "orchestrator_policy_latency_seconds",
    MetricKind.HISTOGRAM,
    "mean time that a policy took for an answer, an observation for each episode",
    boundaries=LATENCIES,
)
SINK_LAG = Metric(
    "orchestrator_sink_lag_seconds",
    MetricKind.HISTOGRAM,
    "from an episode's end at its worker to its commit",
    boundaries=LATENCIES + DURATIONS[7:],
)
SINK_HELD = Metric(
    "orchestrator_sink_held_bytes",
    MetricKind.GAUGE,
    "episodes that the result sink holds and has not committed",
)
RECONCILER_ACTIONS = Metric(
    "orchestrator_reconciler_actions",
    MetricKind.COUNTER,
    "what the reconciler had to do; all but `job_started` say that something died",
    {"action": tuple(action.value for action in ReconcilerAction)},
)

METRICS = (
    JOBS,
    JOBS_ENDED,
    CLAIM_TO_FIRST_STEP,
    QUEUE_ROWS,
    QUEUE_OLDEST,
    EPISODES,
    STEPS,
    FAULTS,
    POLICY_LATENCY,
    SINK_LAG,
    SINK_HELD,
    RECONCILER_ACTIONS,
)


class Meter(Protocol):
    """Takes what is measured. Cheap, and never in the way: it raises nothing."""

    def add(self, metric: Metric, amount: float = 1.0, **labels: str) -> None:
        """Raise a counter."""
        ...

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """Set a gauge."""
        ...

    def observe(self, metric: Metric, value: float) -> None:
        """Put a value into a histogram."""
        ...


class NoMeter:
    """Measures nothing."""

    def add(self, metric: Metric, amount: float = 1.0, **labels: str) -> None:
        pass

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        pass

    def observe(self, metric: Metric, value: float) -> None:
        pass
