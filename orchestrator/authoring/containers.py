"""Starts the submission that is checked, as a job does: in a process container, by the submission host."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from uuid import uuid4

import psutil

from orchestrator.actors.submission_container import Archive, hand_over, settled_evidence
from orchestrator.adapters.policies.websocket import WebSocketConnector
from orchestrator.adapters.postgres.server_files import default_data_dir
from orchestrator.local_containers import process_containers, submission_host
from orchestrator.ports import ContainerLimits, Containers, ContainerSpec, Endpoint, Evidence, HostClient
from orchestrator.settings import Settings
from orchestrator.waiting import uninterrupted

SCRATCH_PREFIX = "orchestrator-check-"
# The containers end with this process, whatever ends it; this is for a machine that was asleep.
LIFETIME = timedelta(days=1)
KEY_BYTES = 32
LOG_TAIL_BYTES = 16 * 1024

_UUID = "[0-9a-f-]{36}"


@dataclass(frozen=True)
class RunningSubmission:
    """A submission that answers."""

    connector: WebSocketConnector
    handle: str
    start_seconds: float
    preparation_seconds: float  # before that, for its environment


class CheckContainers:
    """The containers of one check, all below one directory of its own."""

    def __init__(
        self,
        containers: Containers,
        base: Path,
        archive: Archive,
        limits: ContainerLimits,
        host_client: Callable[[Endpoint, bytes], HostClient],
    ) -> None:
        self._containers = containers
        self._host_client = host_client
        self._archive = archive
        self._limits = limits
        self._installation_id = uuid4()
        self._attempt = 0
        self._submission_directory = re.compile(
            f"{re.escape(str(base))}/{_UUID}/{_UUID}/home/work/submission/"
        )

    async def start(self, timeout_seconds: float) -> RunningSubmission:
        """The submission in a fresh container.

        Raises:
            SubmissionError: it cannot be used, with the reason and the end of what it printed.
            InfrastructureError: the container did not come up through no fault of the submission.
        """
        self._attempt += 1
        key = secrets.token_bytes(KEY_BYTES)
        started_at = time.monotonic()
        preparation = _Preparation()
        spec = ContainerSpec(
            container_id=uuid4(),
            installation_id=self._installation_id,
            job_id=0,
            attempt=self._attempt,
            expires_at=datetime.now(UTC) + LIFETIME,
            session_key=key,
            limits=self._limits,
        )
        # What is half made when Ctrl-C comes would be found by nobody.
        handle = await uninterrupted(self._containers.create(spec))
        endpoint = await hand_over(
            self._containers,
            handle,
            lambda endpoint: self._host_client(endpoint, key),
            self._archive,
            timeout_seconds,
            preparation.note,
        )
        connector = WebSocketConnector(endpoint.host, endpoint.port, key)
        seconds = time.monotonic() - started_at
        return RunningSubmission(connector, handle, seconds - preparation.seconds, preparation.seconds)

    async def evidence(self, submission: RunningSubmission, *, was_lost: bool) -> Evidence:
        """How its container stands; after a lost connection an end is given a moment to show."""
        if was_lost:
            return await settled_evidence(self._containers, submission.handle)
        return await self._containers.evidence(submission.handle)

    async def log_tail(self, submission: RunningSubmission) -> str:
        """The end of what it printed."""
        return self.as_the_author_sees(await self._containers.logs(submission.handle, LOG_TAIL_BYTES))

    def as_the_author_sees(self, text: str) -> str:
        """`text` with paths of the unpacked submission as they are in its own directory."""
        return self._submission_directory.sub("", text)

    async def remove(self, submission: RunningSubmission) -> None:
        """End it, and remove all of it."""
        await self._containers.remove(submission.handle)

    async def remove_all(self) -> None:
        """Remove every container that is still there."""
        for owned in await self._containers.list_owned(self._installation_id):
            await self._containers.remove(owned.handle)


class _Preparation:
    """How long the host was at the submission's environment, as far as it was heard of."""

    def __init__(self) -> None:
        self._began_at: float | None = None
        self.seconds = 0.0

    async def note(self, doing: str) -> None:
        now = time.monotonic()
        if self._began_at is None:
            self._began_at = now
        self.seconds = now - self._began_at


@asynccontextmanager
async def check_containers(
    archive: Archive, limits: ContainerLimits, scratch: Path, settings: Settings
) -> AsyncIterator[CheckContainers]:
    """Containers below `scratch` for the block; nothing of them is left after it, however it ends."""
    base = scratch.resolve() / "containers"
    data = settings.data_dir or default_data_dir()
    processes = process_containers(settings, data, base, watch_pid=os.getpid())
    containers = CheckContainers(processes, base, archive, limits, partial(submission_host, settings))
    try:
        yield containers
    finally:
        await uninterrupted(containers.remove_all())


def make_scratch_directory() -> Path:
    """A directory for one check, named after this process; those of dead processes are removed."""
    parent = Path(tempfile.gettempdir())
    for old in parent.glob(f"{SCRATCH_PREFIX}*-*"):
        process = old.name.removeprefix(SCRATCH_PREFIX).split("-")[0]
        if process.isdigit() and not psutil.pid_exists(int(process)) and _is_ours(old):
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{SCRATCH_PREFIX}{os.getpid()}-"))


def _is_ours(directory: Path) -> bool:
    try:
        return directory.lstat().st_uid == os.getuid()
    except OSError:
        return False


def remove_scratch_directory(directory: Path) -> None:
    """Remove it with all that is in it."""
    shutil.rmtree(directory, ignore_errors=True)
