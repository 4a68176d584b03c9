"""A validator in one file: enqueues jobs, and records every message that comes back exactly once.

    python consumer.py --database-url postgresql://... --records records.sqlite job.json...

It knows the database only through pgqueuer, as docs/validator.md describes it. The queue delivers a message
at least once; the keys of one SQLite table make that exactly once. So it may be killed at any line: started
again with the same records, it goes on. It ends when all its jobs have results, and all that was queued until
then is recorded.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sqlite3
import time
import uuid
from collections.abc import Sequence
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
from pgqueuer import Job, Queries
from pgqueuer.queries import EntrypointExecutionParameter

# What makes a message the same message, for each queue. pgqueuer's `dedupe_key` would not do: it holds only
# while a row waits.
KEYS = {
    "eval_result": ("job_id",),
    "job_status_update": ("job_id", "timestamp", "status"),
    "episode_data": ("job_id", "task_id", "episode_id"),
    "episode_step_data": ("job_id", "task_id", "episode_id", "step"),
}
ROWS_AT_ONCE = 20
POLL_SECONDS = 0.2


class Records:
    """What was enqueued and what was received, in a SQLite file."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path, isolation_level=None)
        # FULL: what is acknowledged next must outlive the machine's power.
        self._database.executescript(
            """
            PRAGMA journal_mode = WAL;
            PRAGMA synchronous = FULL;
            CREATE TABLE IF NOT EXISTS enqueued (job_id INTEGER PRIMARY KEY);
            CREATE TABLE IF NOT EXISTS messages (
                queue TEXT, key TEXT, job_id INTEGER, message TEXT, PRIMARY KEY (queue, key)
            );
            """
        )

    def close(self) -> None:
        self._database.close()

    def is_enqueued(self, job_id: int) -> bool:
        found = self._database.execute("SELECT 1 FROM enqueued WHERE job_id = ?", (job_id,))
        return found.fetchone() is not None

    def note_enqueued(self, job_id: int) -> None:
        self._database.execute("INSERT OR IGNORE INTO enqueued VALUES (?)", (job_id,))

    def add(self, rows: Sequence[Job]) -> tuple[int, int]:
        """Record the messages of these rows in one transaction: how many they are, and how many are new."""
        records = [
            (row.entrypoint, key_of(row.entrypoint, message), message["job_id"], json.dumps(message))
            for row in rows
            for message in messages_of(row)
        ]
        before = self._database.total_changes
        self._database.execute("BEGIN IMMEDIATE")
        self._database.executemany("INSERT OR IGNORE INTO messages VALUES (?, ?, ?, ?)", records)
        self._database.execute("COMMIT")
        return len(records), self._database.total_changes - before

    def of(self, queue: str, job_id: int) -> list[dict[str, Any]]:
        """The messages of a job, in the order in which they were recorded."""
        found = self._database.execute(
            "SELECT message FROM messages WHERE queue = ? AND job_id = ? ORDER BY rowid", (queue, job_id)
        )
        return [json.loads(text) for (text,) in found]


def messages_of(row: Job) -> list[dict[str, Any]]:
    """A row holds one message, or `{"messages": [...]}`."""
    content = json.loads(row.payload or b"{}")
    return content["messages"] if content.keys() == {"messages"} else [content]


def key_of(queue: str, message: dict[str, Any]) -> str:
    return json.dumps([message[name] for name in KEYS[queue]])


