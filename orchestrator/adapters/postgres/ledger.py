"""The ledger of episodes in Postgres: the plan, the runs handed out, outcomes committed with telemetry."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import asyncpg

from orchestrator.adapters.postgres.fence import Connection, check_epoch, exclusively, shared, storable
from orchestrator.adapters.postgres.queue import TelemetryRows, enqueue_telemetry
from orchestrator.domain.episodes import (
    CommitOutcome,
    EpisodeKey,
    EpisodeOutcome,
    EpisodeRun,
    FaultClass,
    FinishedEpisode,
    PlannedEpisode,
)
from orchestrator.ports import Claim

RowKey = tuple[int, str, int]

# Rows are locked in key order, so that two writers never wait for each other in a circle.
LOCK_EPISODES = """
    SELECT e.job_id, e.task_id, e.episode_id, e.run, e.finished
    FROM episodes e
    JOIN unnest($1::bigint[], $2::text[], $3::int[]) AS wanted (job_id, task_id, episode_id)
        USING (job_id, task_id, episode_id)
    ORDER BY e.job_id, e.task_id, e.episode_id
    FOR UPDATE OF e"""

OUTCOME_FIELDS = tuple(each.name for each in fields(EpisodeOutcome))
# In `metrics` beside others, where it is not zero.
CLIPPED_ACTIONS = "coalesce((metrics ->> 'clipped_actions')::double precision, 0)::integer AS clipped_actions"
EPISODE_OUTCOME = ", ".join(CLIPPED_ACTIONS if name == "clipped_actions" else name for name in OUTCOME_FIELDS)

WRITE_OUTCOME = """
    UPDATE episodes SET finished = true, epoch = $4, episode_return = $5, steps = $6, success = $7,
        terminated = $8, truncated = $9, fault = $10, fault_detail = $11, started_at = $12, ended_at = $13,
        action_trace = $14, action_trace_sha256 = $15, metrics = $16::jsonb
    WHERE job_id = $1 AND task_id = $2 AND episode_id = $3 AND NOT finished"""


@dataclass(frozen=True)
class PostgresLedger:
    """`ports.Ledger` on a pool."""

    pool: asyncpg.Pool = field(repr=False)
    rows: TelemetryRows = field(default_factory=TelemetryRows)

    async def store_plan(self, claim: Claim, episodes: Sequence[PlannedEpisode]) -> None:
        """Write the plan, once: a plan that is there stays as it is."""
        job_id = claim.job.job_id
        async with exclusively(self.pool, job_id) as connection:
            await check_epoch(connection, claim, for_update=True)
            if await connection.fetchval("SELECT EXISTS (SELECT FROM episodes WHERE job_id = $1)", job_id):
                return
            await connection.copy_records_to_table(
                "episodes",
                columns=["job_id", "task_id", "episode_id", "ordinal", "seed", "policy_seed"],
                records=[
                    (job_id, episode.task_id, episode.episode_id, ordinal, episode.seed, episode.policy_seed)
                    for ordinal, episode in enumerate(episodes)
                ],
            )
            tasks = list(dict.fromkeys(episode.task_id for episode in episodes))
            plan = {"tasks": tasks, "episodes": len(episodes)}
            await connection.execute(
                "UPDATE jobs SET plan = $2::jsonb WHERE job_id = $1", job_id, json.dumps(plan)
            )

    async def planned(self, job_id: int) -> list[PlannedEpisode]:
        """The whole plan in its order; empty before it was stored."""
        rows = await self.pool.fetch(
            "SELECT task_id, episode_id, seed, policy_seed FROM episodes WHERE job_id = $1 ORDER BY ordinal",
            job_id,
        )
        return [PlannedEpisode(*row) for row in rows]

    async def missing(self, job_id: int) -> list[PlannedEpisode]:
        """The planned episodes that have no outcome, in the plan's order."""
        rows = await self.pool.fetch(
            """SELECT task_id, episode_id, seed, policy_seed FROM episodes
               WHERE job_id = $1 AND NOT finished ORDER BY ordinal""",
            job_id,
        )
        return [PlannedEpisode(*row) for row in rows]

    async def assign(self, claim: Claim, keys: Sequence[EpisodeKey]) -> list[EpisodeRun]:
        """Raise the run of each episode that has no outcome, and return those runs; committed on return.

        Raises:
            Fenced: another epoch is current.
        """
        job_id = claim.job.job_id
        async with shared(self.pool, [job_id]) as connection:
            await check_epoch(connection, claim)
            locked = await _lock(connection, [(job_id, key.task_id, key.episode_id) for key in keys])
            free = [row for row, (_, finished) in locked.items() if not finished]
            rows = await connection.fetch(
                """UPDATE episodes e SET run = run + 1
                   FROM unnest($1::bigint[], $2::text[], $3::int[]) AS wanted (job_id, task_id, episode_id)
                   WHERE e.job_id = wanted.job_id AND e.task_id = wanted.task_id
                     AND e.episode_id = wanted.episode_id AND NOT e.finished
                   RETURNING e.task_id, e.episode_id, e.run, e.seed, e.policy_seed, e.ordinal""",
                *_columns(free),
            )
        return [
            EpisodeRun(
                job_id=job_id,
                epoch=claim.epoch,
                run=row["run"],
                task_id=row["task_id"],
                episode_id=row["episode_id"],
                seed=row["seed"],
                policy_seed=row["policy_seed"],
            )
            for row in sorted(rows, key=lambda row: row["ordinal"])
        ]

    async def commit(self, finished: Sequence[FinishedEpisode]) -> list[CommitOutcome]:
        """Commit what is current, with its telemetry, in one transaction; one answer for each, in order."""
        async with shared(self.pool, (episode.run.job_id for episode in finished)) as connection:
            epochs = await _current_epochs(connection, {episode.run.job_id for episode in finished})
            locked = await _lock(connection, [_row_key(episode.run) for episode in finished])
            answers: list[CommitOutcome] = []
            fresh: list[FinishedEpisode] = []
            for episode in finished:
                answer = _decide(episode.run, epochs, locked)
                answers.append(answer)
                if answer is CommitOutcome.COMMITTED:
                    # The same run twice in one batch: the second finds it finished.
                    locked[_row_key(episode.run)] = (episode.run.run, True)
                    fresh.append(episode)
            if fresh:
                await self._write(connection, fresh)
        return answers

    async def _write(self, connection: Connection, fresh: Sequence[FinishedEpisode]) -> None:
        await connection.executemany(WRITE_OUTCOME, [_outcome_values(episode) for episode in fresh])
        for episode in fresh:
            if episode.staged_parts:
                await self._enqueue_staged(connection, episode.run)
        await enqueue_telemetry(
            connection,
            self.rows,
            [episode.episode_message for episode in fresh],
            [message for episode in fresh for message in episode.step_messages],
        )

    async def _enqueue_staged(self, connection: Connection, run: EpisodeRun) -> None:
        """Queue the parts of the run that counts, one at a time; drop those of every other run."""
        key = (run.job_id, run.task_id, run.episode_id)
        parts = await connection.fetch(
            """SELECT part FROM episode_parts
               WHERE job_id = $1 AND task_id = $2 AND episode_id = $3 AND run = $4 ORDER BY part""",
            *key,
            run.run,
        )
        for row in parts:
            payload = await connection.fetchval(
                """SELECT payload FROM episode_parts
                   WHERE job_id = $1 AND task_id = $2 AND episode_id = $3 AND run = $4 AND part = $5""",
                *key,
                run.run,
                row["part"],
            )
            await enqueue_telemetry(connection, self.rows, [], bytes(payload).split(b"\n"))
        await connection.execute(
            "DELETE FROM episode_parts WHERE job_id = $1 AND task_id = $2 AND episode_id = $3", *key
        )

    async def stage_part(self, run: EpisodeRun, part: int, step_messages: Sequence[bytes]) -> bool:
        """Keep a part of a long episode until its outcome; False where the run is void. Idempotent."""
        async with shared(self.pool, [run.job_id]) as connection:
            epochs = await _current_epochs(connection, {run.job_id})
            locked = await _lock(connection, [_row_key(run)])
            if _decide(run, epochs, locked) is not CommitOutcome.COMMITTED:
                return False
            await connection.execute(
                """INSERT INTO episode_parts (job_id, task_id, episode_id, run, part, payload)
                   VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT DO NOTHING""",
                run.job_id,
                run.task_id,
                run.episode_id,
                run.run,
                part,
                b"\n".join(step_messages),  # JSON has no bare newline
            )
        return True

    async def outcomes(self, job_id: int) -> list[EpisodeOutcome]:
        """What has an outcome, in the plan's order."""
        async with self.pool.acquire() as connection:
            return await read_outcomes(connection, job_id)


