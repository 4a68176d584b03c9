"""Whose a process is, by its command line, and what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from tests.soak.growth import Sample

COMMAND = "orchestrator up"
# Ray names the process of an actor after its class.
ACTORS = {
    "ray::QueueConsumer": "consumer",
    "ray::ResultSink": "sink",
    "ray::JobSupervisor": "supervisors",
    "ray::RolloutWorker": "workers",
}
# What stands in the command lines of others, beside the directory of this run.
PROGRAMS = {
    "orchestrator.adapters.process.shim": "shims",
    "orchestrator.submission.": "submissions",
    "orchestrator.adapters.postgres.guardian": "guardian",
}
OURS = {COMMAND, *ACTORS.values(), *PROGRAMS.values()}
RAYS = {"gcs_server": "Ray: GCS", "raylet": "Ray: raylet"}


def role_of(name: str, line: str, directory: Path) -> str | None:
    """The role of a process, or None."""
    for beginning, role in ACTORS.items():
        if line.startswith(beginning):
            return role
    if str(directory) in line:
        for program, role in PROGRAMS.items():
            if program in line:
                return role
    return RAYS.get(name)


def sampled(command: psutil.Process, directory: Path, jobs: int) -> Iterator[Sample]:
    """Every process of the run as it is now; `command` is that of `orchestrator up`.

    Shims, and what they start, are below no process of ours: the run's directory tells them from others.
    """
    below = {process.pid for process in command.children(recursive=True)}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            line = " ".join(process.cmdline())
            role = role_of(process.name(), line, directory)
            if process.pid == command.pid:
                role = COMMAND
            elif role is None or (str(directory) not in line and process.pid not in below):
                continue
            yield _sample(role, process, jobs)


def _sample(role: str, process: psutil.Process, jobs: int) -> Sample:
    memory = process.memory_full_info()
    return Sample(role, process.pid, jobs, memory.rss, memory.uss, process.num_fds(), process.num_threads())
