"""`domain.metrics.Meter` on Ray: every node exports it, and the dashboard shows it."""

from __future__ import annotations

from typing import Any

import structlog
from ray.util import metrics as ray_metrics

from orchestrator.domain.metrics import Metric, MetricKind

log = structlog.get_logger(__name__)


class RayMeter:
    """Makes each metric of Ray when it is first used."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}
        self._broken: set[str] = set()

    def add(self, metric: Metric, amount: float = 1.0, **labels: str) -> None:
        if amount > 0:  # Ray refuses to raise a counter by nothing
            self._do(metric, "inc", amount, labels)

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        self._do(metric, "set", value, labels)

    def observe(self, metric: Metric, value: float) -> None:
        self._do(metric, "observe", value, {})

    def _do(self, metric: Metric, method: str, value: float, labels: dict[str, str]) -> None:
        try:
            getattr(self._of_ray(metric), method)(value, tags=metric.bounded(labels))
        except Exception as error:  # noqa: BLE001 - no job fails for a figure that nobody sees
            if metric.name not in self._broken:
                self._broken.add(metric.name)
                log.warning("metric_not_exported", metric=metric.name, why=str(error))

    def _of_ray(self, metric: Metric) -> Any:
        made = self._made.get(metric.name)
        if made is None:
            common = {"description": metric.meaning, "tag_keys": tuple(metric.labels)}
            if metric.kind is MetricKind.HISTOGRAM:
                made = ray_metrics.Histogram(metric.name, boundaries=list(metric.boundaries), **common)
            elif metric.kind is MetricKind.COUNTER:
                made = ray_metrics.Counter(metric.name, **common)
            else:
                made = ray_metrics.Gauge(metric.name, **common)
            self._made[metric.name] = made
        return made
