"""The example validator against a real control plane, killed where it hurts."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sqlite3
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from orchestrator.adapters.postgres.pool import Database
from orchestrator.domain.messages import (
    EpisodeDataMessage,
    EpisodeStepDataMessage,
    EvalResultMessage,
    JobStatusUpdateMessage,
)
from tests.end_to_end.conftest import EXAMPLES, PATIENCE_SECONDS, ROOT, Plane, running_plane
from tests.golden_texts import check_golden

if TYPE_CHECKING:
    import asyncpg

pytestmark = pytest.mark.ray

MODELS = {
    "eval_result": EvalResultMessage,
    "job_status_update": JobStatusUpdateMessage,
    "episode_data": EpisodeDataMessage,
    "episode_step_data": EpisodeStepDataMessage,
}
INVALID_JOB = {"job_id": 2, "env_provider": "gymnasium", "artifact_url": "https://example.org/policy.tar.gz"}
# Acknowledging a row deletes it. Two keys of 32 bits: those of jobs have one of 64.
STOP_ACKNOWLEDGEMENTS = """
    CREATE FUNCTION wait_for_the_test() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_advisory_xact_lock_shared(7, 7); RETURN OLD; END $$;
    CREATE TRIGGER wait_for_the_test BEFORE DELETE ON pgqueuer FOR EACH ROW
        WHEN (OLD.entrypoint <> 'add_job') EXECUTE FUNCTION wait_for_the_test();
"""
END_WHO_ACKNOWLEDGES = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE datname = current_database() AND wait_event_type = 'Lock' AND wait_event = 'advisory'
"""


@dataclass(frozen=True)
class ExampleValidator:
    """The example as a process, again and again on the same records."""

    database_url: str
    directory: Path
    jobs: tuple[Path, ...]

    @property
    def records(self) -> Path:
        return self.directory / "records.sqlite"

    async def start(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            str(EXAMPLES / "validator" / "consumer.py"),
            *("--database-url", self.database_url),
            *("--records", str(self.records)),
            *("--abandoned-after", "1"),
            *("--timeout", str(PATIENCE_SECONDS)),
            *map(str, self.jobs),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=self.directory,
        )

    def recorded(self, queue: str, job_id: int) -> list[dict[str, Any]]:
        """The messages that are recorded now, in the order of their recording."""
        if not self.records.exists():
            return []
        query = "SELECT message FROM messages WHERE queue = ? AND job_id = ? ORDER BY rowid"
        with closing(sqlite3.connect(self.records)) as connection:
            try:
                rows = connection.execute(query, (queue, job_id)).fetchall()
            except sqlite3.OperationalError:  # the table is not there yet
                return []
        return [json.loads(text) for (text,) in rows]

    def statuses(self, job_id: int) -> list[str]:
        """Each status of the job once, in the order in which they were announced."""
        updates = sorted(self.recorded("job_status_update", job_id), key=lambda update: update["timestamp"])
        return list(dict.fromkeys(update["status"] for update in updates))


@asynccontextmanager
async def role_with_the_rights_of_the_page(plane: Plane) -> AsyncIterator[str]:
    """The database's URL for a role that has what docs/validator.md grants, and nothing else."""
    name = f"validator_{uuid.uuid4().hex}"
    page = (ROOT / "docs" / "validator.md").read_text()
    grants = re.findall(r"^GRANT .*;$", page, re.MULTILINE)
    await plane.pool.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'its-own'")
    try:
        await plane.pool.execute("".join(grants).replace("TO validator;", f"TO {name};"))
        url = urlsplit(plane.recipe.database.dsn)
        yield url._replace(netloc=f"{name}:its-own@{url.netloc.rpartition('@')[2]}").geturl()
    finally:
        await plane.pool.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


@asynccontextmanager
async def no_acknowledgements(plane: Plane) -> AsyncIterator[asyncpg.pool.PoolConnectionProxy]:
    """Whoever acknowledges a row waits until the block ends."""
    async with plane.pool.acquire() as connection:
        await connection.execute(STOP_ACKNOWLEDGEMENTS)
        await connection.execute("SELECT pg_advisory_lock(7, 7)")
        try:
            yield connection
        finally:
            await connection.execute("SELECT pg_advisory_unlock(7, 7)")


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():
            await asyncio.sleep(0.05)


