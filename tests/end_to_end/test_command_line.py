"""The commands as a person runs them: processes of their own, exit codes, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.adapters.artifacts.pack import pack_directory
from tests.end_to_end.command_processes import (
    PATIENCE_SECONDS,
    environment,
    kill_everything,
    orchestrator,
    processes_naming,
    ray_sessions,
    start,
    wait_until,
)
from tests.end_to_end.conftest import EXAMPLES, GatedSubmission
from tests.policy_processes import running_policy_server

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture
def data_dir(scratch: Path) -> Path:
    scratch.chmod(0o755)
    return scratch / "data"


@pytest.fixture
def nothing_left(data_dir: Path) -> Iterator[None]:
    """After the test no process, Ray session or scratch directory of its commands is there."""
    before = ray_sessions()
    yield
    wait_until(lambda: not processes_naming(str(data_dir)), "the end of every process", seconds=30)
    assert ray_sessions() <= before
    assert not list((data_dir / "scratch").rglob("*"))
    assert not [path for path in (data_dir / "containers").rglob("*") if path.is_file()]


def test_an_archive_is_evaluated_on_two_benchmarks_with_json_and_a_bundle(
    data_dir: Path, scratch: Path, nothing_left: None
) -> None:
    archive = scratch / "cartpole.tar.gz"
    pack_directory(EXAMPLES / "cartpole", scratch).path.rename(archive)
    benchmarks = ("-b", "gymnasium/CartPole-v1", "-b", "gymnasium/CartPole-v0")
    options = ("--episodes", "3", "--workers", "2", "--seed", "7", "--json", "--output", scratch / "bundle")

    done = orchestrator("eval", archive, *benchmarks, *options, "--data-dir", data_dir)

    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert [(result["benchmark_name"], result["score"]) for result in results] == [
        ("CartPole-v1", 1.0),
        ("CartPole-v0", 1.0),
    ]
    assert len((scratch / "bundle" / "episodes.jsonl").read_text().splitlines()) == 6


def test_ctrl_c_ends_with_130_and_leaves_nothing(
    data_dir: Path, scratch: Path, gated: GatedSubmission, nothing_left: None
) -> None:
    log = scratch / "log"
    command = start("eval", gated.directory, "-b", "gymnasium/CartPole-v1", "--data-dir", data_dir, log=log)
    wait_until((gated.gate / "reached").exists, "the policy at its gate")

    os.killpg(command.pid, signal.SIGINT)  # as a terminal does: to the whole foreground group

    assert command.wait(PATIENCE_SECONDS) == 130, log.read_text()
    assert "Traceback" not in log.read_text()


TAKES_SIGTERM_BESIDE_RAY = """
import asyncio, os, signal
from orchestrator.ray_environment import prepare_ray_environment
from orchestrator.runtime import joined_or_local_ray

async def sigterm_is_seen():
    came = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, came.set)
    async with joined_or_local_ray(1):
        yield await caught(came)
    yield await caught(came)

async def caught(came):
    os.kill(os.getpid(), signal.SIGTERM)
    await came.wait()
    came.clear()
    return "caught"

async def main():
    async for word in sigterm_is_seen():
        print(word)

