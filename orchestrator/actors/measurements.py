"""What the consumer and the sink tell the meter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from orchestrator.adapters.postgres.figures import Figures
from orchestrator.domain import metrics
from orchestrator.domain.episodes import FinishedEpisode
from orchestrator.domain.messages import OUTGOING_QUEUES, QUEUE_ADD_JOB
from orchestrator.domain.metrics import Meter


@dataclass(frozen=True)
class InstallationFigures:
    """Reads the figures of the installation, for the meter."""

    figures: Figures
    meter: Meter

    async def measure(self) -> None:
        """Once in each round of the reconciler."""
        for status, jobs in (await self.figures.unfinished_jobs()).items():
            self.meter.set(metrics.JOBS, jobs, status=status.value)
        for job in await self.figures.ended_jobs():
            self.meter.add(metrics.JOBS_ENDED, status=job.status.value)
            if job.first_step_seconds is not None:
                self.meter.observe(metrics.CLAIM_TO_FIRST_STEP, max(job.first_step_seconds, 0.0))
        for queue in (QUEUE_ADD_JOB, *OUTGOING_QUEUES):
            waiting = await self.figures.queue(queue)
            self.meter.set(metrics.QUEUE_ROWS, waiting.rows, queue=queue)
            self.meter.set(metrics.QUEUE_OLDEST, waiting.oldest_seconds, queue=queue)


def measure_committed(meter: Meter, committed: Iterable[FinishedEpisode]) -> None:
    """Episodes that the ledger has just taken."""
    now = datetime.now(UTC)
    for episode in committed:
        outcome = "fault" if episode.fault else "success" if episode.success else "failure"
        meter.add(metrics.EPISODES, outcome=outcome)
        meter.add(metrics.STEPS, episode.steps)
        if episode.fault is not None:
            meter.add(metrics.FAULTS, fault=episode.fault.value)
        latency = episode.metrics.get("policy_latency_mean_seconds")
        if latency is not None:
            meter.observe(metrics.POLICY_LATENCY, latency)
        # Two machines' clocks: a little before the end is at the end.
        meter.observe(metrics.SINK_LAG, max((now - episode.ended_at).total_seconds(), 0.0))
