"""A meter that remembers: `domain.metrics.Meter` for tests."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from orchestrator.domain.metrics import Metric, MetricKind

Key = tuple[str, str]


@dataclass
class RecordingMeter:
    """`values`: what counters and gauges stand at, by name and label value; `observed`: histograms."""

    values: dict[Key, float] = field(default_factory=lambda: defaultdict(float))
    observed: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, metric: Metric, amount: float = 1.0, **labels: str) -> None:
        assert metric.kind is MetricKind.COUNTER
        self.values[self._key(metric, labels)] += amount

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        assert metric.kind is MetricKind.GAUGE
        self.values[self._key(metric, labels)] = value

    def observe(self, metric: Metric, value: float) -> None:
        assert metric.kind is MetricKind.HISTOGRAM
        self.observed[metric.name].append(value)

    @staticmethod
    def _key(metric: Metric, labels: dict[str, str]) -> Key:
        assert set(labels) == set(metric.labels)
        return metric.name.removeprefix("orchestrator_"), "/".join(metric.bounded(labels).values())