class Validator:
    """Enqueues its jobs; then takes rows, records them and acknowledges them, in this order."""

    def __init__(
        self,
        connection: asyncpg.Connection,
        records: Records,
        jobs: Sequence[dict[str, Any]],
        abandoned_after: timedelta,
    ) -> None:
        self._connection = connection
        self._queries = Queries.from_asyncpg_connection(connection)
        self._records = records
        self._jobs = jobs
        self._abandoned_after = abandoned_after
        self._id = uuid.uuid4()
        self._last_row: int | None = None
        self.received = self.recorded = 0

    async def run(self) -> None:
        for job in self._jobs:
            await self._enqueue(job)
        while True:
            rows = await self._take()
            if rows:
                received, recorded = self._records.add(rows)
                self.received += received
                self.recorded += recorded
                # Killed before this line, the rows come again.
                await self._queries.log_jobs([(row, "successful", None) for row in rows])
            elif await self._is_complete():
                return
            else:
                await asyncio.sleep(POLL_SECONDS)

    async def _enqueue(self, job: dict[str, Any]) -> None:
        # Killed between the two, it is enqueued again, which is harmless: `job_id` says that it is the same.
        if not self._records.is_enqueued(job["job_id"]):
            await self._queries.enqueue("add_job", json.dumps(job).encode(), job.get("priority", 0))
            self._records.note_enqueued(job["job_id"])

    async def _take(self) -> list[Job]:
        """Rows that wait, and rows that a consumer took and has not acknowledged for too long."""
        return await self._queries.dequeue(
            batch_size=ROWS_AT_ONCE,
            entrypoints={queue: EntrypointExecutionParameter(concurrency_limit=0) for queue in KEYS},
            queue_manager_id=self._id,
            global_concurrency_limit=None,
            heartbeat_timeout=self._abandoned_after,
        )

    async def _is_complete(self) -> bool:
        """Whether every job has its result here, and everything that was queued by then is recorded, too."""
        if not all(self._records.of("eval_result", job["job_id"]) for job in self._jobs):
            return False
        if self._last_row is None:
            # A job's telemetry is queued before its result, its final status together with it.
            self._last_row = await self._connection.fetchval("SELECT coalesce(max(id), 0) FROM pgqueuer")
        left = await self._connection.fetchval(
            "SELECT count(*) FROM pgqueuer WHERE entrypoint = ANY($1) AND status <> 'failed' AND id <= $2",
            list(KEYS),
            self._last_row,
        )
        return bool(left == 0)


def summary(records: Records, job_id: int) -> str:
    (result,) = records.of("eval_result", job_id)
    episodes, steps = records.of("episode_data", job_id), records.of("episode_step_data", job_id)
    succeeded = sum(episode["success"] for episode in episodes)
    score = "no score" if result["score"] is None else f"score {result['score']:g}"
    counts = f"{len(episodes)} episodes ({succeeded} successful), {len(steps)} steps"
    reason = "" if result["error"] is None else f": {result['error'].splitlines()[0]}"
    return f"job {job_id} {result['status']}, {score}, {counts}{reason}"


def read_job(path: Path) -> dict[str, Any]:
    try:
        job = json.loads(path.read_bytes())
    except OSError as error:
        raise SystemExit(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise SystemExit(f"{path} is not JSON: {error}") from None
    if not isinstance(job, dict) or type(job.get("job_id")) is not int:
        raise SystemExit(f"{path} is no job: that is a JSON object with an integer `job_id`")
    return job


async def validate(options: argparse.Namespace) -> None:
    jobs = [read_job(path) for path in options.jobs]
    # With a large backlog, compiling the statement that takes rows would take longer than running it.
    connection = await asyncpg.connect(options.database_url, server_settings={"jit": "off"})
    started_at = time.monotonic()
    with closing(Records(options.records)) as records:
        validator = Validator(connection, records, jobs, timedelta(seconds=options.abandoned_after))
        try:
            async with asyncio.timeout(options.timeout):
                await validator.run()
        except TimeoutError:
            raise SystemExit(f"not all is here after {options.timeout:g} s; start again to go on") from None
        finally:
            await connection.close()
        for job in jobs:
            print(summary(records, job["job_id"]))
        seconds = time.monotonic() - started_at
        again = validator.received - validator.recorded
        print(
            f"{validator.recorded} messages recorded in {seconds:.1f} s; {again} came again and were left out"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Enqueue jobs, and record all that comes of them once.")
    parser.add_argument("jobs", nargs="+", type=Path, metavar="JOB.json", help="an add_job message")
    parser.add_argument(
        "--database-url", required=True, help="where the control plane works: postgresql://..."
    )
    parser.add_argument(
        "--records", type=Path, default=Path("records.sqlite"), help="where to record; default: %(default)s"
    )
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="give up then; default: never")
    parser.add_argument(
        "--abandoned-after",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="take a row again that nobody has acknowledged for so long; default: %(default)s",
    )
    try:
        asyncio.run(validate(parser.parse_args()))
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise SystemExit(f"the database is away: {error}; start again to go on") from None


if __name__ == "__main__":
    main()
