"""What `submit`, `consume` and `eval` say of input that they cannot use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from orchestrator.adapters.postgres.pool import Database, open_connection
from tests.command_line import run_command_line
from tests.conftest import execute, run_in_own_loop
from tests.golden_texts import check_golden

if TYPE_CHECKING:
    from tests.command_line import CommandRun

JOB = {"job_id": 5, "env_provider": "gymnasium", "benchmark_name": "CartPole-v1"}


def run(database: Database, *arguments: object, stdin: bytes = b"") -> CommandRun:
    return run_command_line(*arguments, "--database-url", database.dsn, stdin=stdin)


def check(case: str, done: CommandRun, database: Database) -> None:
    check_golden("bad_input", case, done.transcript.replace(database.dsn, "postgresql://..."))


async def rows(database: Database, table: str) -> int:
    async with open_connection(database.dsn) as connection:
        return int(await connection.fetchval(f"SELECT count(*) FROM {table}"))


def rows_of(database: Database, table: str) -> int:
    return run_in_own_loop(lambda: rows(database, table))


@pytest.mark.parametrize(
    ("case", "payload"),
    [
        ("submit_nothing", b""),
        ("submit_no_json", b"job_id: 5\n"),
        ("submit_cut_short", b'{"job_id": 5, "env_provider": "gymn'),
        ("submit_no_object", json.dumps([JOB]).encode()),
        ("submit_missing_fields", b'{"env_provider": "gymnasium"}'),
        (
            "submit_several_problems",
            json.dumps(JOB | {"config": {"seed": -1}, "timeout_seconds": "soon"}).encode(),
        ),
        ("submit_job_id_as_text", json.dumps(JOB | {"job_id": "5"}).encode()),
        ("submit_nested_too_deeply", b'{"config": {"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}"),
        ("submit_too_long", json.dumps(JOB | {"tags": {"a": "x" * 2**20}}).encode()),
    ],
)
def test_a_job_that_cannot_be_submitted_is_refused_with_the_reason(
    database: Database, case: str, payload: bytes
) -> None:
    done = run(database, "submit", "-", stdin=payload)

    check(case, done, database)
    assert done.exit_code == 2
    assert rows_of(database, "jobs") == 0


def test_a_file_that_cannot_be_read_is_named(database: Database, tmp_path: Path) -> None:
    missing, directory = tmp_path / "job.json", tmp_path

    for case, path in (("submit_missing_file", missing), ("submit_directory", directory)):
        done = run(database, "submit", path)
        shown = done.transcript.replace(str(missing), "/path/job.json").replace(str(directory), "/path")
        check_golden("bad_input", case, shown.replace(database.dsn, "postgresql://..."))
        assert done.exit_code == 2


def test_the_same_job_again_is_no_error_and_another_one_under_its_id_is(database: Database) -> None:
    submit = lambda **fields: run(database, "submit", "-", stdin=json.dumps(JOB | fields).encode())  # noqa: E731
    assert submit().exit_code == 0

    same, other = submit(), submit(benchmark_name="Acrobot-v1")

    check("submit_same_content", same, database)
    check("submit_other_content", other, database)
    assert (same.exit_code, other.exit_code, rows_of(database, "jobs")) == (0, 2, 1)


def test_a_job_without_an_id_gets_one(database: Database) -> None:
    done = run(
        database, "submit", "-", stdin=b'{"env_provider": "gymnasium", "benchmark_name": "CartPole-v1"}'
    )

    assert done.exit_code == 0
    assert int(done.stdout) > 0


@pytest.mark.parametrize(
    ("case", "name", "content"),
    [
        ("eval_not_an_archive", "policy.tar.gz", b"<html>Please log in</html>"),
        ("eval_cut_short_at_once", "policy.tar.gz", b"\x1f\x8b\x08"),
        ("eval_of_a_script", "agent.py", b"class Agent: ..."),
        ("eval_directory_without_agent", "policy/main.txt", b""),
        ("eval_missing", None, b""),
    ],
)
def test_what_is_no_submission_is_refused_before_anything_starts(
    tmp_path: Path, case: str, name: str | None, content: bytes
) -> None:
    path = tmp_path / (name or "policy.tar.gz")
    if name is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    submission = path.parent if path.parent != tmp_path else path

    done = run_command_line(
        "eval", submission, "-b", "gymnasium/CartPole-v1", "--data-dir", tmp_path / "data"
    )

    check_golden("bad_archives", case, done.transcript.replace(str(tmp_path), "/path"))
    assert done.exit_code == 2
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("case", "arguments"),
    [
        ("consume_unknown_queue", ("eval_results",)),
        ("consume_add_job", ("add_job",)),
        ("consume_no_limit", ("eval_result", "--limit", "0")),
    ],
)
def test_a_queue_that_cannot_be_consumed_is_refused_with_those_that_can(
    database: Database, case: str, arguments: tuple[Any, ...]
) -> None:
    done = run(database, "consume", *arguments)

    check(case, done, database)
    assert done.exit_code == 2


@pytest.mark.parametrize(("case", "payload"), [("consume_no_json", "not json"), ("consume_no_object", "[1]")])
def test_a_row_that_is_no_message_stays_and_the_next_run_goes_on_behind_it(
    database: Database, case: str, payload: str
) -> None:
    columns = "INSERT INTO pgqueuer (priority, status, entrypoint, payload)"
    values = [f"VALUES (0, 'queued', 'eval_result', '{text}')" for text in (payload, '{"job_id": 1}')]
    run_in_own_loop(lambda: execute(database, *(f"{columns} {value}" for value in values)))

    done = run(database, "consume", "eval_result")
    next_run = run(database, "consume", "eval_result")

    check(case, done, database)
    assert done.exit_code == 3
    assert json.loads(next_run.stdout) == {"job_id": 1}
    assert rows_of(database, "pgqueuer") == 1


def test_a_reader_that_has_enough_is_no_error_and_what_it_did_not_read_stays(database: Database) -> None:
    long = "convert_to(json_build_object('a', repeat('x', 1000000))::text, 'UTF8')"
    columns = "INSERT INTO pgqueuer (priority, status, entrypoint, payload)"
    run_in_own_loop(lambda: execute(database, f"{columns} VALUES (0, 'queued', 'eval_result', {long})"))
    command = [sys.executable, "-m", "orchestrator.cli", "consume", "eval_result"]

    with subprocess.Popen(
        [*command, "--database-url", database.dsn], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as done:
        assert done.stdout is not None
        done.stdout.read(10)
        done.stdout.close()
        assert done.stderr is not None
        said = done.stderr.read()

    assert (done.wait(), said) == (0, b"")
    assert rows_of(database, "pgqueuer") == 1
