"""`orchestrator prune` as an operator sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from orchestrator.adapters.postgres.pool import Database
from tests.command_line import run_command_line
from tests.conftest import execute, run_in_own_loop
from tests.golden_texts import check_golden

if TYPE_CHECKING:
    from tests.command_line import CommandRun

ROWS = """
    INSERT INTO pgqueuer (priority, status, entrypoint, payload, created, updated)
    SELECT 0, status::pgqueuer_status, queue, '{"job_id": 1}', now() - age::interval, now() - age::interval
    FROM (VALUES
        ('episode_data', 'queued', '8 days', 3), ('episode_data', 'queued', '2 days', 4),
        ('episode_step_data', 'queued', '8 days', 20), ('job_status_update', 'queued', '8 days', 2),
        ('add_job', 'failed', '8 days', 1), ('add_job', 'queued', '8 days', 1),
        ('eval_result', 'queued', '40 days', 1)
    ) AS rows (queue, status, age, count), generate_series(1, count)"""
FINISHED_JOB = """
    INSERT INTO jobs (job_id, message, status, finished_at)
    VALUES (1, '{}', 'COMPLETED', now() - interval '40 days')"""
RESULT = "INSERT INTO results (job_id, message) VALUES (1, '{}')"
EPISODE = """
    INSERT INTO episodes (job_id, task_id, episode_id, ordinal, seed, policy_seed, run, finished, epoch,
        episode_return, steps, success, action_trace, action_trace_sha256)
    VALUES (1, 'reach', 0, 0, 1, 1, 1, true, 1, 0, 1, false, 'trace', 'hash')"""


@pytest.fixture
def filled(database: Database) -> Database:
    """A database with old rows of every kind."""
    run_in_own_loop(lambda: execute(database, ROWS, FINISHED_JOB, RESULT, EPISODE))
    return database


def prune(database: Database, *arguments: str) -> CommandRun:
    return run_command_line("prune", *arguments, "--database-url", database.dsn)


def check(case: str, run: CommandRun, database: Database) -> None:
    check_golden("prune", case, run.transcript.replace(database.dsn, "postgresql://..."))


@pytest.mark.parametrize(
    ("case", "arguments"),
    [
        ("as_set", ()),
        ("stricter", ("--older-than", "1d")),
        ("dry_run", ("--dry-run",)),
        ("one_second", ("--older-than", "1s")),
        ("json", ("--json",)),
        ("one_queue", ("--queue", "episode_data", "--older-than", "12h")),
        ("held_rows", ("--queue", "add_job")),
        ("results_and_traces", ("--results-older-than", "30d", "--traces-older-than", "4w")),
    ],
)
def test_it_says_what_went_and_drops_just_that(
    filled: Database, case: str, arguments: tuple[str, ...]
) -> None:
    done = prune(filled, *arguments)

    check(case, done, filled)
    assert done.exit_code == 0
    again = prune(filled, *arguments)
    assert ("dropped 0 rows" in again.stderr) == (case != "dry_run")


@pytest.mark.parametrize(
    ("case", "arguments"),
    [
        ("unknown_queue", ("--queue", "episodes")),
        ("results_need_an_age", ("--queue", "eval_result")),
        ("no_unit", ("--older-than", "7")),
        ("no_time_at_all", ("--older-than", "0d")),
        ("longer_than_anything", ("--older-than", "999999999w")),
    ],
)
def test_what_cannot_be_meant_is_refused_with_what_to_write(
    filled: Database, case: str, arguments: tuple[str, ...]
) -> None:
    done = prune(filled, *arguments)

    check(case, done, filled)
    assert done.exit_code == 2