async def read_outcomes(connection: Connection, job_id: int) -> list[EpisodeOutcome]:
    """The finished episodes of a job, as the caller's transaction sees them, in the plan's order."""
    rows = await connection.fetch(
        f"""SELECT {EPISODE_OUTCOME} FROM episodes
            WHERE job_id = $1 AND finished ORDER BY ordinal""",  # noqa: S608 - a constant
        job_id,
    )
    return [outcome_from_row(row) for row in rows]


def outcome_from_row(row: asyncpg.Record) -> EpisodeOutcome:
    """A row with the columns of `EPISODE_OUTCOME`, others besides, as the domain sees it."""
    values: dict[str, Any] = {name: row[name] for name in OUTCOME_FIELDS}
    values["fault"] = None if row["fault"] is None else FaultClass(row["fault"])
    return EpisodeOutcome(**values)


def _row_key(run: EpisodeRun) -> RowKey:
    return (run.job_id, run.task_id, run.episode_id)


def _columns(keys: Sequence[RowKey]) -> tuple[list[int], list[str], list[int]]:
    return [key[0] for key in keys], [key[1] for key in keys], [key[2] for key in keys]


async def _lock(connection: Connection, keys: Sequence[RowKey]) -> dict[RowKey, tuple[int, bool]]:
    """Lock the rows and return (current run, finished) of each that exists."""
    rows = await connection.fetch(LOCK_EPISODES, *_columns(sorted(set(keys))))
    return {(row["job_id"], row["task_id"], row["episode_id"]): (row["run"], row["finished"]) for row in rows}


