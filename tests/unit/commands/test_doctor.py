"""`orchestrator doctor` as a person runs it."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest

from orchestrator import ray_session
from orchestrator.adapters.postgres.embedded import embedded_postgres
from orchestrator.adapters.postgres.pool import Database
from orchestrator.adapters.postgres.server_files import ServerFiles
from orchestrator.commands.doctor import report
from orchestrator.diagnosis.findings import Diagnosis, Finding, Leftover
from tests.conftest import run_in_own_loop
from tests.golden_texts import check_golden
from tests.in_process_cli import Ran, run_cli

DEAD = 2**22 + 1  # above any process number


def diagnoses() -> list[Diagnosis]:
    """A finding of each kind."""
    leftovers = [
        Leftover(f"the scratch directory /data/scratch/{number}", lambda: True) for number in range(12)
    ]
    return [
        Diagnosis("this machine", "python", Finding.ok("3.11.7")),
        Diagnosis(
            "this machine", "memory", Finding.attention("only 512.0 MiB available", "end other programs")
        ),
        Diagnosis(
            "Postgres", "database", Finding.broken("Postgres at db:5432/x cannot be reached", "check it")
        ),
        Diagnosis("leftovers", "ray sessions", Finding.ok("none")),
        Diagnosis("leftovers", "scratch", Finding.attention("12 directories", "clear them", leftovers)),
    ]


def test_the_report_has_a_line_for_each_check_and_what_to_do_below() -> None:
    check_golden("doctor", "report", "\n".join(report(diagnoses())))


def test_the_report_may_be_of_what_is_wrong_alone_and_in_plain_characters() -> None:
    check_golden("doctor", "report_wrong_plain", "\n".join(report(diagnoses(), only_wrong=True, plain=True)))


def test_the_report_says_so_where_nothing_is_wrong() -> None:
    fine = [one for one in diagnoses() if one.finding.state == "ok"]

    check_golden("doctor", "report_fine", "\n".join(report(fine)))
    assert list(report(fine, only_wrong=True)) == ["nothing is wrong: 2 looked at"]


# ---------------------------------------------------------------------------------------- the whole of it


@pytest.fixture
def data_dir(server_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data directory that the server's account can reach; sessions of others are out of sight."""
    directory = server_directory.with_name(f"doctor-{uuid4().hex}")
    sessions = directory / "tmp"
    sessions.mkdir(parents=True)
    directory.chmod(0o755)
    monkeypatch.setattr(ray_session, "PARENT", sessions)
    return directory


def doctor(*arguments: str | Path) -> tuple[Ran, dict[str, Any]]:
    """What it says as JSON, the checks by name."""
    ran = run_cli("doctor", "--json", *arguments)
    found = json.loads(ran.stdout)
    return ran, {one["name"]: one for one in found["checks"]} | {"cleared": found["cleared"]}


def seed_leftovers(data_dir: Path) -> list[Path]:
    """Something of a killed supervisor and of a killed command."""
    scratch = data_dir / "scratch" / "installation" / os.uname().nodename / f"1-{DEAD}-2"
    session = data_dir / "tmp" / f"{ray_session.PREFIX}dead"
    for directory in (scratch, session):
        directory.mkdir(parents=True)
    os.utime(session, (1e9, 1e9))
    return [scratch, session]


def test_leftovers_are_only_reported_without_fix_and_cleared_with_it(
    database: Database, data_dir: Path
) -> None:
    seeded = seed_leftovers(data_dir)
    options = ("--database-url", database.dsn, "--data-dir", data_dir)

    before, reported = doctor(*options)
    there = [path.exists() for path in seeded]
    after, cleared = doctor(*options, "--fix")

    assert before.code == 3
    assert [reported[name]["state"] for name in ("scratch", "ray sessions")] == ["attention", "attention"]
    assert reported["cleared"] == []
    assert there == [True, True]
    assert [path.exists() for path in seeded] == [False, False]
    assert [cleared[name]["state"] for name in ("scratch", "ray sessions")] == ["ok", "ok"]
    assert sorted(cleared["cleared"]) == [
        f"the Ray session {seeded[1]}",
        f"the scratch directory {seeded[0]}",
    ]
    assert after.stderr == "".join(f"orchestrator: cleared {what}\n" for what in cleared.pop("cleared"))
    assert [cleared[name]["state"] for name in ("ray", "database", "schema", "jobs")] == ["ok"] * 4
    expected = 0 if all(one["state"] == "ok" for one in cleared.values()) else 3  # the machine may be small
    assert after.code == expected


def test_a_killed_embedded_server_is_not_started_before_its_leftovers_are_cleared(data_dir: Path) -> None:
    files = ServerFiles(data_dir)
    run_in_own_loop(lambda: start_and_kill(files))

    _, found = doctor("--data-dir", data_dir)
    stale = (files.pgdata / "postmaster.pid").exists()
    _, cleared = doctor("--data-dir", data_dir, "--fix")

    assert found["embedded server"]["state"] == found["database"]["state"] == "attention"
    assert stale
    assert "schema" not in found
    assert cleared["embedded server"]["state"] == cleared["database"]["state"] == "ok"
    assert cleared["schema"]["what"].endswith("the next command brings it up to date")  # nothing was migrated
    assert not (files.pgdata / "postmaster.pid").exists()  # nothing was left running


async def start_and_kill(files: ServerFiles) -> None:
    """An embedded server whose guardian and postmaster are killed at once."""
    async with embedded_postgres(files.data_dir):
        state = files.read_state()
        assert state is not None
        killed = [psutil.Process(pid) for pid in (state.guardian_pid, state.pid)]
        for process in killed:
            process.send_signal(signal.SIGSTOP)
        children = killed[1].children(recursive=True)
        for process in [*killed, *children]:
            process.kill()
        psutil.wait_procs([*killed, *children], timeout=30)


# The command in a process of its own, with sessions of others out of its sight, too.
ASKING = """
import sys
from pathlib import Path
from orchestrator import ray_session
from orchestrator.cli import main
ray_session.PARENT = Path(sys.argv.pop(1))
main()
"""


@pytest.mark.parametrize(("answer", "agreed"), [("y", True), ("", False)])
def test_on_a_terminal_it_asks_before_it_clears(data_dir: Path, answer: str, agreed: bool) -> None:
    scratch, _ = seed_leftovers(data_dir)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", ASKING, str(data_dir / "tmp"), "doctor", "--data-dir", str(data_dir)]
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    ) as asking:
        os.close(theirs)
        asked = read_until(ours, "[y/N] ")
        there = scratch.exists()
        os.write(ours, f"{answer}\n".encode())
        rest = read_until(ours, None)
        code = asking.wait(120)
    os.close(ours)

    assert there
    assert f"- the scratch directory {scratch}\n" in asked
    assert (f"cleared the scratch directory {scratch}\n" in rest) == agreed
    assert scratch.exists() != agreed
    assert code == (0 if "nothing is wrong" in rest else 3)


def read_until(terminal: int, words: str | None) -> str:
    """What is shown up to these words, or to the end of the program."""
    seen = b""
    deadline = time.monotonic() + 120
    while words is None or words.encode() not in seen:
        assert time.monotonic() < deadline, seen.decode()
        if select.select([terminal], [], [], 1.0)[0]:
            try:
                seen += os.read(terminal, 65536)
            except OSError:  # the program has ended
                break
    return seen.decode().replace("\r\n", "\n")
