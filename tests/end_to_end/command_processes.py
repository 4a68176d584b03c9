"""Commands as processes of their own, what they start, and how all of it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from orchestrator.adapters.postgres.server_files import ServerFiles
from orchestrator.ray_session import PREFIX

ORCHESTRATOR = [sys.executable, "-m", "orchestrator.cli"]
PATIENCE_SECONDS = 300.0


def environment(**more: str) -> dict[str, str]:
    """What a fresh shell has, without anything of this test run."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "PYTHONPATH") if name in os.environ}
    return kept | {"COLUMNS": "200"} | more


def orchestrator(
    *arguments: str | Path, stdin: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*ORCHESTRATOR, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        env=environment(**variables),
        timeout=PATIENCE_SECONDS,
        check=False,
    )


def start(*arguments: str | Path, log: Path, **variables: str) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            [*ORCHESTRATOR, *map(str, arguments)],
            stdout=output,
            stderr=output,
            env=environment(**variables),
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


def sessions_of(pid: int) -> list[Path]:
    """The Ray sessions that the process started: not the one of the tests, nor anybody else's."""
    family = {pid} | {child.pid for child in psutil.Process(pid).children(recursive=True)}
    return [
        session
        for session in ray_sessions()
        if any(process.pid in family for process in processes_naming(f"{session}/"))
    ]


def kill_everything(command: subprocess.Popen[bytes], data_dir: Path) -> None:
    """SIGKILL to all at once: the command, Ray, Postgres with its guardian, shims and submissions."""
    state = ServerFiles(data_dir).read_state()
    assert state is not None
    sessions = sessions_of(command.pid)
    victims = {process.pid for session in sessions for process in processes_naming(f"{session}/")}
    victims |= {process.pid for process in processes_naming(str(data_dir))} | {command.pid, state.pid}
    for pid in victims:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    command.wait(30)
    wait_until(lambda: not processes_naming(str(data_dir)), "the end of everything", seconds=30)
    for session in sessions:
        subprocess.run(["rm", "-rf", str(session)], check=True)
