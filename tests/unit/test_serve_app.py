from __future__ import annotations

from orchestrator.app import SINK_ANSWER_SECONDS, SINK_TIMEOUT_SECONDS
from orchestrator.serve_app import ControlPlaneDeployment


def test_requests_that_wait_for_a_replica_are_bounded() -> None:
    assert 0 < ControlPlaneDeployment.max_queued_requests <= 1000


def test_the_sink_answers_before_its_workers_send_again() -> None:
    assert SINK_ANSWER_SECONDS < SINK_TIMEOUT_SECONDS
