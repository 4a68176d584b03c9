"""What bad submissions come to: the words that a person reads, and a system that goes on.

All of them run side by side on one control plane, with good ones among them; the tests look at what came of
it.
"""

from __future__ import annotations

import asyncio
import io
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from orchestrator.adapters.postgres.pool import Database
from orchestrator.adapters.process.processes import ProcessIdentity, marked_processes
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.messages import EvalResultMessage
from orchestrator.evaluation import exit_code
from orchestrator.presentation import SUMMARY_COLUMNS, make_console, results_table
from tests.conftest import TEMPLATE_DATABASE, temporary_database
from tests.end_to_end.bad_submissions import (
    DISK_BYTES,
    GOOD_EPISODES,
    MAX_CONTAINERS,
    Submission,
    submissions,
)
from tests.end_to_end.conftest import Plane, running_plane
from tests.golden_texts import check_golden

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

AREA = "bad_submissions"
LOG_BYTES = 2**20
PATIENCE_SECONDS = 420.0
SHARED_CONFIG = {"seed": 5, "max_episode_steps": 20, "success_threshold": -1e6}


@dataclass
class Aftermath:
    """What was there when every job had its result, and the control plane still ran."""

    results: dict[str, EvalResultMessage] = field(default_factory=dict)
    episodes: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    times: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    episode_messages: list[dict[str, Any]] = field(default_factory=list)
    containers: int = -1
    files: list[Path] = field(default_factory=list)
    marked: list[ProcessIdentity] = field(default_factory=list)
    outliving: list[ProcessIdentity] = field(default_factory=list)
    log_bytes: int = 0  # of the one that prints a gigabyte, when it had done so

    def faults(self, name: str) -> dict[int, str]:
        """The class of each episode that has one."""
        return {row["episode_id"]: row["fault"] for row in self.episodes[name] if row["fault"]}

    def unfaulted(self, name: str) -> dict[int, tuple[float, int]]:
        """Return and steps of each episode that went well."""
        return {
            row["episode_id"]: (row["episode_return"], row["steps"])
            for row in self.episodes[name]
            if row["fault"] is None
        }


@pytest.fixture(scope="module")
def aftermath(
    ray_cluster: None, postgres_server: Database, migrated_template: Database
) -> Iterator[Aftermath]:
    scratch = Path(tempfile.mkdtemp(prefix="orc-bad-"))
    try:
        with (
            temporary_database(postgres_server, f"TEMPLATE {TEMPLATE_DATABASE}") as database,
            asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner,
        ):
            yield runner.run(run_all(database, scratch))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


async def run_all(database: Database, scratch: Path) -> Aftermath:
    notes = scratch / "notes"
    settings = {
        "max_concurrent_jobs": 4,
        "start_up_timeout_seconds": 40,
        "reset_timeout_seconds": 8,
        "max_containers_per_job": MAX_CONTAINERS,
        "container_disk_bytes": DISK_BYTES,
        "container_log_bytes": LOG_BYTES,
    }
    async with running_plane(database, scratch, **settings) as plane:
        jobs = {name: a_job(plane, name, each) for name, each in submissions(str(notes)).items()}
        await plane.submit(*jobs.values())
        seen = Aftermath()
        for name, job in jobs.items():
            seen.results[name] = await plane.result(job, PATIENCE_SECONDS)
            seen.episodes[name] = [dict(row) for row in await plane.episodes(job)]
        times = await plane.pool.fetch("SELECT job_id, claimed_at, finished_at FROM jobs")
        names = {job.job_id: name for name, job in jobs.items()}
        seen.times = {names[row["job_id"]]: (row["claimed_at"], row["finished_at"]) for row in times}
        seen.episode_messages = await plane.queued_messages("episode_data")
        seen.containers = await plane.pool.fetchval("SELECT count(*) FROM containers")
        owner = str(plane.recipe.installation.installation_id)
        seen.marked = [process for process, marker in marked_processes() if marker.startswith(owner)]
        seen.outliving = [ProcessIdentity(*map(int, line.split())) for line in notes.read_text().splitlines()]
        seen.log_bytes = int((scratch / "notes-log-bytes").read_text())
        seen.files = await files_that_stay(scratch / "containers")
    return seen


