"""Telemetry into the database, against COPY of the same bytes; and the queue with a million rows in it."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias
from uuid import uuid4

import asyncpg
import numpy as np
import psutil
from pgqueuer import Queries
from pgqueuer.queries import EntrypointExecutionParameter

from bench.rounds import Case, Target
from orchestrator.adapters.postgres.embedded import embedded_postgres
from orchestrator.adapters.postgres.ledger import PostgresLedger
from orchestrator.adapters.postgres.migrate import migrate
from orchestrator.domain.episodes import CommitOutcome, FinishedEpisode
from orchestrator.domain.messages import EpisodeStepDataMessage
from tests.job_fixtures import a_store, claimed, finished, planned_runs

Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"

EPISODES, STEPS, AT_ONCE = 40, 500, 10
COPIED_AT_ONCE = 1000
QUEUED_ROWS = 1_000_000
DEQUEUES = 200
DEQUEUE_MILLISECONDS = 15.0
FILL = """
    INSERT INTO pgqueuer (priority, created, heartbeat, execute_after, status, entrypoint, payload)
    SELECT 0, now(), now(), now(), 'queued', 'episode_data', '{}' FROM generate_series(1, $1)
"""


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one way to store steps."""

    steps_per_second: float
    server_cpu_us: float  # a step
    wal_bytes: float  # a step


def measure(rounds: int) -> list[Case]:
    return asyncio.run(_measure(rounds))


async def _measure(rounds: int) -> list[Case]:
    rate = Case("durable step telemetry through the ledger", "steps/s", "COPY", Target(at_least=0.5))
    cpu = Case("server CPU a step", "µs", "COPY", Target(at_most=1.7))
    wal = Case("WAL a step", "bytes", "COPY", Target(at_most=1.25))
    queue = Case(f"dequeue of 10 with {QUEUED_ROWS:,} rows, p50", "ms", "15 ms", Target(at_most=1))
    async with _database() as pool:
        await pool.execute("CREATE TABLE plain (message bytea)")
        await _ledger_round(pool, 1)  # warm
        for number in range(2, rounds + 2):
            reference = await _copy_round(pool)
            measured = await _ledger_round(pool, number)
            rate.add(measured.steps_per_second, reference.steps_per_second)
            cpu.add(measured.server_cpu_us, reference.server_cpu_us)
            wal.add(measured.wal_bytes, reference.wal_bytes)
        await pool.execute("TRUNCATE pgqueuer")
        await pool.execute(FILL, QUEUED_ROWS, timeout=600)
        await pool.execute("ANALYZE pgqueuer", timeout=600)
        for _ in range(rounds):
            queue.add(await _dequeue_milliseconds(pool), DEQUEUE_MILLISECONDS)
    return [rate, cpu, wal, queue]


@asynccontextmanager
async def _database() -> Any:
    with tempfile.TemporaryDirectory(prefix="orc-bench-") as directory:
        Path(directory).chmod(0o755)
        async with embedded_postgres(Path(directory) / "data") as database:
            await migrate(database.dsn)
            # One connection, so that one server process does it all, and its CPU can be told.
            async with asyncpg.create_pool(database.dsn, min_size=1, max_size=1) as pool:
                yield pool


async def _ledger_round(pool: Pool, job_id: int) -> Cost:
    ledger = PostgresLedger(pool)
    claim = await claimed(a_store(pool, max_concurrent_jobs=1000), job_id)
    runs = await planned_runs(pool, claim, episodes=EPISODES)
    episodes = [_played(finished(run, steps=STEPS), job_id) for run in runs]

    async def commit() -> None:
        for start in range(0, EPISODES, AT_ONCE):
            outcomes = await ledger.commit(episodes[start : start + AT_ONCE])
            assert set(outcomes) == {CommitOutcome.COMMITTED}

    return await _cost(pool, commit)


async def _copy_round(pool: Pool) -> Cost:
    messages = [(message,) for message in _messages(1, 0, EPISODES * STEPS)]

    async def copy() -> None:
        for start in range(0, len(messages), COPIED_AT_ONCE):
            await pool.copy_records_to_table("plain", records=messages[start : start + COPIED_AT_ONCE])

    return await _cost(pool, copy)


def _played(episode: FinishedEpisode, job_id: int) -> FinishedEpisode:
    return replace(episode, step_messages=tuple(_messages(job_id, episode.run.episode_id, STEPS)))


def _messages(job_id: int, episode_id: int, count: int) -> list[bytes]:
    """Step messages as a worker makes them; no two are the same, so that they compress as real ones do."""
    chance = np.random.default_rng((job_id, episode_id))
    return [
        EpisodeStepDataMessage(
            job_id=job_id,
            env_name="CartPole-v1",
            benchmark_name="CartPole-v1",
            submission_id="submission",
            task_id="CartPole-v1",
            episode_id=episode_id,
            step=step,
            action={"type": "float32", "value": chance.random(4, np.float32).tolist(), "shape": [4]},
            reward=chance.random(),
            done=False,
            truncated=False,
            step_timestamp=datetime.now(UTC),
        ).to_json()
        for step in range(count)
    ]


async def _cost(pool: Pool, store: Callable[[], Coroutine[Any, Any, None]]) -> Cost:
    server = psutil.Process(await pool.fetchval("SELECT pg_backend_pid()"))
    cpu, wal = sum(server.cpu_times()[:2]), await _wal_position(pool)
    began = time.perf_counter()
    await store()
    seconds = time.perf_counter() - began
    steps = EPISODES * STEPS
    return Cost(
        steps / seconds,
        (sum(server.cpu_times()[:2]) - cpu) / steps * 1e6,
        (await _wal_position(pool) - wal) / steps,
    )


async def _wal_position(pool: Pool) -> int:
    return int(await pool.fetchval("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn"))


async def _dequeue_milliseconds(pool: Pool) -> float:
    taken = []
    async with pool.acquire() as connection:
        queries = Queries.from_asyncpg_connection(connection)  # type: ignore[arg-type]  # a pool's proxy
        manager = uuid4()
        for _ in range(DEQUEUES):
            began = time.perf_counter()
            rows = await queries.dequeue(
                batch_size=10,
                entrypoints={"episode_data": EntrypointExecutionParameter(concurrency_limit=0)},
                queue_manager_id=manager,
                global_concurrency_limit=None,
                heartbeat_timeout=timedelta(seconds=30),
            )
            taken.append(time.perf_counter() - began)
            assert len(rows) == 10
    return median(taken) * 1000