async def _current_epochs(connection: Connection, job_ids: set[int]) -> dict[int, int]:
    """The epochs of the jobs that a supervisor holds; read after the shared locks were taken."""
    rows = await connection.fetch(
        "SELECT job_id, epoch FROM jobs WHERE job_id = ANY($1) AND status IN ('STARTING', 'RUNNING')",
        list(job_ids),
    )
    return {row["job_id"]: row["epoch"] for row in rows}


def _decide(run: EpisodeRun, epochs: dict[int, int], locked: dict[RowKey, tuple[int, bool]]) -> CommitOutcome:
    current_run, finished = locked.get(_row_key(run), (None, False))
    if finished:
        # A row's run no longer changes once it has an outcome, so an equal run is this very one.
        return CommitOutcome.ALREADY if current_run == run.run else CommitOutcome.STALE
    if epochs.get(run.job_id) != run.epoch or current_run != run.run:
        return CommitOutcome.STALE
    return CommitOutcome.COMMITTED


def _outcome_values(episode: FinishedEpisode) -> tuple[Any, ...]:
    run = episode.run
    return (
        run.job_id,
        run.task_id,
        run.episode_id,
        run.epoch,
        episode.episode_return,
        episode.steps,
        episode.success,
        episode.terminated,
        episode.truncated,
        None if episode.fault is None else episode.fault.value,
        storable(episode.fault_detail),
        episode.started_at,
        episode.ended_at,
        episode.action_trace,
        episode.action_trace_sha256,
        json.dumps(episode.metrics),
    )