prepare_ray_environment()
asyncio.run(main())
"""


def test_sigterm_is_ours_beside_ray_and_after_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TAKES_SIGTERM_BESIDE_RAY],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=PATIENCE_SECONDS,
        check=False,
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "caught\ncaught\n", "")


def test_a_terminated_control_plane_cleans_up_however_long_that_takes(
    data_dir: Path, scratch: Path, gated: GatedSubmission, nothing_left: None
) -> None:
    log = scratch / "log"
    with control_plane(data_dir, log) as command:
        orchestrator("submit", "-", "--data-dir", data_dir, stdin=gated_job(gated, scratch))
        wait_until((gated.gate / "reached").exists, "the policy at its gate")

        command.terminate()
        wait_until(lambda: "stops" in log.read_text(), "the end's begin")
        command.terminate()

        assert command.wait(PATIENCE_SECONDS) == 130, log.read_text()
    assert [line.removeprefix("orchestrator: ") for line in log.read_text().splitlines()[2:]] == [
        "stops",
        "cleaning up already",
        "interrupted",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("eval", "nowhere", "-b", "gymnasium/CartPole-v1"), "no submission"),
        (("eval", EXAMPLES / "cartpole", "-b", "gymnasium/CartPol-v1"), "CartPole-v1"),
        (("eval", EXAMPLES / "cartpole", "-b", "gymnasion/CartPole-v1"), "gymnasium"),
        (("eval", EXAMPLES / "cartpole", "-b", "CartPole-v1"), "PROVIDER/NAME"),
        (("submit", "nowhere.json"), "cannot be read"),
        (("consume", "eval_results"), "eval_result"),
        (("up", "--database-url", "mysql://x"), "--database-url: expected postgresql://"),
    ],
)
def test_wrong_usage_ends_with_2_and_one_line_that_helps(
    data_dir: Path, arguments: tuple[Any, ...], words: str
) -> None:
    more = () if "--database-url" in arguments else ("--data-dir", data_dir)

    done = orchestrator(*arguments, *more)

    assert done.returncode == 2, done.stderr
    assert words.lower() in done.stderr.lower()
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_database_that_cannot_be_reached_ends_with_3() -> None:
    done = orchestrator("up", "--database-url", "postgresql://u:secret@127.0.0.1:1/x")

    assert done.returncode == 3
    assert "127.0.0.1:1/x" in done.stderr
    assert "secret" not in done.stderr


def test_a_ray_cluster_that_cannot_be_reached_ends_with_3(data_dir: Path, nothing_left: None) -> None:
    done = orchestrator("up", "--data-dir", data_dir, RAY_ADDRESS="127.0.0.1:1")

    assert done.returncode == 3
    assert "no Ray cluster can be reached at RAY_ADDRESS=127.0.0.1:1" in done.stderr


@pytest.mark.slow
def test_a_node_that_dies_under_a_command_ends_it_with_3_and_leaves_nothing(
    data_dir: Path, scratch: Path, gated: GatedSubmission, nothing_left: None
) -> None:
    log = scratch / "log"
    command = start("eval", gated.directory, "-b", "gymnasium/CartPole-v1", "--data-dir", data_dir, log=log)
    wait_until((gated.gate / "reached").exists, "the policy at its gate")

    (raylet,) = [
        child for child in psutil.Process(command.pid).children() if child.cmdline()[0].endswith("/raylet")
    ]
    raylet.kill()

    assert command.wait(PATIENCE_SECONDS) == 3, log.read_text()
    assert "the control plane ended by itself" in log.read_text()


@contextmanager
def control_plane(data_dir: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`orchestrator up` for the block, ended by SIGTERM unless it is gone already."""
    log.write_bytes(b"")
    command = start("up", "--data-dir", data_dir, log=log)
    try:
        wait_until(lambda: "ready" in log.read_text() or command.poll() is not None, "a control plane")
        assert command.poll() is None, log.read_text()
        yield command
    finally:
        if command.poll() is None:
            command.terminate()
            command.wait(120)


def test_a_live_control_plane_serves_every_command_and_survives_the_end_of_everything(
    data_dir: Path, scratch: Path, gated: GatedSubmission, nothing_left: None
) -> None:
    log = scratch / "log"
    job = gated_job(gated, scratch)
    with control_plane(data_dir, log) as command:
        check_a_policy_server_by_its_address(data_dir)
        check_a_submission_that_fails(data_dir, scratch)
        check_a_server_that_it_brings(data_dir, scratch)
        assert orchestrator("submit", "-", "--data-dir", data_dir, stdin=job).stdout == "77\n"
        wait_until((gated.gate / "reached").exists, "the policy at its gate")
        status = json.loads(orchestrator("status", "77", "--json", "--data-dir", data_dir).stdout)
        assert (status["status"], status["episodes"]["planned"]) == ("RUNNING", 10)

        kill_everything(command, data_dir)
        gated.open()
    with control_plane(data_dir, log):
        finals = lambda: messages(data_dir, "job_status_update", 77, final=True)  # noqa: E731
        seen: list[dict[str, Any]] = []
        wait_until(lambda: seen.extend(finals()) or seen, "the end of the job")
        (result,) = messages(data_dir, "eval_result", 77)
        episodes = messages(data_dir, "episode_data", 77)
        again = messages(data_dir, "eval_result", 77)

    assert result["status"] == "COMPLETED"
    assert [episode["episode_id"] for episode in episodes] == list(range(10))
    assert again == []  # consumed is acknowledged


