from __future__ import annotations

from datetime import UTC, datetime
from uuid import UUID

import pytest

from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.messages import EvalJobMessage
from orchestrator.domain.reports import EpisodeCounts, JobInfo, Lease, QueueStanding, waits_for
from orchestrator.domain.statistics import wilson_interval

AT = datetime(2026, 1, 1, tzinfo=UTC)
LIVE = Lease(UUID(int=1), AT, True)
LAPSED = Lease(UUID(int=1), AT, False)


def job(status: JobStatus, **fields: object) -> JobInfo:
    message = EvalJobMessage(job_id=1, env_provider="gymnasium", benchmark_name="CartPole-v1")
    values: dict[str, object] = {
        "job_id": 1,
        "status": status,
        "detail": None,
        "env_provider": message.env_provider,
        "benchmark_name": message.benchmark_name,
        "submission_id": "",
        "priority": 0,
        "tags": {},
        "created_at": AT,
        "claimed_at": None,
        "running_at": None,
        "finished_at": None,
        "cancel_requested_at": None,
        "cancel_reason": None,
        "episodes": EpisodeCounts(),
        "message": message,
        "local": False,
        "epoch": 0,
        "deadline_at": None,
        "client_lease_expires_at": None,
        "lease": None,
        "tasks": (),
        "history": (),
        "claims": (),
    }
    return JobInfo(**values | fields)  # type: ignore[arg-type]


def standing(live: bool = True, ahead: int = 0, held: int = 0) -> QueueStanding:
    return QueueStanding(live, ahead, held)


@pytest.mark.parametrize(
    ("status", "fields", "where", "words"),
    [
        (
            "QUEUED",
            {},
            standing(live=False),
            "a control plane: none works on this database, `orchestrator up` starts one",
        ),
        ("QUEUED", {}, standing(), "the control plane to take it"),
        ("QUEUED", {}, standing(held=1), "a free place: 1 job at work"),
        ("QUEUED", {}, standing(held=2, ahead=3), "its turn: 2 jobs at work, 3 more before it in the queue"),
        ("QUEUED", {"cancel_requested_at": AT}, standing(), "its cancellation"),
        (
            "RUNNING",
            {"cancel_requested_at": AT, "lease": LIVE},
            standing(live=False),
            "its cancellation, though no control plane works on this database",
        ),
        ("STARTING", {"lease": LIVE, "detail": "2 CPUs"}, standing(), "2 CPUs"),
        ("RUNNING", {"lease": LAPSED}, standing(), "a new supervisor: the last one has given it up or died"),
        ("RUNNING", {"lease": LIVE, "episodes": EpisodeCounts(5, 2, 1)}, standing(), "3 episodes to finish"),
        ("RUNNING", {"lease": LIVE, "episodes": EpisodeCounts(3, 2, 1)}, standing(), "1 episode to finish"),
        ("RUNNING", {"lease": LIVE, "episodes": EpisodeCounts(2, 2, 1)}, standing(), "its result"),
        ("COMPLETED", {}, standing(), None),
        ("CANCELLED", {"cancel_requested_at": AT}, standing(), None),
    ],
)
def test_what_a_job_waits_for(
    status: str, fields: dict[str, object], where: QueueStanding, words: str | None
) -> None:
    assert waits_for(job(JobStatus(status), **fields), where) == words


def test_counts_give_a_rate_and_its_interval_once_an_episode_has_finished() -> None:
    assert (EpisodeCounts(4).success_rate, EpisodeCounts(4).interval) == (None, None)
    assert EpisodeCounts(4, 2, 1).success_rate == 0.5
    assert EpisodeCounts(4, 2, 1).interval == wilson_interval(1, 2)
