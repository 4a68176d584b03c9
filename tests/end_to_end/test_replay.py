"""Episodes that Ray's workers played over TCP, replayed from the database alone."""

from __future__ import annotations

import json

import pytest

from orchestrator.commands.replay import replay_command
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.settings import Settings
from tests.end_to_end.conftest import EXAMPLES, Plane

pytestmark = pytest.mark.ray


async def test_what_workers_played_is_replayed_bit_for_bit(
    plane: Plane, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [
        plane.job(EXAMPLES / "stochastic_cartpole", config={"episodes_per_task": 3}),
        plane.job(EXAMPLES / "metaworld_experts", "metaworld/reach-v3", config={"episodes_per_task": 2}),
    ]
    await plane.submit(*jobs)
    results = [await plane.result(job) for job in jobs]
    settings = Settings(database_url=plane.recipe.database.dsn)

    codes = [
        await replay_command(lambda: settings, job.job_id, None, None, every=True, as_json=True)
        for job in jobs
    ]

    assert [result.status for result in results] == [JobStatus.COMPLETED] * 2
    printed = capsys.readouterr().out
    documents = [json.loads(text) for text in printed.replace("}\n{", "}\n\0{").split("\0")]
    verdicts = [[episode["verdict"] for episode in document["episodes"]] for document in documents]
    assert verdicts == [["equal"] * 3, ["equal"] * 2]
    assert codes == [0, 0]
    assert all(document["versions_then"] == document["versions_now"] for document in documents)
