"""Where process numbers mean something: a machine, since its boot, in one process namespace."""

from __future__ import annotations

import os
import socket
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path

import psutil

from orchestrator.adapters.process.processes import ON_LINUX, ProcessIdentity, identity_of


class Presence(StrEnum):
    """What can be said of a process from here."""

    ALIVE = "alive"
    GONE = "gone"
    ELSEWHERE = "elsewhere"  # on another machine, or in another namespace: nobody here can tell


@dataclass(frozen=True, slots=True)
class Place:
    """Names a machine as long as it runs. `machine` changes with its boot, `hostname` as a rule does not."""

    hostname: str
    machine: str

    @classmethod
    def here(cls) -> Place:
        return cls(socket.gethostname(), this_machine())

    def presence_of(self, process: ProcessIdentity) -> Presence:
        """Whether a process of this place lives; one of before a reboot of this machine is gone."""
        here = Place.here()
        if self == here:
            return Presence.ALIVE if process.alive else Presence.GONE
        rebooted = self.hostname == here.hostname and _namespace(self.machine) == _namespace(here.machine)
        return Presence.GONE if rebooted else Presence.ELSEWHERE


@dataclass(frozen=True, slots=True)
class Owner:
    """A process that something belongs to, in a form that can be written down beside it."""

    place: Place
    process: ProcessIdentity

    @classmethod
    def this_process(cls) -> Owner:
        identity = identity_of(os.getpid())
        assert identity is not None
        return cls(Place.here(), identity)

    @property
    def presence(self) -> Presence:
        return self.place.presence_of(self.process)

    def as_json(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, dict[str, object]]) -> Owner:
        """What `as_json` gave.

        Raises:
            KeyError, TypeError: it is something else.
        """
        return cls(Place(**data["place"]), ProcessIdentity(**data["process"]))  # type: ignore[arg-type]


@cache
def this_machine() -> str:
    """Names the kernel, its boot and the process namespace: where process numbers mean the same."""
    if not ON_LINUX:
        return f"{socket.gethostname()}:{psutil.boot_time():.0f}"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{os.readlink('/proc/self/ns/pid')}"


def _namespace(machine: str) -> str:
    return machine.partition(":")[2] if ON_LINUX else ""