async def files_that_stay(directory: Path) -> list[Path]:
    """What is left there; a reconciler that looks for leftovers holds the lock of a container meanwhile."""
    until = time.monotonic() + 60
    while files := [path for path in directory.rglob("*") if path.is_file()]:
        if time.monotonic() > until:
            break
        await asyncio.sleep(0.1)
    return files


def a_job(plane: Plane, name: str, submission: Submission) -> Any:
    directory = plane.scratch / "submissions" / name
    directory.mkdir(parents=True)
    (directory / "agent.py").write_text(submission.source)
    config = SHARED_CONFIG | {"episodes_per_task": submission.episodes} | submission.config
    return plane.job(directory, "gymnasium/Pendulum-v1", config=config, **submission.fields)


def shown(result: EvalResultMessage) -> str:
    """What `orchestrator eval` prints of a result."""
    stream = io.StringIO()
    make_console(stream, columns=SUMMARY_COLUMNS).print(results_table([result]))
    return normalised(stream.getvalue())


def normalised(text: str) -> str:
    text = re.sub(r"^job \d+", "job ID", text, flags=re.MULTILINE)
    text = re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:PORT", text)
    text = re.sub(r"\d+ bytes of (\d+) allowed", r"N bytes of \1 allowed", text)
    text = re.sub(r"^ *[~^][~^ ]*\n", "", text, flags=re.MULTILINE)  # every Python draws other markers
    if "Fatal Python error" in text:
        text = without_frames_of_ours(text)
    return "".join(line.rstrip() + "\n" for line in text.splitlines())


def without_frames_of_ours(dump: str) -> str:
    """What Python's fault handler printed, with the frames of the submission alone."""
    dump = re.sub(r'"/[^"]*/submission/agent\.py"', '"agent.py"', dump)
    dump = re.sub(r"thread 0x[0-9a-f]+", "thread ID", dump)
    foreign = ('  File "/', '  File "<', "Thread 0x", "Extension modules")
    return "\n".join(line for line in dump.splitlines() if line and not line.startswith(foreign))


# ------------------------------------------------------------------------------- what never plays


@pytest.mark.parametrize(
    "name",
    [
        "syntax_error",
        "missing_class",
        "missing_package",
        "sys_exit",
        "exits_at_once",
        "never_opens_its_port",
        "refuses_the_key",
        "opens_too_late",
        "always_ends",
    ],
)
def test_a_submission_that_cannot_be_evaluated_fails_its_job_and_says_why(
    aftermath: Aftermath, name: str
) -> None:
    result = aftermath.results[name]

    assert result.status is JobStatus.FAILED
    assert result.score is None
    assert exit_code([result]) == 1  # the submission's fault, not ours
    check_golden(AREA, name, shown(result))


@pytest.mark.parametrize("name", ["opens_late", "silent_once"])
def test_a_submission_that_opens_late_or_in_a_second_container_is_evaluated(
    aftermath: Aftermath, name: str
) -> None:
    result = aftermath.results[name]

    assert (result.status, result.score, aftermath.faults(name)) == (JobStatus.COMPLETED, 1.0, {})


# --------------------------------------------------------------------------- what plays, and how

