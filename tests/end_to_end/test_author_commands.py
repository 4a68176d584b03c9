"""`orchestrator submission`, as an author types it: exit codes, streams, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from orchestrator.adapters.artifacts.pack import pack_directory
from orchestrator.authoring.containers import SCRATCH_PREFIX
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.messages import EvalJobMessage
from tests.end_to_end.command_processes import ORCHESTRATOR, environment, orchestrator, start, wait_until
from tests.end_to_end.conftest import EXAMPLES, Plane
from tests.golden_texts import check_golden
from tests.policy_processes import running, running_policy_server

CARTPOLE = ("--benchmark", "gymnasium/CartPole-v1")

HANGING_AGENT = """
import pathlib, time


class Agent:
    def act(self, observation):
        pathlib.Path({file!r}).touch()
        time.sleep(1000)
"""

AGENT_WITHOUT_RESET = """
class Agent:
    step = 0

    def act(self, observation):
        self.step += 1
        return (self.step + self.step // 7) % 2
"""


def left_by(command: subprocess.Popen[bytes]) -> list[str]:
    """What there is of a check: its scratch directory, and the processes that name it."""
    prefix = f"{SCRATCH_PREFIX}{command.pid}-"
    left = [str(path) for path in Path(tempfile.gettempdir()).glob(f"{prefix}*")]
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(prefix in argument for argument in process.cmdline()):
                left.append(str(process))
    return left


@pytest.fixture
def hanging_check(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A check whose policy hangs at its first step, and what it printed."""
    directory, reached, log = tmp_path / "hanging", tmp_path / "reached", tmp_path / "log"
    directory.mkdir()
    (directory / "agent.py").write_text(HANGING_AGENT.format(file=str(reached)))
    command = start("submission", "check", directory, *CARTPOLE, log=log)
    wait_until(reached.exists, "the policy at its first step")
    yield command, log
    if command.poll() is None:
        command.kill()
        command.wait(30)


def test_a_first_submission_is_written_checked_and_right(tmp_path: Path) -> None:
    directory = tmp_path / "my policy"

    written = orchestrator("submission", "init", directory)
    checked = orchestrator("submission", "check", directory, *CARTPOLE)

    assert (written.returncode, checked.returncode) == (0, 0), written.stderr + checked.stderr
    assert f"orchestrator submission check '{directory}' --benchmark gymnasium/CartPole-v1" in written.stdout
    assert "returns 500, 500; 2 of 2 successful" in checked.stdout
    assert checked.stdout.endswith("\nok\n")
    assert checked.stderr == ""


def test_an_archive_is_checked_as_it_is_and_a_machine_can_read_the_report(tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "agent.py").write_text("import torchh\n")
    archive = pack_directory(tmp_path / "bad", tmp_path).path

    done = orchestrator("submission", "check", archive, *CARTPOLE, "--json")

    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["verdict"] == "wrong"
    assert report["findings"][-1]["outcome"] == "wrong"
    assert "No module named 'torchh'" in report["findings"][-1]["detail"]


def test_a_server_of_its_own_keeps_every_rule_and_plays() -> None:
    """examples/cartpole_server is written from docs/protocol.md alone."""
    with running([str(EXAMPLES / "cartpole_server" / "main.py"), "--port", "0"]) as server:
        done = orchestrator("submission", "check", "--address", f"127.0.0.1:{server.port}", *CARTPOLE)

    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search("^  [-!✗]", done.stdout, re.MULTILINE)
    assert "returns 500, 500; 2 of 2 successful" in done.stdout


@pytest.mark.ray
async def test_a_server_of_its_own_is_evaluated(plane: Plane) -> None:
    with running([str(EXAMPLES / "cartpole_server" / "main.py"), "--port", "0"]) as server:
        job = EvalJobMessage(
            job_id=1,
            env_provider="gymnasium",
            benchmark_name="CartPole-v1",
            config={"episodes_per_task": 4, "seed": 7},
            artifact_url=f"ws://127.0.0.1:{server.port}",
            resources={"workers": 2},
        )
        result = await plane.evaluate(job)

    assert (result.status, result.score, result.error) == (JobStatus.COMPLETED, 1.0, None)


def test_a_server_whose_policy_forgets_nothing_is_found_out(tmp_path: Path) -> None:
    (tmp_path / "agent.py").write_text(AGENT_WITHOUT_RESET)
    with running_policy_server(tmp_path) as server:
        done = orchestrator("submission", "check", "--address", f"127.0.0.1:{server.port}", *CARTPOLE)

    assert done.returncode == 1, done.stderr
    assert "✗ same again: after the same reset" in done.stdout
    assert "✗ forgets: state is kept across episodes" in done.stdout


@pytest.mark.parametrize(
    ("case", "arguments"),
    [
        ("nothing", ("check",)),
        ("no_benchmark", ("check", str(EXAMPLES / "cartpole"))),
        ("two_subjects", ("check", str(EXAMPLES / "cartpole"), "--address", "localhost:1", *CARTPOLE)),
        ("no_address", ("check", "--address", "localhost")),
        ("no_submission", ("check", "nowhere", *CARTPOLE)),
        ("half_a_benchmark", ("check", str(EXAMPLES / "cartpole"), "--benchmark", "CartPole-v1")),
        ("unusable_config", ("check", str(EXAMPLES / "cartpole"), *CARTPOLE, "--config", "action_horizon=0")),
        ("not_empty", ("init", str(EXAMPLES / "cartpole"))),
    ],
)
def test_wrong_usage_ends_with_2_and_one_line_that_helps(case: str, arguments: tuple[str, ...]) -> None:
    done = orchestrator("submission", *arguments)

    assert done.returncode == 2
    assert done.stdout == ""
    check_golden("check", f"usage_{case}", done.stderr.replace(str(EXAMPLES), "EXAMPLES"))


def test_ctrl_c_ends_a_check_and_all_that_it_started(
    hanging_check: tuple[subprocess.Popen[bytes], Path],
) -> None:
    command, log = hanging_check

    os.killpg(command.pid, signal.SIGINT)

    assert command.wait(60) == 130, log.read_text()
    assert log.read_text().endswith("interrupted\n")
    assert left_by(command) == []


def test_ctrl_c_ends_the_check_of_a_server_that_hangs(tmp_path: Path) -> None:
    reached, log = tmp_path / "reached", tmp_path / "log"
    (tmp_path / "agent.py").write_text(HANGING_AGENT.format(file=str(reached)))
    with running_policy_server(tmp_path) as server:
        command = start("submission", "check", "--address", f"127.0.0.1:{server.port}", *CARTPOLE, log=log)
        wait_until(reached.exists, "the policy at its first step")
        pressed_at = time.monotonic()

        os.killpg(command.pid, signal.SIGINT)

        assert command.wait(60) == 130, log.read_text()
        assert time.monotonic() - pressed_at < 25  # the deadline of a step is 30 s
        assert "✗" not in log.read_text()


def test_the_submission_ends_with_a_check_that_is_killed(
    hanging_check: tuple[subprocess.Popen[bytes], Path],
) -> None:
    command, _ = hanging_check

    command.kill()
    command.wait(30)

    wait_until(lambda: len(left_by(command)) == 1, "the end of its processes", seconds=30)
    (scratch,) = left_by(command)  # for the next check to remove
    subprocess.run(
        [*ORCHESTRATOR, "submission", "check", str(EXAMPLES / "cartpole"), *CARTPOLE],
        env=environment(),
        check=True,
        capture_output=True,
        timeout=120,
    )
    assert not Path(scratch).exists()
