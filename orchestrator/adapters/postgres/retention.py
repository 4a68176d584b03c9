"""What is dropped because nobody took it, or because it has served: a few rows at a time, never waiting.

Producers and consumers are not held up: a batch is a transaction of its own, and passes over locked rows.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from typing import Any

import asyncpg
from pgqueuer.domain.settings import db_settings

from orchestrator.domain.messages import (
    QUEUE_ADD_JOB,
    QUEUE_EPISODE,
    QUEUE_RESULT,
    QUEUE_STATUS,
    QUEUE_STEP,
)

BATCH_ROWS = 10_000
LOG_AGE_SECONDS = 86_400.0
# The job's rows in `results` and `jobs` say how it ended, so that its status updates are telemetry, too.
TELEMETRY_QUEUES = (QUEUE_STATUS, QUEUE_EPISODE, QUEUE_STEP)


class Pruned(StrEnum):
    """What rows are dropped of."""

    STATUS_UPDATES = QUEUE_STATUS
    EPISODES = QUEUE_EPISODE
    STEPS = QUEUE_STEP
    HELD_JOBS = "add_job_held"
    RESULTS = QUEUE_RESULT
    QUEUE_LOG = "queue_log"
    EPISODE_PARTS = "episode_parts"
    ACTION_TRACES = "action_traces"


@dataclass(frozen=True, slots=True)
class RetentionRules:
    """How long and how much is kept. None keeps for ever."""

    age_seconds: float
    rows_per_queue: int
    results_age_seconds: float | None = None  # of queued results; the table `results` keeps them all
    traces_age_seconds: float | None = None  # of recorded actions, since the end of their job


@dataclass(frozen=True, slots=True)
class _Target:
    """Rows of one table: those for which `condition` holds of the alias `x`, the oldest first."""

    what: Pruned
    table: str
    key: str
    condition: str
    arguments: tuple[Any, ...] = ()

    @property
    def count(self) -> str:
        return f"SELECT count(*) FROM {self.table} x WHERE {self.condition}"  # noqa: S608 - all words are ours

    @property
    def delete(self) -> str:
        return f"""DELETE FROM {self.table} WHERE ({self.key}) IN (
                SELECT {self.key} FROM {self.table} x WHERE {self.condition}
                ORDER BY {self.key} LIMIT {BATCH_ROWS} FOR UPDATE SKIP LOCKED)"""  # noqa: S608


@dataclass(frozen=True)
class Retention:
    """Drops what the rules do not keep. A job and its result are always kept, and so is what was picked."""

    pool: asyncpg.Pool[asyncpg.Record] = field(repr=False)

    async def prune(
        self,
        rules: RetentionRules,
        *,
        only: Pruned | None = None,
        dry_run: bool = False,
        patience_seconds: float | None = None,
    ) -> dict[Pruned, int]:
        """How many rows were dropped of each (`dry_run`: would be), or of `only` one.

        After `patience_seconds` the rest is left to the next call.
        """
        until = None if patience_seconds is None else time.monotonic() + patience_seconds
        dropped: dict[Pruned, int] = {}
        async for target in self._targets(rules, only):
            if dry_run:
                dropped[target.what] = await self.pool.fetchval(target.count, *target.arguments)
            else:
                dropped[target.what] = await self._delete(target, until)
        if rules.traces_age_seconds is not None and only in (None, Pruned.ACTION_TRACES):
            age = timedelta(seconds=rules.traces_age_seconds)
            dropped[Pruned.ACTION_TRACES] = await self._drop_traces(age, dry_run=dry_run)
        return dropped

    async def _delete(self, target: _Target, until: float | None) -> int:
        deleted = 0
        while until is None or time.monotonic() < until:
            tag = await self.pool.execute(target.delete, *target.arguments)
            batch = int(tag.split()[-1])
            deleted += batch
            if batch < BATCH_ROWS:
                break
        return deleted

    async def _targets(self, rules: RetentionRules, only: Pruned | None) -> AsyncIterator[_Target]:
        for queue in TELEMETRY_QUEUES:
            if only in (None, Pruned(queue)):
                yield await self._unconsumed(Pruned(queue), queue, ("queued", "failed"), "created", rules)
        if only in (None, Pruned.HELD_JOBS):
            yield await self._unconsumed(Pruned.HELD_JOBS, QUEUE_ADD_JOB, ("failed",), "updated", rules)
        if rules.results_age_seconds is not None and only in (None, Pruned.RESULTS):
            yield _stored_results(timedelta(seconds=rules.results_age_seconds))
        if only in (None, Pruned.QUEUE_LOG):
            yield _queue_log(timedelta(seconds=min(rules.age_seconds, LOG_AGE_SECONDS)))
        if only in (None, Pruned.EPISODE_PARTS):
            yield _void_parts()

    async def _unconsumed(
        self, what: Pruned, queue: str, states: tuple[str, ...], since: str, rules: RetentionRules
    ) -> _Target:
        """Rows of a queue that are too old since a time of theirs, or that too many newer ones follow."""
        table = db_settings().qualified.queue_table
        oldest_kept = await self.pool.fetchval(
            f"""SELECT id FROM {table} WHERE entrypoint = $1 AND status::text = ANY($2)
                ORDER BY id DESC OFFSET $3 LIMIT 1""",  # noqa: S608 - a name of pgqueuer's settings
            queue,
            states,
            rules.rows_per_queue - 1,
        )
        return _Target(
            what,
            table,
            "id",
            f"""entrypoint = $1 AND status::text = ANY($2)
                AND ({since} < clock_timestamp() - $3::interval OR id < $4)""",
            (queue, states, timedelta(seconds=rules.age_seconds), oldest_kept or 0),
        )

    async def _drop_traces(self, age: timedelta, *, dry_run: bool) -> int:
        """Forget the recorded actions of jobs that ended long ago; their hashes stay. Job by job."""
        rows = await self.pool.fetch(
            """SELECT e.job_id, count(*) AS traces FROM episodes e JOIN jobs j USING (job_id)
               WHERE j.finished_at < clock_timestamp() - $1::interval AND e.action_trace IS NOT NULL
               GROUP BY e.job_id ORDER BY e.job_id""",
            age,
        )
        if not dry_run:
            for row in rows:
                await self.pool.execute(
                    "UPDATE episodes SET action_trace = NULL WHERE job_id = $1 AND action_trace IS NOT NULL",
                    row["job_id"],
                )
        return sum(row["traces"] for row in rows)


def _stored_results(age: timedelta) -> _Target:
    """Queued results that nobody consumed, of which the table `results` has the same."""
    condition = """entrypoint = $1 AND status IN ('queued', 'failed')
        AND created < clock_timestamp() - $2::interval
        AND EXISTS (SELECT FROM results r WHERE r.job_id = orchestrator_payload_job_id(x.payload))"""
    table = db_settings().qualified.queue_table
    return _Target(Pruned.RESULTS, table, "id", condition, (QUEUE_RESULT, age))


def _queue_log(age: timedelta) -> _Target:
    """pgqueuer's log, which it never prunes itself; not the lines that say why a row is held."""
    names = db_settings().qualified
    condition = f"""created < clock_timestamp() - $1::interval AND NOT EXISTS (
        SELECT FROM {names.queue_table} q WHERE q.id = x.job_id AND q.status = 'failed')"""
    return _Target(Pruned.QUEUE_LOG, names.queue_table_log, "id", condition, (age,))


def _void_parts() -> _Target:
    """Staged steps that can never be published: of a run that a later one replaced, or beside an outcome."""
    condition = """EXISTS (SELECT FROM episodes e WHERE e.job_id = x.job_id AND e.task_id = x.task_id
        AND e.episode_id = x.episode_id AND (e.finished OR e.run > x.run))"""
    return _Target(Pruned.EPISODE_PARTS, "episode_parts", "job_id, task_id, episode_id, run, part", condition)
