"""The history of a job: written with every change of status or detail, bounded for jobs that flap."""

from __future__ import annotations

from orchestrator.adapters.postgres.fence import Connection, storable
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.reports import StatusChange

# How a job began, and what became of it, is what people ask; of a job that flaps for days the middle goes.
FIRST_KEPT = 20
LATEST_KEPT = 80

RECORD = """
    WITH last AS (SELECT coalesce(max(number), 0) AS number FROM job_events WHERE job_id = $1),
    dropped AS (
        DELETE FROM job_events e USING last
        WHERE e.job_id = $1 AND e.number > $4 AND e.number <= last.number + 1 - $5)
    INSERT INTO job_events (job_id, number, epoch, status, detail)
    SELECT j.job_id, last.number + 1, j.epoch, $2, $3 FROM jobs j, last WHERE j.job_id = $1"""


async def record_event(connection: Connection, job_id: int, status: JobStatus, detail: str | None) -> None:
    """Write the change down, in the caller's transaction, which nobody else's on this job overlaps."""
    await connection.execute(RECORD, job_id, status.value, storable(detail), FIRST_KEPT, LATEST_KEPT)


async def read_events(connection: Connection, job_id: int, *, after: int = 0) -> list[StatusChange]:
    """The changes with a higher number, in order."""
    rows = await connection.fetch(
        """SELECT number, at, epoch, status, detail FROM job_events
           WHERE job_id = $1 AND number > $2 ORDER BY number""",
        job_id,
        after,
    )
    return [
        StatusChange(row["number"], row["at"], JobStatus(row["status"]), row["detail"], row["epoch"])
        for row in rows
    ]
