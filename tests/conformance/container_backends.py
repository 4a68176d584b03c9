"""The adapters of `Containers` that the suite runs on, and what differs between them.

A small script stands in for the submission host. A prelude gives it `ready()`, `read_key()` and `die_of()`.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from uuid import UUID

from orchestrator.adapters.process.containers import ProcessContainers
from orchestrator.ports import Containers

MEBIBYTE = 2**20


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What a test has to know of where its containers run."""

    port: int  # where the script's host listens
    deadline_seconds: float  # within which all that is expected has happened
    never_listened: str  # words, as a regular expression, for a host that does not come up
    lifetime_seconds: float  # the shortest that lets a container begin
    kept_log_bytes: int  # of a flood, at least
    memory_of_a_group: bool = True  # what all processes of a container use together ends the container
    bounded_disk: bool = True  # who writes without an end is stopped before the machine suffers


class Backend(Protocol):
    """One adapter under test."""

    traits: Traits

    def containers(self, script: str) -> Containers:
        """An adapter, new each time, whose containers run this Python script as their submission host."""
        ...

    async def close(self, installation_id: UUID) -> None:
        """Remove everything of this installation, and let go of every connection."""
        ...


async def remove_everything(containers: Containers, installation_id: UUID) -> None:
    for owned in await containers.list_owned(installation_id):
        await containers.remove(owned.handle)


class ProcessBackend:
    """Containers as processes of this machine."""

    traits = Traits(
        port=4242,
        deadline_seconds=30.0,
        never_listened="did not listen",
        lifetime_seconds=0.0,
        kept_log_bytes=MEBIBYTE // 2,
    )
    PRELUDE = """
import os, signal, sys, time
port_file, work_directory, key_fd = sys.argv[1], sys.argv[2], int(sys.argv[3])
def ready():
    with open(port_file + ".new", "w") as file:
        file.write("4242")
    os.rename(port_file + ".new", port_file)
def read_key():
    with os.fdopen(key_fd) as file:
        return file.read()
def die_of(number):
    os.kill(os.getpid(), number)
"""

    def __init__(self, base: Path) -> None:
        self._base = base

    def containers(self, script: str) -> ProcessContainers:
        def command(port_file: Path, directory: Path, key_fd: int) -> list[str]:
            program = self.PRELUDE + script
            return [sys.executable, "-c", program, str(port_file), str(directory), str(key_fd)]

        return ProcessContainers(self._base, command=command)

    async def close(self, installation_id: UUID) -> None:
        await remove_everything(self.containers(""), installation_id)


@asynccontextmanager
async def process_backend(directory: Path) -> AsyncIterator[Backend]:
    yield ProcessBackend(directory / "containers")
