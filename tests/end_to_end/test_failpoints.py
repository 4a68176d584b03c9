"""The variable arms Ray's actors too: a job whose every process dies once ends as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator import fault_plan
from tests.end_to_end.command_processes import orchestrator
from tests.end_to_end.conftest import EXAMPLES

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

RULES = {
    "queue-consumer-*": "queue.acknowledge.*.before=kill*1",
    "job-*": "job_store.register_container.after=kill*1",
    "result-sink-*": "postgres.ledger.commit.commit.after=kill*1",
    "rollout-worker-*": "policy_connection.act.after=kill*1",
}


def test_a_job_survives_the_death_of_each_of_its_processes(
    scratch: Path,
) -> None:
    scratch.chmod(0o755)
    notes = scratch / "faults"
    notes.mkdir()
    processes = ",".join(RULES)
    rules = "; ".join(RULES.values())
    variables = {fault_plan.VARIABLE: f"dir={notes}; processes={processes}; {rules}"}
    options = ("--episodes", "4", "--workers", "1", "--seed", "7", "--json")
    submission = (EXAMPLES / "cartpole", "-b", "gymnasium/CartPole-v1")

    done = orchestrator("eval", *submission, *options, "--data-dir", scratch / "data", **variables)

    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)["results"]
    assert (result["status"], result["total_episodes"], result["score"]) == ("COMPLETED", 4, 1.0)
    faults = [json.loads(path.read_text()) for path in notes.glob("*.json")]
    died = sorted(fault["process"].rstrip("0123456789") for fault in faults)
    assert died == ["job-", "queue-consumer-g", "result-sink-g", "rollout-worker-"]