def gated_job(gated: GatedSubmission, scratch: Path) -> str:
    packed = pack_directory(gated.directory, scratch)
    return json.dumps(
        {
            "job_id": 77,
            "env_provider": "gymnasium",
            "benchmark_name": "CartPole-v1",
            "config": {"episodes_per_task": 10, "max_episode_steps": 20, "score": "avg_reward"},
            "artifact_url": f"file://{packed.path}",
            "artifact_sha256": packed.sha256,
        }
    )


def check_a_policy_server_by_its_address(data_dir: Path) -> None:
    with running_policy_server(EXAMPLES / "cartpole") as server:
        done = orchestrator(
            "eval",
            f"127.0.0.1:{server.port}",
            "-b",
            "gymnasium/CartPole-v1",
            "--episodes",
            "2",
            "--data-dir",
            data_dir,
        )
    assert done.returncode == 0, done.stderr
    assert "only submits" in done.stderr
    assert "100.0 %" in done.stdout


def check_a_submission_that_fails(data_dir: Path, scratch: Path) -> None:
    broken = scratch / "broken"
    broken.mkdir()
    (broken / "agent.py").write_text("raise RuntimeError('no weights')\n")
    done = orchestrator("eval", broken, "-b", "gymnasium/CartPole-v1", "--data-dir", data_dir)
    assert done.returncode == 1, done.stderr
    assert "no weights" in done.stdout


def check_a_server_that_it_brings(data_dir: Path, scratch: Path) -> None:
    directory = scratch / "own_server"
    shutil.copytree(EXAMPLES / "cartpole_server", directory)
    (directory / "link").symlink_to("main.py")
    done = orchestrator(
        "eval", directory, "-b", "gymnasium/CartPole-v1", "--episodes", "2", "--data-dir", data_dir
    )
    assert done.returncode == 0, done.stderr
    assert "100.0 %" in done.stdout
    assert f"left out of the archive: {directory / 'link'}, a symbolic link" in done.stderr


def messages(data_dir: Path, queue: str, job_id: int, *, final: bool = False) -> list[dict[str, Any]]:
    """What a validator would consume now, of one job."""
    done = orchestrator("consume", queue, "--data-dir", data_dir)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    ends = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")
    return [one for one in found if one["job_id"] == job_id and (not final or one["status"] in ends)]


def test_an_eval_that_was_killed_with_everything_is_cancelled_by_the_next_one(
    data_dir: Path, scratch: Path, gated: GatedSubmission, nothing_left: None
) -> None:
    benchmark = ("-b", "gymnasium/CartPole-v1", "--episodes", "9", "--data-dir", data_dir)
    variables = {"ORCHESTRATOR_LEASE_SECONDS": "9"}  # the next eval waits for the end of the dead one's
    command = start("eval", gated.directory, *benchmark, log=scratch / "log", **variables)
    wait_until((gated.gate / "reached").exists, "the policy at its gate")
    plays = len(gated.played())
    kill_everything(command, data_dir)

    done = orchestrator("eval", EXAMPLES / "cartpole", *benchmark, **variables)

    assert done.returncode == 0, done.stderr
    assert "the eval that asked for it was killed" in done.stderr
    jobs = json.loads(orchestrator("jobs", "--json", "--data-dir", data_dir).stdout)["jobs"]
    assert [(job["status"], job["detail"]) for job in jobs[1:]] == [("CANCELLED", "its client has gone away")]
    assert jobs[0]["status"] == "COMPLETED"
    assert len(gated.played()) == plays  # it was not taken up again
    assert not list((data_dir / "artifacts").glob("*"))
