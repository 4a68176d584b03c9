from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from orchestrator.actors.measurements import InstallationFigures, measure_committed
from orchestrator.actors.ray_meter import RayMeter
from orchestrator.adapters.postgres import figures
from orchestrator.adapters.postgres.figures import Figures
from orchestrator.adapters.postgres.ledger import PostgresLedger
from orchestrator.adapters.postgres.queue import TelemetryRows
from orchestrator.domain.episodes import FaultClass
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.metrics import JOBS, METRICS, SINK_HELD, Metric, MetricKind
from tests.job_fixtures import a_job, a_result, a_store, claimed, finished, planned_runs
from tests.meters import RecordingMeter
from tests.unit.actors.control_fakes import a_reconciler

if TYPE_CHECKING:
    from tests.conftest import Pool

PAGE = Path(__file__).resolve().parents[3] / "docs" / "metrics.md"


async def test_jobs_and_queues_are_measured_as_they_stand(pool: Pool) -> None:
    store = a_store(pool)
    for job_id in (1, 2, 3):
        await store.insert(a_job(job_id), enqueue=True)
    await store.claim(1, uuid4())
    await pool.execute("UPDATE pgqueuer SET created = now() - interval '90 s' WHERE entrypoint = 'add_job'")
    meter = RecordingMeter()

    await InstallationFigures(await Figures.from_now(pool), meter).measure()

    assert {key: meter.values[key] for key in meter.values if key[0] == "jobs"} == {
        ("jobs", "QUEUED"): 2,
        ("jobs", "STARTING"): 1,
        ("jobs", "RUNNING"): 0,
    }
    assert meter.values["queue_rows", "add_job"] == 3
    assert 90 <= meter.values["queue_oldest_seconds", "add_job"] < 120
    assert meter.values["queue_rows", "eval_result"] == 0
    assert meter.values["queue_oldest_seconds", "eval_result"] == 0


async def test_a_job_that_ends_is_counted_once_with_its_time_to_the_first_step(pool: Pool) -> None:
    store = a_store(pool)
    measured = RecordingMeter()
    await store.insert(a_job(8), enqueue=False)
    await store.finish_unheld(8, JobStatus.CANCELLED, "before anybody looked", store.failed_result)
    installation = InstallationFigures(await Figures.from_now(pool), measured)

    claim = await claimed(store)
    (run, *_) = await planned_runs(pool, claim)
    begun = finished(run)
    started_at = await pool.fetchval("SELECT claimed_at FROM claims")
    begun = replace(
        begun, started_at=started_at + timedelta(seconds=4), ended_at=started_at + timedelta(seconds=5)
    )
    await PostgresLedger(pool, TelemetryRows(1, 2**20)).commit([begun])
    await store.finish(claim, JobStatus.TIMEOUT, a_result("TIMEOUT"))
    for _ in range(2):
        await installation.measure()

    ended = {key[1]: value for key, value in measured.values.items() if key[0] == "jobs_ended"}
    assert ended == {"TIMEOUT": 1}
    assert measured.observed["orchestrator_claim_to_first_step_seconds"] == [pytest.approx(4.0)]


async def test_a_queue_is_counted_up_to_a_cap(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "MOST_ROWS", 2)
    for job_id in (1, 2, 3):
        await a_store(pool).insert(a_job(job_id), enqueue=True)

    assert (await (await Figures.from_now(pool)).queue("add_job")).rows == 2


async def test_committed_episodes_are_counted_by_outcome_and_fault(pool: Pool) -> None:
    claim = await claimed(a_store(pool))
    run, *_ = await planned_runs(pool, claim)
    base = replace(
        finished(run, steps=7),
        metrics={"policy_latency_mean_seconds": 0.25},
        ended_at=datetime.now(UTC) - timedelta(seconds=2),
    )
    lost = replace(
        base,
        success=False,
        fault=FaultClass.STEP_TIMEOUT,
        metrics={},
        ended_at=datetime.now(UTC) + timedelta(1),
    )
    meter = RecordingMeter()

    measure_committed(meter, [replace(base, success=True), replace(base, success=False), lost])

    assert meter.values["episodes", "success"] == meter.values["episodes", "failure"] == 1
    assert meter.values["episodes", "fault"] == meter.values["faults", FaultClass.STEP_TIMEOUT.value] == 1
    assert meter.values["steps", ""] == 21
    assert meter.observed["orchestrator_policy_latency_seconds"] == [0.25, 0.25]
    assert meter.observed["orchestrator_sink_lag_seconds"] == [
        pytest.approx(2, abs=1),
        pytest.approx(2, abs=1),
        0.0,
    ]


async def test_what_the_reconciler_does_is_counted(pool: Pool) -> None:
    store, meter = a_store(pool), RecordingMeter()
    await store.insert(a_job(1), enqueue=True)
    await store.request_cancel(1, "cancelled")

    await a_reconciler(
        pool, store, meter=meter, figures=InstallationFigures(await Figures.from_now(pool), meter)
    ).reconcile()

    assert meter.values["reconciler_actions", "job_ended"] == 1
    assert ("reconciler_actions", "failed") not in meter.values
    assert meter.values["jobs", "QUEUED"] == 0


def test_labels_have_the_listed_values_and_no_others() -> None:
    assert JOBS.bounded({"status": "QUEUED"}) == {"status": "QUEUED"}
    assert JOBS.bounded({"status": "job 17", "user": "x"}) == {"status": "other"}
    assert JOBS.bounded({}) == {"status": "other"}


@pytest.mark.filterwarnings("ignore:Invalid metric name")
def test_what_goes_wrong_with_a_metric_stays_with_it() -> None:
    meter = RayMeter()
    broken = replace(SINK_HELD, name="no name of a metric")

    for _ in range(2):
        meter.set(broken, 1.0)


def test_the_page_lists_every_metric_with_its_kind_labels_and_meaning() -> None:
    lines = PAGE.read_text().splitlines()

    listed = [line for line in lines if line.startswith("| `ray_orchestrator_")]

    assert listed == [row_of(metric) for metric in METRICS]


def row_of(metric: Metric) -> str:
    suffix = "_total" if metric.kind is MetricKind.COUNTER else ""
    labels = "; ".join(f"`{label}`: {', '.join(values)}" for label, values in metric.labels.items())
    return f"| `ray_{metric.name}{suffix}` | {metric.kind.value} | {labels} | {metric.meaning} |"
