"""The commands as a person runs them: processes of their own, exit codes, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.adapters.artifacts.pack import pack_directory
from orchestrator.adapters.postgres.server_files import ServerFiles
from orchestrator.ray_session import PREFIX
from tests.end_to_end.conftest import EXAMPLES, GatedSubmission
from tests.policy_processes import running_policy_server

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

ORCHESTRATOR = [sys.executable, "-m", "orchestrator.cli"]
PATIENCE_SECONDS = 300.0


def environment(**more: str) -> dict[str, str]:
    """What a fresh shell has, without anything of this test run."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "PYTHONPATH") if name in os.environ}
    return kept | {"COLUMNS": "200"} | more


def orchestrator(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*ORCHESTRATOR, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=PATIENCE_SECONDS,
        check=False,
    )


def start(*arguments: str | Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            [*ORCHESTRATOR, *map(str, arguments)],
            stdout=output,
            stderr=output,
            env=environment(),
            start_new_session=True,
        )


def wait_until(condition: Any, what: str, seconds: float = PATIENCE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.1)


def processes_naming(text: str) -> list[psutil.Process]:
    """Processes whose command line or open files name `text`: everything that a command started."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            files = [os.readlink(link) for link in Path(f"/proc/{process.pid}/fd").iterdir()]
            if any(text in part for part in [*process.cmdline(), *files]):
                found.append(process)
    return found


def ray_sessions() -> set[Path]:
    return set(Path("/tmp").glob(f"{PREFIX}*"))


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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("eval", "nowhere", "-b", "gymnasium/CartPole-v1"), "no submission"),
        (("eval", EXAMPLES / "cartpole", "-b", "gymnasium/CartPol-v1"), "CartPole-v1"),
        (("eval", EXAMPLES / "cartpole", "-b", "gymnasion/CartPole-v1"), "gymnasium"),
        (("eval", EXAMPLES / "cartpole", "-b", "CartPole-v1"), "PROVIDER/NAME"),
        (("submit", "nowhere.json"), "cannot be read"),
        (("consume", "eval_results"), "eval_result"),
        (("up", "--database-url", "mysql://x"), "ORCHESTRATOR_DATABASE_URL"),
    ],
)
def test_wrong_usage_ends_with_2_and_one_line_that_helps(
    data_dir: Path, arguments: tuple[Any, ...], words: str
) -> None:
    more = () if "--database-url" in arguments else ("--data-dir", data_dir)

    done = orchestrator(*arguments, *more)

    assert done.returncode == 2, done.stderr
    assert words.removeprefix("ORCHESTRATOR_").lower() in done.stderr.lower()
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_database_that_cannot_be_reached_ends_with_3() -> None:
    done = orchestrator("up", "--database-url", "postgresql://u:secret@127.0.0.1:1/x")

    assert done.returncode == 3
    assert "127.0.0.1:1/x" in done.stderr
    assert "secret" not in done.stderr


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
    others = ray_sessions()
    with control_plane(data_dir, log) as command:
        check_a_policy_server_by_its_address(data_dir)
        check_a_submission_that_fails(data_dir, scratch)
        assert orchestrator("submit", "-", "--data-dir", data_dir, stdin=job).stdout == "77\n"
        wait_until((gated.gate / "reached").exists, "the policy at its gate")

        kill_everything(command, data_dir, others)
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


def messages(data_dir: Path, queue: str, job_id: int, *, final: bool = False) -> list[dict[str, Any]]:
    """What a validator would consume now, of one job."""
    done = orchestrator("consume", queue, "--data-dir", data_dir)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    ends = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")
    return [one for one in found if one["job_id"] == job_id and (not final or one["status"] in ends)]


def kill_everything(command: subprocess.Popen[bytes], data_dir: Path, others: set[Path]) -> None:
    """SIGKILL to all at once: the command, its Ray, Postgres with its guardian, shims and submissions.

    `others` are Ray sessions of others; a driver ends with its cluster, and this test run is one.
    """
    state = ServerFiles(data_dir).read_state()
    assert state is not None
    sessions = [path for path in ray_sessions() - others if processes_naming(f"{path}/")]
    victims = {process.pid for session in sessions for process in processes_naming(f"{session}/")}
    victims |= {process.pid for process in processes_naming(str(data_dir))} | {command.pid, state.pid}
    for pid in victims:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    command.wait(30)
    wait_until(lambda: not processes_naming(str(data_dir)), "the end of everything", seconds=30)
    for session in sessions:
        subprocess.run(["rm", "-rf", str(session)], check=True)
