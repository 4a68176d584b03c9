"""What the commands for jobs print in the states that jobs are in, and for what people get wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pgqueuer.adapters.persistence.queries import Queries

from orchestrator.domain.lifecycle import JobStatus
from tests.golden_texts import check_golden
from tests.job_fixtures import a_store
from tests.job_states import ended, queued, running, starting

if TYPE_CHECKING:
    from tests.conftest import Pool
    from tests.unit.cli.conftest import CommandLine

ROOT = Path(__file__).parents[3]
TRACEBACK = """the policy does not load: Traceback (most recent call last):
  File "agent.py", line 1, in <module>
    import torchh
ModuleNotFoundError: No module named 'torchh'"""


async def several(pool: Pool) -> None:
    await ended(pool, 1, env_provider="metaworld", benchmark_name="MT10", submission_id="experts")
    await ended(
        pool, 2, JobStatus.FAILED, error=TRACEBACK, done=0, submission_id="examples/a-name-that-is-long"
    )
    await ended(pool, 3, JobStatus.TIMEOUT, error="the job's time is over", done=3, tags={"team": "blue"})
    await running(pool, 4, done=7, tags={"team": "blue"})
    await starting(pool, 5, detail="waits for its workers")
    await queued(pool, 6)


async def held(pool: Pool) -> None:
    await Queries.from_asyncpg_pool(pool).enqueue("add_job", b'{"job": 5}')
    row = await pool.fetchrow(
        "UPDATE pgqueuer SET status = 'failed' WHERE convert_from(payload, 'UTF8') ~ 'job\":' RETURNING id"
    )
    reason = "job_id: Field required; env_provider: Field required; benchmark_name: Field required"
    await pool.execute(
        """INSERT INTO pgqueuer_log (job_id, status, priority, entrypoint, traceback)
           VALUES ($1, 'failed', 0, 'add_job', json_build_object('exception_message', $2::text)::jsonb)""",
        row["id"],
        reason,
    )


def test_jobs_lists_what_there_is(orchestrator: CommandLine) -> None:
    nothing = orchestrator.transcript("jobs", "jobs --held")

    orchestrator.prepare(several, held)

    lists = orchestrator.transcript(
        "jobs",
        "jobs --failed",
        "jobs --status running --status queued --limit 1",
        "jobs --tag team=blue --benchmark CartPole-v1",
        "jobs --benchmark metaworld/ML1",
        "jobs --held",
    )
    check_golden("jobs", "list", f"{nothing}\n{lists}")


def test_on_a_narrow_terminal_what_is_counted_stays(
    orchestrator: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    orchestrator.prepare(several)
    monkeypatch.setenv("COLUMNS", "100")

    check_golden("jobs", "list_narrow", orchestrator.transcript("jobs"))


def test_status_says_how_a_job_stands(orchestrator: CommandLine) -> None:
    async def taken_up_again(pool: Pool) -> None:
        claim, _ = await running(pool, 7, done=2, submission_id="examples/cartpole", priority=3)
        store = a_store(pool, max_concurrent_jobs=100)
        await store.release(claim, "InfrastructureError: a node was lost")
        await pool.execute("UPDATE jobs SET lease_expires_at = clock_timestamp() WHERE job_id = 7")
        await store.claim(7, claim.holder)
        await store.request_cancel(7, "wrong checkpoint")

    orchestrator.prepare(several, taken_up_again)

    check_golden("jobs", "status", orchestrator.transcript(*(f"status {job}" for job in (6, 5, 7, 2, 1))))


def test_status_of_a_job_that_flaps_says_how_much_is_left_out(orchestrator: CommandLine) -> None:
    async def flapping(pool: Pool) -> None:
        claim = await starting(pool, 1)
        for number in range(150):
            await a_store(pool).set_status(claim, JobStatus.STARTING, f"try {number}")

    orchestrator.prepare(flapping)

    printed = orchestrator("status", 1).out

    assert "(53 changes left out)" in printed
    assert "try 149" in printed


def test_cancel_says_what_it_did(orchestrator: CommandLine) -> None:
    orchestrator.prepare(several)

    check_golden(
        "jobs",
        "cancel",
        orchestrator.transcript(
            "cancel 6 --reason superfluous", "cancel 1", "cancel 5 --no-wait", "jobs --status CANCELLED"
        ),
    )


def test_results_and_logs_show_what_came_of_a_job(orchestrator: CommandLine, tmp_path: Path) -> None:
    async def jobs(pool: Pool) -> None:
        await ended(pool, 1, env_provider="metaworld", benchmark_name="MT10")
        await ended(pool, 2, JobStatus.FAILED, error=TRACEBACK, done=0, logs="loading\n\x1b[2Jno weights\n")
        await running(pool, 3)
        await queued(pool, 4)

    orchestrator.prepare(jobs)

    shown = orchestrator.transcript(
        "results 1 2", "results 3", "logs 2", "logs 2 --tail 1", "logs 1", "logs 3", "logs 4"
    )
    check_golden("jobs", "results", shown)
    written = orchestrator("results", 1, 2, "--json", "--output", tmp_path / "bundle")
    assert [result["job_id"] for result in json.loads(written.out)["results"]] == [1, 2]
    assert len((tmp_path / "bundle" / "episodes.jsonl").read_text().splitlines()) == 10


def test_retry_gives_a_new_job(orchestrator: CommandLine, tmp_path: Path) -> None:
    async def with_archive(pool: Pool) -> None:
        await queued(pool, 7, local=True, artifact_url="file:///packed/for/eval.tar.gz")
        store = a_store(pool)
        await store.finish_unheld(7, JobStatus.CANCELLED, "interrupted", store.failed_result)

    orchestrator.prepare(several, held, with_archive)
    row = json.loads(orchestrator("jobs", "--held", "--json").out)["held"][0]["row_id"]

    shown = orchestrator.transcript(
        "retry 2",
        "retry 1",
        "retry 1 --force",
        "retry 4",
        "retry 7",
        "retry",
        f"retry --held {row}",
        f"retry --held {row}",
    )

    check_golden("jobs", "retry", shown.replace(f"--held {row}", "--held ROW").replace(f" {row}", " ROW"))


def test_watch_ends_with_the_job_and_its_exit_code(orchestrator: CommandLine) -> None:
    orchestrator.prepare(several)

    check_golden("jobs", "watch_ended", orchestrator.transcript("watch 1", "watch 2"))
    events = [json.loads(line) for line in orchestrator("watch", 3, "--json").out.splitlines()]
    assert [event["event"] for event in events] == ["status"] * 4 + ["episode"] * 3 + ["status"]
    assert events[-1]["status"] == "TIMEOUT"


def test_a_job_that_is_unknown_ends_with_2_and_says_so(orchestrator: CommandLine) -> None:
    commands = [f"{command} 9" for command in ("status", "watch", "cancel", "results", "logs", "retry")]

    check_golden("jobs", "unknown", orchestrator.transcript(*commands))


def test_json_has_every_key_and_keeps_them(orchestrator: CommandLine) -> None:
    orchestrator.prepare(several)

    listed = json.loads(orchestrator("jobs", "--json").out)["jobs"]
    one = json.loads(orchestrator("status", 4, "--json").out)
    cancelled = json.loads(orchestrator("cancel", 6, "--json").out)

    keys = "".join(f"{name}: {type(value).__name__}\n" for name, value in one.items())
    check_golden("jobs", "status_json_keys", keys)
    assert [list(one)[: len(job)] for job in listed] == [list(job) for job in listed]
    assert list(cancelled) == list(listed[0])
    assert one["episodes"] == {
        "planned": 10,
        "finished": 7,
        "succeeded": 5,
        "success_rate": 5 / 7,
        "interval": one["episodes"]["interval"],
    }
    assert one["history"][0]["status"] == "QUEUED"
    documented = (ROOT / "docs" / "client.md").read_text()
    parts = (one, one["episodes"], one["tasks"][0], one["history"][0], one["claims"][0])
    assert [key for part in parts for key in part if f"`{key}`" not in documented] == []