async def kill_before_it_acknowledges(
    connection: asyncpg.pool.PoolConnectionProxy, process: asyncio.subprocess.Process
) -> None:
    """Once it waits for its acknowledgement; which then never arrives, as if it had not been sent."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not await connection.fetchval(END_WHO_ACKNOWLEDGES.replace("pg_terminate_backend(pid)", "pid")):
            await asyncio.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    await process.wait()
    await connection.execute(END_WHO_ACKNOWLEDGES)


async def test_the_example_records_every_message_once_though_it_is_killed_before_it_acknowledges(
    ray_cluster: None, database: Database, scratch: Path
) -> None:
    schemes = {
        "archive_allowed_schemes": ("file",)
    }  # the archive is a file; the validator is no local client
    async with (
        running_plane(database, scratch, telemetry_messages_per_row=15, **schemes) as plane,
        role_with_the_rights_of_the_page(plane) as role,
    ):
        job = plane.job(
            EXAMPLES / "cartpole",
            competition_id="spring",
            miner_hotkey="5F3s",
            config={"seed": 7, "episodes_per_task": 2, "max_episode_steps": 20, "success_threshold": 20},
        )
        (scratch / "job.json").write_bytes(job.to_json())
        (scratch / "invalid.json").write_text(json.dumps(INVALID_JOB))
        validator = ExampleValidator(role, scratch, (scratch / "job.json", scratch / "invalid.json"))
        async with no_acknowledgements(plane) as connection:
            first = await validator.start()
            await plane.result(job)
            await kill_before_it_acknowledges(connection, first)

            second = await validator.start()
            await until(lambda: validator.recorded("eval_result", job.job_id))
            await kill_before_it_acknowledges(connection, second)

        last = await validator.start()
        printed, errors = await asyncio.wait_for(last.communicate(), PATIENCE_SECONDS)

        assert last.returncode == 0, errors.decode()
        again = re.search(r"(\d+) came again", printed.decode())
        assert again is not None
        assert int(again[1]) > 0
        await check_against_the_ledger(plane, validator, job.job_id)
        await check_against_the_ledger(plane, validator, 2)
        assert validator.statuses(job.job_id) == ["QUEUED", "STARTING", "RUNNING", "COMPLETED"]
        assert validator.statuses(2) == ["FAILED"]
        for queue in MODELS:
            assert await plane.queued_messages(queue) == []
    check_what_people_read(validator, job.job_id, printed.decode())


async def check_against_the_ledger(plane: Plane, validator: ExampleValidator, job_id: int) -> None:
    recorded = {queue: validator.recorded(queue, job_id) for queue in MODELS}
    stored = await plane.pool.fetchval("SELECT message FROM results WHERE job_id = $1", job_id)
    assert recorded["eval_result"] == [json.loads(stored)]
    episodes = await plane.pool.fetch("SELECT * FROM episodes WHERE job_id = $1 ORDER BY ordinal", job_id)
    assert sorted(
        (
            message["task_id"],
            message["episode_id"],
            message["final_reward"],
            message["steps"],
            message["success"],
        )
        for message in recorded["episode_data"]
    ) == [
        (row["task_id"], row["episode_id"], row["episode_return"], row["steps"], row["success"])
        for row in episodes
    ]
    assert sorted(
        (message["task_id"], message["episode_id"], message["step"])
        for message in recorded["episode_step_data"]
    ) == [(row["task_id"], row["episode_id"], step) for row in episodes for step in range(row["steps"])]
    for queue, model in MODELS.items():
        for message in recorded[queue]:
            model.model_validate(message)


def check_what_people_read(validator: ExampleValidator, job_id: int, printed: str) -> None:
    """What docs/validator.md shows is what was received here."""
    check_golden(
        "validator", "consumer_output", re.sub(r"\d+ (messages|came)|\d+\.\d (s)", r"N \1\2", printed)
    )
    updates = validator.recorded("job_status_update", job_id)
    running = next(update for update in updates if update["status"] == "RUNNING")
    for queue, message in {
        "add_job": json.loads(validator.jobs[0].read_bytes()),
        "job_status_update": running,
        "eval_result": validator.recorded("eval_result", job_id)[0],
        "eval_result_failed": validator.recorded("eval_result", 2)[0],
        "episode_data": validator.recorded("episode_data", job_id)[0],
        "episode_step_data": validator.recorded("episode_step_data", job_id)[0],
    }.items():
        check_golden("validator", queue, json.dumps(steadied(message), indent=2, ensure_ascii=False))


def steadied(value: Any, name: str = "") -> Any:
    """The message with a fixed text or number in the place of all that differs from run to run."""
    if name == "versions":
        return dict.fromkeys(value, "1.2.3")
    if isinstance(value, dict):
        return {key: steadied(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [steadied(item) for item in value]
    if re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", str(value)):
        return "2026-01-31T12:00:00.123456Z"
    fixed = {
        "logs": "what the submission printed\n",
        "artifact_url": "https://example.org/policy.tar.gz",
        "artifact_sha256": "5d0c...",
        "artifact_size_bytes": 815,
        "policy_latency_mean_seconds": 0.0004,
        "policy_latency_max_seconds": 0.0009,
    }
    return fixed.get(name, value)
