"""This machine: Python, packages, memory, disk, files and ports."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import tempfile
from importlib import metadata
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from orchestrator.diagnosis.findings import Check, Finding
from orchestrator.ray_session import MAX_SOCKET_PATH_BYTES, PARENT, socket_path_bytes

AREA = "this machine"
PACKAGE = "orchestrator"
OPTIONAL_EXTRAS = ("metaworld",)

MIB, GIB = 2**20, 2**30
LEAST_MEMORY_BYTES = GIB
LEAST_DISK_BYTES = 2 * GIB
LEAST_SHARED_MEMORY_BYTES = 128 * MIB
LEAST_OPEN_FILES = 1024
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Ray keeps its objects
CONTROL_GROUP = Path("/sys/fs/cgroup")


def machine_checks(data_dir: Path) -> list[Check]:
    """All checks of this machine."""
    temporary = Path(tempfile.gettempdir())
    return [
        Check(AREA, "python", python_version),
        Check(AREA, "packages", installed_packages),
        Check(AREA, "memory", available_memory),
        Check(AREA, "open files", open_files),
        Check(AREA, "data directory", lambda: disk(data_dir, "--data-dir")),
        Check(AREA, "temporary files", lambda: disk(temporary, "TMPDIR")),
        Check(AREA, "shared memory", shared_memory),
        Check(AREA, "ray sockets", socket_paths),
        Check(AREA, "ports", loopback_ports),
    ]


def python_version(version: str = platform.python_version()) -> Finding:
    """Whether this Python is one that the package is made for."""
    required = SpecifierSet(metadata.metadata(PACKAGE)["Requires-Python"])
    if required.contains(version, prereleases=True):
        return Finding.ok(version)
    return Finding.broken(
        f"{version}, but {PACKAGE} needs {_in_order(required)}",
        "set it up with another one: PYTHON=/path/to/python make setup",
    )


def _in_order(specifiers: SpecifierSet) -> str:
    """The range as people write it, its lower end first."""
    return ",".join(sorted(map(str, specifiers), reverse=True))


def installed_packages(distribution: str = PACKAGE) -> Finding:
    """Whether every package that ours needs is there, in a version of the range that it was made for."""
    wrong, absent, fine = [], [], 0
    for text in metadata.requires(distribution) or []:
        requirement = Requirement(text)
        wanted_by = next((extra for extra in ("", *OPTIONAL_EXTRAS) if _wants(requirement, extra)), None)
        if wanted_by is None:
            continue
        found = _version_of(requirement.name)
        if found is None and wanted_by:
            absent.append(wanted_by)
        elif found is None:
            wrong.append(f"{requirement.name} is missing")
        elif not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found} is not {_in_order(requirement.specifier)}")
        else:
            fine += 1
    if wrong:
        return Finding.broken(
            ", ".join(wrong), "install what requirements.lock names: make setup, or pip install again"
        )
    without = "".join(f"; without {extra} (optional)" for extra in dict.fromkeys(absent))
    return Finding.ok(f"{fine} packages in the versions that {distribution} is made for{without}")


def _wants(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def available_memory(least_bytes: int = LEAST_MEMORY_BYTES) -> Finding:
    """Whether there is room for Ray and a worker or two."""
    available = min(psutil.virtual_memory().available, control_group_room(CONTROL_GROUP))
    total = psutil.virtual_memory().total
    what = f"{in_units(available)} of {in_units(total)} available"
    if available >= least_bytes:
        return Finding.ok(what)
    return Finding.attention(
        f"only {what}", f"Ray and a worker want {in_units(least_bytes)}: end other programs"
    )


def control_group_room(directory: Path) -> int:
    """What the limit of this container leaves; more than any machine has where there is none."""
    try:
        limit = (directory / "memory.max").read_text().strip()
        return int(limit) - int((directory / "memory.current").read_text())
    except (OSError, ValueError):  # no control group of version 2, or "max"
        return 2**62


def open_files(least: int = LEAST_OPEN_FILES) -> Finding:
    """Whether a process may open as many files as Ray's do."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Ray raises its own limit as far as it may.
    if hard == resource.RLIM_INFINITY or hard >= least:
        return Finding.ok(f"{_limit(soft)} at once, {_limit(hard)} where a program asks for more")
    return Finding.attention(f"only {_limit(hard)} at once", f"raise the limit: ulimit -Hn {least}, or more")


def _limit(number: int) -> str:
    return "any number" if number == resource.RLIM_INFINITY else str(number)


def disk(directory: Path, option: str, least_bytes: int = LEAST_DISK_BYTES) -> Finding:
    """Whether there is room in a directory that we write to; it may not exist yet."""
    there = directory
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        return Finding.broken(f"{there} is no directory", f"choose another one with {option}")
    if not os.access(there, os.W_OK | os.X_OK):
        return Finding.broken(f"{there} may not be written", f"choose another one with {option}")
    usage = shutil.disk_usage(there)
    what = f"{in_units(usage.free)} of {in_units(usage.total)} free in {directory}"
    if usage.free >= least_bytes:
        return Finding.ok(what)
    return Finding.attention(
        f"only {what}", f"keep {in_units(least_bytes)} free there, or choose another one with {option}"
    )


def shared_memory(directory: Path = SHARED_MEMORY, least_bytes: int = LEAST_SHARED_MEMORY_BYTES) -> Finding:
    """Whether Ray can keep its objects in memory."""
    if not directory.is_dir():
        return Finding.ok(f"{directory} is not there; Ray keeps its objects in files")
    free = shutil.disk_usage(directory).free
    what = f"{in_units(free)} free in {directory}"
    if free >= least_bytes:
        return Finding.ok(what)
    return Finding.attention(
        f"only {what}",
        f"below {in_units(least_bytes)} Ray is slow; of a Docker container: run it with --shm-size=2g",
    )


def socket_paths(parent: Path = PARENT) -> Finding:
    """Whether Ray can make its sockets in the session directories that we give it."""
    if not os.access(parent, os.W_OK | os.X_OK):
        return Finding.broken(f"{parent} may not be written", "Ray needs it: give this user access to it")
    length = socket_path_bytes(parent)
    if length > MAX_SOCKET_PATH_BYTES:
        return Finding.broken(
            f"paths of {length} bytes below {parent}, above the {MAX_SOCKET_PATH_BYTES} that may be",
            "Ray cannot start below such a directory",
        )
    return Finding.ok(f"paths of {length} bytes below {parent}, of the {MAX_SOCKET_PATH_BYTES} that may be")


def loopback_ports(address: str = "127.0.0.1") -> Finding:
    """Whether programs of this machine can talk to each other by TCP."""
    try:
        with socket.create_server((address, 0)) as server:
            server.settimeout(5.0)
            with socket.create_connection(server.getsockname(), timeout=5.0):
                connection, _ = server.accept()
                connection.close()
    except OSError as error:
        return Finding.broken(
            f"no connection to {address} by TCP: {os.strerror(error.errno) if error.errno else error}",
            "bring the loopback interface up, and let local connections through the firewall",
        )
    return Finding.ok(f"connections to {address} work")


def in_units(size_bytes: float) -> str:
    """A size for a person."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
        if size_bytes >= unit:
            return f"{size_bytes / unit:.1f} {name}"
    return f"{size_bytes / 1024:.0f} KiB"
