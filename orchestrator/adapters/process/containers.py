"""`Containers` as processes of this machine: for development and trusted code.

A submission runs as the user that we run as, root included: it is kept within limits, but not apart. It can
read what this user can read and signal what this user can signal. Memory and disk are watched, not enforced
by the kernel; of the disk only its own directory counts. For code of strangers take the kubernetes adapter.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import structlog

from orchestrator.adapters.process.handles import Handle
from orchestrator.adapters.process.launch import (
    HOST,
    HostCommand,
    environment_of,
    launch,
    submission_host_command,
)
from orchestrator.adapters.process.logs import read_tail
from orchestrator.adapters.process.places import Place
from orchestrator.adapters.process.processes import (
    ProcessIdentity,
    descendants,
    end_all,
    identity_of,
    marked_processes,
    marked_with,
    send_signal,
)
from orchestrator.adapters.process.scratch import ContainerDirectory, End, EndKind, ShimSpec, remove_tree
from orchestrator.domain.episodes import FaultClass
from orchestrator.domain.errors import InfrastructureError, SubmissionError
from orchestrator.domain.log_text import shown
from orchestrator.ports import ContainerSpec, Endpoint, Evidence, OwnedContainer, Verdict

log = structlog.get_logger(__name__)

_LOCK_TIMEOUT_SECONDS = 90.0
_VERDICT_TIMEOUT_SECONDS = 5.0
_KILL_TIMEOUT_SECONDS = 20.0
_FIRST_POLL_SECONDS = 0.01
_LAST_POLL_SECONDS = 0.1
_ERROR_LOG_BYTES = 8192

_FAULTS = {
    EndKind.EXITED: FaultClass.CRASH,
    EndKind.SIGNALED: FaultClass.CRASH,
    EndKind.EXPIRED: FaultClass.CRASH,
    EndKind.OUT_OF_MEMORY: FaultClass.OUT_OF_MEMORY,
    EndKind.OUT_OF_DISK: FaultClass.OUT_OF_DISK,
}
_GONE = Evidence(running=False, reason="gone", verdict=Verdict.INFRASTRUCTURE)
_RUNNING = Evidence(running=True, reason="running")
_LOST = Evidence(running=False, reason="lost: its shim left no word", verdict=Verdict.INFRASTRUCTURE)


class ProcessContainers:
    """Containers below `base_directory`, each under a shim of its own that outlives us.

    They end at the latest when they expire, and when `watch_pid` (a process of this machine, such as the node
    manager whose workers talk to them) is gone. Pickles; holds no connection and no process.
    """

    def __init__(
        self,
        base_directory: Path,
        watch_pid: int | None = None,
        command: HostCommand = submission_host_command,
        stop_timeout_seconds: float = 15.0,
        pip_settings: Mapping[str, str] | None = None,
    ) -> None:
        """`pip_settings` are variables for the host alone, which installs what submissions require."""
        self._base = base_directory.absolute()
        self._watch_pid = watch_pid
        self._command = command
        self._stop_timeout_seconds = stop_timeout_seconds
        self._pip_settings = dict(pip_settings or {})
        self._warned = False

    async def create(self, spec: ContainerSpec) -> str:
        """The handle of the container of `spec.container_id`, started unless it exists (running or ended).

        Raises:
            InfrastructureError: it could not be started; nothing of it is left.
        """
        if not self._warned:
            log.warning("process_containers_do_not_isolate", detail="for development and trusted code only")
            self._warned = True
        return await asyncio.to_thread(self._create, spec)

    async def wait_ready(
        self,
        handle: str,
        timeout_seconds: float,
        tell: Callable[[str], Awaitable[None]] | None = None,
    ) -> Endpoint:
        """Where the submission host of the container accepts connections; there is nothing to tell before.

        Raises:
            SubmissionError: it ended before, through its own fault; carries the end of its log.
            InfrastructureError: it ended otherwise, or the time is over.
        """
        deadline = time.monotonic() + timeout_seconds
        pause = _FIRST_POLL_SECONDS
        while True:
            evidence, port = await asyncio.to_thread(_look, handle)
            if not evidence.running:
                raise await self._ended(handle, evidence)
            if port is not None:
                return Endpoint(HOST, port)
            if time.monotonic() >= deadline:
                raise InfrastructureError(f"the submission host did not listen within {timeout_seconds:g} s")
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LAST_POLL_SECONDS)

    async def _ended(self, handle: str, evidence: Evidence) -> SubmissionError | InfrastructureError:
        if evidence.verdict is Verdict.SUBMISSION:
            tail = await self.logs(handle, _ERROR_LOG_BYTES)
            return SubmissionError(f"the submission ended before it was ready: {evidence.reason}", tail)
        return InfrastructureError(f"the container ended before it was ready: {evidence.reason}")

    async def logs(self, handle: str, tail_bytes: int) -> str:
        """The end of what the submission printed, at most `tail_bytes` of UTF-8; "" when it is gone."""
        found = Handle.decode(handle)
        if found is None:
            return ""
        data = await asyncio.to_thread(read_tail, found.directory.log_file, tail_bytes)
        return shown(data, tail_bytes)

    async def evidence(self, handle: str) -> Evidence:
        """How the container stands or ended; the first end that its shim saw is the one that counts."""
        return await asyncio.to_thread(_evidence, handle)

    async def remove(self, handle: str) -> None:
        """End every process of the container and remove its files; silently when nothing is there.

        Raises:
            InfrastructureError: something of it is still there.
        """
        await asyncio.to_thread(_remove, handle, self._stop_timeout_seconds)

    async def list_owned(self, installation_id: UUID) -> list[OwnedContainer]:
        """Every container of the installation that this machine has, in whatever state."""
        return await asyncio.to_thread(lambda: list(self._owned(installation_id)))

    def _create(self, spec: ContainerSpec) -> str:
        directory = ContainerDirectory.of(self._base, spec.installation_id, spec.container_id)
        try:
            with directory.locked(_LOCK_TIMEOUT_SECONDS):
                if directory.read_processes() is None:
                    _end_marked(directory)  # what is left of a start that was cut off
                    remove_tree(directory.root)
                    self._start(directory, spec)
                return Handle.here(directory).encode()
        except OSError as error:
            raise InfrastructureError(f"the container could not be created: {error}") from error

    def _start(self, directory: ContainerDirectory, spec: ContainerSpec) -> None:
        try:
            launch(directory, spec.session_key, lambda key_fd: self._shim_spec(directory, spec, key_fd))
        except BaseException:
            _end_marked(directory)
            directory.remove_files()
            raise

    def _shim_spec(self, directory: ContainerDirectory, spec: ContainerSpec, key_fd: int) -> ShimSpec:
        limits = spec.limits
        return ShimSpec(
            job_id=spec.job_id,
            attempt=spec.attempt,
            command=list(self._command(directory.port_file, directory.work, key_fd)),
            environment=environment_of(directory, threads=max(1, int(limits.cpus or 1))) | self._pip_settings,
            expires_at=spec.expires_at.timestamp(),
            log_bytes=limits.log_bytes,
            memory_bytes=limits.memory_bytes,
            disk_bytes=limits.disk_bytes,
            watched=self._watched(),
            place=Place.here(),
        )

    def _watched(self) -> ProcessIdentity | None:
        if self._watch_pid is None:
            return None
        watched = identity_of(self._watch_pid)
        if watched is None:
            raise InfrastructureError(f"process {self._watch_pid}, which containers depend on, is gone")
        return watched

    def _owned(self, installation_id: UUID) -> Iterator[OwnedContainer]:
        installation = self._base / str(installation_id)
        names: set[str] = set()
        with contextlib.suppress(FileNotFoundError):
            names.update(entry.name for entry in installation.iterdir())
        for _, marker in marked_processes():
            owner, _, name = marker.partition("/")
            if owner == installation.name:
                names.add(name)
        for name in sorted(names):
            with contextlib.suppress(ValueError):
                yield _owned(ContainerDirectory.of(self._base, installation_id, UUID(name)))


def _owned(directory: ContainerDirectory) -> OwnedContainer:
    spec = directory.read_spec()
    return OwnedContainer(
        container_id=directory.container_id,
        handle=Handle.here(directory).encode(),
        job_id=None if spec is None else spec.job_id,
        expired=spec is not None and spec.expires_at <= datetime.now(UTC).timestamp(),
    )


def _look(handle: str) -> tuple[Evidence, int | None]:
    # The port first: a container that ends after it wrote its port must be seen as ended.
    found = Handle.decode(handle)
    port = None
    if found is not None:
        with contextlib.suppress(OSError, ValueError):
            port = int(found.directory.port_file.read_text())
    return _evidence(handle), port


def _evidence(handle: str) -> Evidence:
    found = Handle.decode(handle)
    if found is None or not found.directory.root.is_dir():
        return _GONE
    if (end := found.directory.read_end()) is not None:
        return _as_evidence(end)
    if found.is_here and (processes := found.directory.read_processes()) is not None:
        if processes.shim.alive and processes.host.alive:
            return _RUNNING
        # Whoever lost a connection asks at once; the shim may be about to write down why.
        _wait_for_verdict(found.directory, processes.shim)
    end = found.directory.read_end()
    return _LOST if end is None else _as_evidence(end)


def _wait_for_verdict(directory: ContainerDirectory, shim: ProcessIdentity) -> None:
    deadline = time.monotonic() + _VERDICT_TIMEOUT_SECONDS
    while shim.alive and not directory.status_file.exists() and time.monotonic() < deadline:
        time.sleep(_FIRST_POLL_SECONDS)


def _as_evidence(end: End) -> Evidence:
    fault = _FAULTS.get(end.kind)
    exit_code = end.exit_code if end.signal is None else 128 + end.signal
    verdict = Verdict.INFRASTRUCTURE if fault is None else Verdict.SUBMISSION
    return Evidence(running=False, reason=end.reason, verdict=verdict, fault=fault, exit_code=exit_code)


def _remove(handle: str, stop_timeout_seconds: float) -> None:
    found = Handle.decode(handle)
    if found is None:
        return
    if not found.is_here and not found.directory.root.is_dir():
        # Of another machine, or of a boot before this one: there it ends by itself when it expires.
        log.warning("container_of_another_machine_left", hostname=found.hostname)
        return
    directory = found.directory
    try:
        if not directory.root.parent.is_dir():
            end_processes(directory, found.shim if found.is_here else None, stop_timeout_seconds)
            return
        with directory.locked(_LOCK_TIMEOUT_SECONDS):
            now = Handle.here(directory)  # a handle of before the shim's report names none
            shim = (found.shim or now.shim) if found.is_here else None
            end_processes(directory, shim, stop_timeout_seconds)
            directory.remove_files()
    except OSError as error:
        raise InfrastructureError(f"the container could not be removed: {error}") from error


def end_processes(
    directory: ContainerDirectory, shim: ProcessIdentity | None, stop_timeout_seconds: float
) -> None:
    """End the shim, with a chance to end the rest in good order, and then whatever is left of the container.

    Raises:
        InfrastructureError: something of it does not end.
    """
    if shim is not None and shim.alive:
        send_signal(shim, signal.SIGTERM)
        send_signal(shim, signal.SIGCONT)  # a frozen one would not hear it
        deadline = time.monotonic() + stop_timeout_seconds
        while shim.alive and time.monotonic() < deadline:
            time.sleep(_FIRST_POLL_SECONDS)
        if shim.alive:  # what is below it is about to lose its parent, so look first
            below = [identity_of(process.pid) for process in descendants(shim.pid)]
            send_signal(shim, signal.SIGKILL)
            end_all(
                lambda: [process for process in below if process and process.alive], _KILL_TIMEOUT_SECONDS
            )
    _end_marked(directory)


def _end_marked(directory: ContainerDirectory) -> None:
    if not end_all(lambda: marked_with(directory.marker), _KILL_TIMEOUT_SECONDS):
        raise InfrastructureError("processes of the container do not end")
