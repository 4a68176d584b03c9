"""The directory of one container: what lies where, and the records that adapter and shim share in it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any
from uuid import UUID

from orchestrator.adapters.process.places import Place
from orchestrator.adapters.process.processes import ProcessIdentity

_LOCK_POLL_SECONDS = 0.02


class EndKind(StrEnum):
    """How a container ended, as its shim saw it."""

    EXITED = "exited"
    SIGNALED = "signaled"
    OUT_OF_MEMORY = "out_of_memory"
    OUT_OF_DISK = "out_of_disk"
    EXPIRED = "expired"
    STOPPED = "stopped"
    NODE_GONE = "node_gone"
    SHIM_FAILED = "shim_failed"


@dataclass(frozen=True, slots=True)
class End:
    """The first terminal status of a container. `at` is in seconds since 1970."""

    kind: EndKind
    reason: str
    exit_code: int | None = None
    signal: int | None = None
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class Processes:
    """The two processes that every container begins with."""

    shim: ProcessIdentity
    host: ProcessIdentity


@dataclass(frozen=True, slots=True)
class ShimSpec:
    """What a shim has to run and to watch; the session key is not in it. Bytes, and seconds since 1970."""

    job_id: int
    attempt: int
    command: list[str]
    environment: dict[str, str]
    expires_at: float
    log_bytes: int
    memory_bytes: int | None = None
    disk_bytes: int | None = None
    watched: ProcessIdentity | None = None
    place: Place | None = None  # where the numbers of its processes and of `watched` mean something


@dataclass(frozen=True, slots=True)
class ContainerDirectory:
    """`<base>/<installation id>/<container id>`: our records, and `home` for what the submission writes."""

    root: Path

    @classmethod
    def of(cls, base: Path, installation_id: UUID, container_id: UUID) -> ContainerDirectory:
        return cls(base / str(installation_id) / str(container_id))

    @property
    def container_id(self) -> UUID:
        return UUID(self.root.name)

    @property
    def marker(self) -> str:
        """The value of the environment variable that every process of the container carries."""
        return f"{self.root.parent.name}/{self.root.name}"

    @property
    def spec_file(self) -> Path:
        return self.root / "spec.json"

    @property
    def processes_file(self) -> Path:
        return self.root / "processes.json"

    @property
    def status_file(self) -> Path:
        return self.root / "status.json"

    @property
    def port_file(self) -> Path:
        return self.root / "port"

    @property
    def log_file(self) -> Path:
        return self.root / "log"

    @property
    def shim_log_file(self) -> Path:
        return self.root / "shim.log"

    @property
    def home(self) -> Path:
        return self.root / "home"

    @property
    def temporary(self) -> Path:
        return self.home / "tmp"

    @property
    def work(self) -> Path:
        return self.home / "work"

    def make(self) -> None:
        """Make the directories, readable by this user alone."""
        for directory in (self.root, self.home, self.temporary, self.work):
            directory.mkdir(mode=0o700)

    @contextlib.contextmanager
    def locked(self, timeout_seconds: float) -> Iterator[None]:
        """Hold this container alone among all processes of the machine; a holder that dies lets go.

        Raises:
            TimeoutError: another one held it all the time.
        """
        deadline = time.monotonic() + timeout_seconds
        while (file := self._try_lock()) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"container {self.root.name} is held by another process")
            time.sleep(_LOCK_POLL_SECONDS)
        try:
            yield
        finally:
            os.close(file)

    def _try_lock(self) -> int | None:
        self.root.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Not `Path.mkdir(exist_ok=True)`: that looks again, and calls what a removal took away since a file.
        with contextlib.suppress(FileExistsError):
            self.root.parent.mkdir(mode=0o700)
        try:
            file = os.open(self._lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # a removal took the directory away in between
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A removal unlinks the file that it holds: a lock on a file without a name locks nobody out.
            if os.fstat(file).st_ino == self._lock_file.stat().st_ino:
                return file
        except (BlockingIOError, FileNotFoundError):
            pass
        os.close(file)
        return None

    @property
    def _lock_file(self) -> Path:
        return self.root.parent / f".{self.root.name}.lock"

    def remove_files(self) -> None:
        """Remove the directory with all in it, and its lock file; call it while the lock is held."""
        remove_tree(self.root)
        self._lock_file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.root.parent.rmdir()

    def read_spec(self) -> ShimSpec | None:
        data = read_json(self.spec_file)
        with _of_another_version():
            if data is not None:
                watched, place = data.pop("watched"), data.pop("place")
                return ShimSpec(
                    **data,
                    watched=None if watched is None else ProcessIdentity(**watched),
                    place=None if place is None else Place(**place),
                )
        return None

    def write_spec(self, spec: ShimSpec) -> None:
        write_json(self.spec_file, asdict(spec))

    def read_processes(self) -> Processes | None:
        data = read_json(self.processes_file)
        with _of_another_version():
            if data is not None:
                return Processes(ProcessIdentity(**data["shim"]), ProcessIdentity(**data["host"]))
        return None

    def write_processes(self, processes: Processes) -> None:
        write_json(self.processes_file, asdict(processes))

    def read_end(self) -> End | None:
        data = read_json(self.status_file)
        with _of_another_version():
            if data is not None:
                return End(**{**data, "kind": EndKind(data["kind"])})
        return None

    def write_end(self, end: End) -> None:
        write_json(self.status_file, asdict(end))


def _of_another_version() -> contextlib.suppress:
    """A record with other fields counts as none: containers outlive the code that made them.

    One that cannot be read must not keep the others from being listed and removed.
    """
    return contextlib.suppress(KeyError, TypeError, ValueError)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file that `write_json` wrote; None where there is none."""
    try:
        data = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a file that readers see whole or not at all."""
    draft = path.with_name(path.name + ".new")
    draft.write_text(json.dumps(data))
    draft.replace(path)


def remove_tree(directory: Path) -> None:
    """Remove a directory of someone who may have made it hard: unreadable, or nested very deep.

    Raises:
        OSError: something of it is still there.
    """
    try:
        shutil.rmtree(directory)
    except FileNotFoundError:
        if not directory.exists():
            return
        remove_tree(directory)
    except (OSError, RecursionError):
        subprocess.run(["chmod", "-R", "u+rwx", "--", directory], check=False, stderr=subprocess.DEVNULL)
        subprocess.run(["rm", "-rf", "--", directory], check=False, stderr=subprocess.DEVNULL)
        if directory.exists():
            raise
