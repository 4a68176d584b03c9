"""Containers of earlier runs that nobody drives any more: found and removed only where that is certain."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from uuid import UUID

from orchestrator.adapters.process.containers import end_processes
from orchestrator.adapters.process.handles import Handle
from orchestrator.adapters.process.places import Presence
from orchestrator.adapters.process.processes import marked_processes
from orchestrator.adapters.process.scratch import ContainerDirectory

STOP_SECONDS = 5.0
# On a shared file system another machine may be about to write it.
SPECLESS_SECONDS = 600.0


class Use(StrEnum):
    """What can be said of a container from here."""

    DRIVEN = "driven"  # the node manager whose workers talk to it is there, or its shim where it needs none
    ORPHAN = "orphan"
    UNKNOWN = "unknown"  # of another machine, or being made or removed at this moment


@dataclass(frozen=True, slots=True)
class FoundContainer:
    """A container below a base directory, or whose processes name an installation of it."""

    directory: ContainerDirectory
    job_id: int | None
    use: Use
    processes: int


def find_containers(base: Path, installations: Iterable[UUID] = ()) -> list[FoundContainer]:
    """All containers below `base`, and those of `installations` besides that have processes only."""
    names: dict[str, set[str]] = {str(installation): set() for installation in installations}
    for installation in base.iterdir() if base.is_dir() else ():
        if _is_uuid(installation.name) and installation.is_dir():
            names.setdefault(installation.name, set()).update(entry.name for entry in installation.iterdir())
    processes: dict[str, int] = {}
    for _, marker in marked_processes():
        owner, _, name = marker.partition("/")
        if owner in names:
            names[owner].add(name)
            processes[marker] = processes.get(marker, 0) + 1
    return [_found(directory, processes.get(directory.marker, 0)) for directory in _directories(base, names)]


def remove_orphan(directory: ContainerDirectory) -> bool:
    """Remove it unless somebody drives it by now; whether nothing of it is left.

    Raises:
        InfrastructureError: a process of it does not end.
        OSError: a file of it is still there.
    """
    if not directory.root.is_dir():
        end_processes(directory, None, STOP_SECONDS)
        return True
    with contextlib.suppress(TimeoutError), directory.locked(STOP_SECONDS):
        if _use(directory) is not Use.ORPHAN:
            return False
        end_processes(directory, Handle.here(directory).shim, STOP_SECONDS)
        directory.remove_files()
        return True
    return False


def _found(directory: ContainerDirectory, processes: int) -> FoundContainer:
    spec = directory.read_spec()
    return FoundContainer(directory, None if spec is None else spec.job_id, _locked_use(directory), processes)


def _locked_use(directory: ContainerDirectory) -> Use:
    """Its use, as far as it is not just being made or removed."""
    if not directory.root.is_dir():
        return Use.ORPHAN  # processes of a container are ended before its files are removed
    with contextlib.suppress(TimeoutError), directory.locked(0):
        return _use(directory)
    return Use.UNKNOWN


def _use(directory: ContainerDirectory) -> Use:
    """Its use; to be asked under its lock."""
    spec, processes = directory.read_spec(), directory.read_processes()
    if spec is None or spec.place is None:
        return Use.ORPHAN if _is_old(directory.root) else Use.UNKNOWN
    driver = spec.watched or (None if processes is None else processes.shim)
    if driver is None:
        return Use.ORPHAN if _is_old(directory.root) else Use.UNKNOWN
    presence = spec.place.presence_of(driver)
    if presence is Presence.ELSEWHERE:
        return Use.UNKNOWN
    return Use.ORPHAN if presence is Presence.GONE else Use.DRIVEN


def _is_old(root: Path) -> bool:
    return time.time() - root.stat().st_mtime > SPECLESS_SECONDS


def _directories(base: Path, names: dict[str, set[str]]) -> Iterator[ContainerDirectory]:
    for installation, containers in sorted(names.items()):
        for name in sorted(containers):
            if _is_uuid(name):
                yield ContainerDirectory.of(base, UUID(installation), UUID(name))


def _is_uuid(text: str) -> bool:
    try:
        return str(UUID(text)) == text
    except ValueError:
        return False
