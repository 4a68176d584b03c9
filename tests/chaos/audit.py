"""What the database itself notes of writes, by triggers, and what it holds at the end."""

from __future__ import annotations

import json
from typing import TypeAlias

import asyncpg

from tests.chaos.history import EpisodeRow, History, Write

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

# An outcome names the epoch of who writes it; the job's own stands in `jobs`, in the same transaction.
TRIGGERS = """
CREATE TABLE chaos_writes (
    what text NOT NULL, job_id bigint NOT NULL, task_id text NOT NULL, episode_id integer NOT NULL,
    epoch integer NOT NULL, current integer NOT NULL, was_final boolean NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE FUNCTION chaos_note_outcome() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO chaos_writes
    SELECT 'outcome', NEW.job_id, NEW.task_id, NEW.episode_id, NEW.epoch, jobs.epoch, OLD.finished
    FROM jobs WHERE jobs.job_id = NEW.job_id;
    RETURN NULL;
END $$;
CREATE TRIGGER chaos_outcome AFTER UPDATE ON episodes FOR EACH ROW
    WHEN (NEW.finished AND (NEW.* IS DISTINCT FROM OLD.*)) EXECUTE FUNCTION chaos_note_outcome();

CREATE FUNCTION chaos_note_status() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO chaos_writes VALUES
        ('status', NEW.job_id, '', 0, NEW.epoch, greatest(NEW.epoch, OLD.epoch), OLD.finished_at IS NOT NULL);
    RETURN NULL;
END $$;
CREATE TRIGGER chaos_status AFTER UPDATE ON jobs FOR EACH ROW
    WHEN (NEW.status <> OLD.status OR NEW.epoch < OLD.epoch) EXECUTE FUNCTION chaos_note_status();

CREATE FUNCTION chaos_note_result() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO chaos_writes
    SELECT 'result', NEW.job_id, '', 0, jobs.epoch, jobs.epoch, TG_OP <> 'INSERT'
    FROM jobs WHERE jobs.job_id = NEW.job_id;
    RETURN NULL;
END $$;
CREATE TRIGGER chaos_result AFTER INSERT OR UPDATE OR DELETE ON results FOR EACH ROW
    EXECUTE FUNCTION chaos_note_result();
"""


async def read_into(history: History, connection: Connection) -> dict[int, list[tuple[str, int, int, int]]]:
    """Add what the database holds; the seeds of each job's episodes: (task, episode, seed, policy seed)."""
    for row in await connection.fetch("SELECT job_id, status FROM jobs"):
        history.statuses[row["job_id"]] = row["status"]
    for row in await connection.fetch("SELECT job_id, message::text FROM results"):
        history.results[row["job_id"]] = json.loads(row["message"])
    seeds: dict[int, list[tuple[str, int, int, int]]] = {}
    rows = await connection.fetch(
        """SELECT *, extract(epoch FROM ended_at)::float8 AS ended_seconds FROM episodes
           ORDER BY job_id, ordinal"""
    )
    for row in rows:
        seeds.setdefault(row["job_id"], []).append(
            (row["task_id"], row["episode_id"], row["seed"], row["policy_seed"])
        )
        history.episodes.append(
            EpisodeRow(
                job_id=row["job_id"],
                task_id=row["task_id"],
                episode_id=row["episode_id"],
                finished=row["finished"],
                episode_return=row["episode_return"],
                steps=row["steps"],
                fault=row["fault"],
                ended_at=row["ended_seconds"],
            )
        )
    query = "SELECT *, extract(epoch FROM at)::float8 AS seconds FROM chaos_writes ORDER BY at"
    for row in await connection.fetch(query):
        history.writes.append(
            Write(
                row["what"],
                row["job_id"],
                row["task_id"],
                row["episode_id"],
                row["epoch"],
                row["current"],
                row["was_final"],
                row["seconds"],
            )
        )
    return seeds
