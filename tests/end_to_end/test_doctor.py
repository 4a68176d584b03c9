"""`doctor` beside a live run: it sees it, and clears nothing of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import SecretStr

from orchestrator import ray_session
from orchestrator.commands.doctor import doctor_command
from orchestrator.diagnosis.findings import State
from orchestrator.diagnosis.ray_checks import cluster
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.ray_session import abandoned_sessions
from tests.end_to_end.conftest import GatedSubmission, Plane

pytestmark = pytest.mark.ray


async def test_a_cluster_that_lets_us_in_is_described(ray_cluster: None) -> None:
    import ray

    finding = await cluster(ray.get_runtime_context().gcs_address)

    assert finding.state is State.OK, finding
    assert finding.what.endswith("8 CPUs on 1 node")


async def test_nothing_of_a_live_run_is_cleared(
    plane: Plane,
    gated: GatedSubmission,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    scratch: Path,
) -> None:
    import ray

    session = Path(ray._private.worker._global_node.get_session_dir_path()).parent
    assert session.name.startswith(ray_session.PREFIX)
    assert session not in abandoned_sessions()
    monkeypatch.setattr(ray_session, "PARENT", scratch)  # those of others are not ours to clear
    job = plane.job(gated.directory, config={"episodes_per_task": 8, "max_episode_steps": 20})
    await plane.submit(job)
    await gated.reached()
    settings = plane.recipe.settings.model_copy(update={"database_url": SecretStr(plane.recipe.database.dsn)})

    await doctor_command(lambda: settings, fix=True, as_json=True)
    gated.open()
    result = await plane.result(job)

    document = json.loads(capsys.readouterr().out)
    found = {one["name"]: one for one in document["checks"]}
    assert document["cleared"] == []
    assert found["containers"]["what"] == "none; 1 in use, or of another machine"
    assert found["jobs"]["what"] == "1 running, 0 queued"
    assert found["connections"]["what"].endswith("a control plane is connected")
    assert result.status is JobStatus.COMPLETED
    assert len(gated.processes()) == 1  # the container was never replaced
    assert sorted(gated.played()) == list(range(8))