CASES = {
    "nan": ("actions", 1, "non_finite_action", 10),
    "infinity": ("actions", 3, "non_finite_action", 10),
    "wrong_shape": ("actions", 5, "invalid_action", 10),
    "wrong_dtype": ("actions", 7, "invalid_action", 10),
    "dtype_that_cannot_be_sent": ("actions", 9, "policy_exception", 10),
    "text_for_an_action": ("actions", 11, "invalid_action", 10),
    "exception_in_act": ("actions", 13, "policy_exception", 10),
    "exception_in_reset": ("actions", 15, "policy_exception", 0),
    "out_of_bounds": ("out_of_bounds", 1, "invalid_action", 10),
    "two_replies": ("replies", 1, "protocol_error", 11),
    "reply_to_an_earlier_request": ("replies", 3, "protocol_error", 10),
    "reply_of_one_gigabyte": ("replies", 5, "protocol_error", 10),
    "hang_up": ("replies", 7, "connection_lost", 10),
    "hang_in_act": ("hangs", 1, "step_timeout", 10),
    "hang_in_reset": ("hangs", 3, "step_timeout", 0),
    "reply_a_byte_at_a_time": ("hangs", 5, "step_timeout", 10),
    "exit_in_act": ("ends", 1, "crash", 10),
    "segmentation_fault": ("ends", 3, "crash", 10),
    "exit_0_in_act": ("ends", 5, "crash", 10),
    "memory": ("memory", 1, "out_of_memory", 10),
    "memory_of_children": ("memory", 3, "out_of_memory", 10),
    "disk_in_many_files": ("disk", 1, "out_of_disk", 10),
    "disk_in_one_file": ("disk", 3, "out_of_disk", 10),
    "exit_with_a_child_left": ("forks", 5, "crash", 10),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_fails_its_episode_and_is_said(aftermath: Aftermath, case: str) -> None:
    name, episode, fault, steps = CASES[case]

    row = aftermath.episodes[name][episode]

    assert (row["fault"], row["success"], row["steps"]) == (fault, False, steps)
    check_golden(AREA, case, normalised(row["fault_detail"]))


@pytest.mark.parametrize("name", sorted({name for name, *_ in CASES.values()} | {"prints", "opens_late"}))
def test_the_other_episodes_of_the_job_are_unharmed(aftermath: Aftermath, name: str) -> None:
    faults = {episode: fault for owner, episode, fault, _ in CASES.values() if owner == name}
    good = aftermath.unfaulted("good")

    assert aftermath.results[name].status is JobStatus.COMPLETED
    assert aftermath.faults(name) == faults
    clipped = {17} if name == "actions" else set()
    compared = set(aftermath.unfaulted(name)) - clipped
    assert {episode: aftermath.unfaulted(name)[episode] for episode in compared} == {
        episode: good[episode] for episode in compared
    }


@pytest.mark.parametrize("name", ["actions", "replies", "hangs", "ends"])
def test_a_job_with_faults_shows_the_first_of_each_class(aftermath: Aftermath, name: str) -> None:
    result = aftermath.results[name]

    assert exit_code([result]) == 0
    check_golden(AREA, f"job_{name}", shown(result))


def test_a_clipped_action_is_counted_wherever_the_episode_is_told_of(aftermath: Aftermath) -> None:
    result, rows = aftermath.results["actions"], aftermath.episodes["actions"]
    (message,) = [
        message["extra_metrics"]["clipped_actions"]
        for message in aftermath.episode_messages
        if (message["job_id"], message["episode_id"]) == (result.job_id, 17)
    ]

    assert result.extra_data is not None
    summaries = [result.extra_data["overall"], *result.extra_data["tasks"]]
    assert [(one["clipped_actions"], one["clipped_episodes"]) for one in summaries] == [(1, 1), (1, 1)]
    assert message == 1
    assert '"clipped_actions": 1.0' in rows[17]["metrics"]
    assert rows[17]["fault"] is None
    assert result.extra_data["out_of_bounds_actions"] == "clip"
    refused = aftermath.results["out_of_bounds"].extra_data
    assert refused is not None
    assert (refused["out_of_bounds_actions"], refused["overall"]["clipped_actions"]) == ("fault", 0)


def test_a_gigabyte_of_output_is_bounded(aftermath: Aftermath) -> None:
    result = aftermath.results["prints"]

    assert result.logs is not None
    assert len(result.logs.encode()) <= 16 * 1024
    assert "printed printed" in result.logs
    assert 0 < aftermath.log_bytes <= LOG_BYTES


# ------------------------------------------------------------------------------ the system goes on


def test_good_jobs_among_the_bad_ones_complete_alike(aftermath: Aftermath) -> None:
    results = [aftermath.results[name] for name in ("good", "good_at_the_end")]

    assert [(result.status, result.score) for result in results] == [(JobStatus.COMPLETED, 1.0)] * 2
    assert aftermath.unfaulted("good") == aftermath.unfaulted("good_at_the_end")
    assert len(aftermath.unfaulted("good")) == GOOD_EPISODES


@pytest.mark.parametrize("waiting", ["opens_too_late", "hangs"])
def test_a_submission_that_hangs_keeps_no_other_job_waiting(aftermath: Aftermath, waiting: str) -> None:
    began, ended = aftermath.times[waiting]

    meanwhile = [name for name, (start, end) in aftermath.times.items() if began < start and end < ended]

    assert len(meanwhile) >= 3


def test_no_process_of_a_submission_is_left(aftermath: Aftermath) -> None:
    assert len(aftermath.outliving) >= 3
    assert not [process for process in aftermath.outliving if process.alive]
    assert aftermath.marked == []


def test_no_container_is_left(aftermath: Aftermath) -> None:
    assert aftermath.containers == 0
    assert aftermath.files == []
