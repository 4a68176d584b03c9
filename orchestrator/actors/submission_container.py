"""The container of one job: adopted or created, given its archive, replaced, and removed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol
from uuid import UUID, uuid4

import structlog

from orchestrator.domain.episodes import FaultClass
from orchestrator.domain.errors import (
    Fenced,
    InfrastructureError,
    OrchestratorError,
    SubmissionError,
    SubmissionKilled,
    SubmissionSilent,
)
from orchestrator.ports import (
    Claim,
    ContainerLimits,
    ContainerRecord,
    Containers,
    ContainerSpec,
    Endpoint,
    Evidence,
    HostClient,
    JobStore,
    PolicyConnector,
    Verdict,
)
from orchestrator.waiting import uninterrupted

log = structlog.get_logger(__name__)

# After the deadline a container may live this long, so that a supervisor that comes back can still read it.
EXPIRY_GRACE_SECONDS = 600.0
KILLED = 137  # the exit code that stands for SIGKILL
# A connection is often lost a moment before the process's end can be read.
END_OF_PROCESS_SECONDS = 3.0
END_OF_POD_SECONDS = 6.0  # a kubelet looks at its containers every second, and writes what it saw later
LOG_TAIL_BYTES = 16 * 1024
# Each change of a job's detail is a message for the validator.
PROGRESS_SECONDS = 5.0
ADOPTION_SECONDS = 10.0


Say = Callable[[str], Awaitable[None]]
"""Takes words on what goes on."""


@dataclass(frozen=True, slots=True)
class Archive:
    """A submission's archive on this machine."""

    path: Path
    sha256: str


class PolicySource(Protocol):
    """Where the policy of a job is to be had."""

    async def start(self, claim: Claim, say: Say | None = None) -> PolicyConnector: ...

    async def replace(self, claim: Claim) -> PolicyConnector: ...

    async def evidence(self) -> Evidence: ...

    async def logs(self) -> str: ...

    async def remove(self, claim: Claim) -> None: ...


@dataclass(frozen=True)
class ContainerTools:
    """What a submission's container is made with."""

    store: JobStore
    containers: Containers
    host_client: Callable[[Endpoint, bytes], HostClient]
    connector: Callable[[Endpoint, bytes], PolicyConnector]
    session_key: Callable[[UUID], bytes]
    installation_id: UUID
    limits: ContainerLimits
    start_up_timeout_seconds: float
    end_shows_seconds: float = END_OF_PROCESS_SECONDS


@dataclass
class SubmissionContainer:
    """`PolicySource` that runs the submission itself."""

    tools: ContainerTools
    fetch_archive: Callable[[], Awaitable[Archive]]
    _record: ContainerRecord | None = field(default=None, init=False)
    _archive: Archive | None = field(default=None, init=False)

    async def start(self, claim: Claim, say: Say | None = None) -> PolicyConnector:
        """A connector to a policy that answers: in the container of an earlier epoch, or in a new one.

        `say` hears of it while the submission's environment is made, which may take long.

        Raises:
            SubmissionError: the archive or the policy cannot be used, with the reason and the log's tail.
            InfrastructureError: the container did not come up through no fault of the submission.
        """
        record = await self.tools.store.current_container(claim)
        if record is not None:
            self._record = record
            connector = await self._adopt(record)
            if connector is not None:
                return connector
            await self.remove(claim)
        return await self._create(claim, say)

    async def _adopt(self, record: ContainerRecord) -> PolicyConnector | None:
        """A connector to the container, if its policy answers: it has the archive already, and needs none."""
        if record.handle is None:
            return None
        try:
            async with asyncio.timeout(2 * ADOPTION_SECONDS):  # also for one that waits for room
                endpoint = await self.tools.containers.wait_ready(record.handle, ADOPTION_SECONDS)
            connector = self.tools.connector(endpoint, self.tools.session_key(record.container_id))
            connection = await asyncio.to_thread(connector.connect, ADOPTION_SECONDS)
            await asyncio.to_thread(connection.close)
        except (OrchestratorError, TimeoutError) as error:
            log.warning("container_not_adopted", container_id=str(record.container_id), why=str(error))
            return None
        return connector

    async def replace(self, claim: Claim) -> PolicyConnector:
        """A connector to a fresh container, after the current one was removed."""
        await self.remove(claim)
        return await self._create(claim)

    async def evidence(self) -> Evidence:
        """How the container stands, given a moment for an end that is about to show."""
        if self._record is None or self._record.handle is None:
            return Evidence(False, "there is no container", Verdict.INFRASTRUCTURE)
        return await settled_evidence(
            self.tools.containers, self._record.handle, self.tools.end_shows_seconds
        )

    async def logs(self) -> str:
        """The end of what the submission printed."""
        if self._record is None or self._record.handle is None:
            return ""
        return await self.tools.containers.logs(self._record.handle, LOG_TAIL_BYTES)

    async def remove(self, claim: Claim) -> None:
        """Mark, remove and forget the current container.

        Raises:
            Fenced: it belongs to another incarnation now; nothing was removed.
        """
        record = self._record or await self.tools.store.current_container(claim)
        self._record = None
        if record is None:
            return
        await self.tools.store.mark_container_removing(claim, record.container_id)
        if record.handle is not None:
            await self.tools.containers.remove(record.handle)
        await self.tools.store.forget_container(record.container_id)

    async def _create(self, claim: Claim, say: Say | None = None) -> PolicyConnector:
        """A connector to a fresh container; to a second one where the first fell silent, as a network may, or
        was killed, as by an operator or a node: no program is killed by its own mistake.
        """
        try:
            return await self._create_once(claim, say)
        except (SubmissionSilent, SubmissionKilled) as error:
            log.warning("submission_did_not_start", job_id=claim.job.job_id, why=str(error))
        await self.remove(claim)
        try:
            return await self._create_once(claim, say)
        except SubmissionSilent as error:
            raise SubmissionError(
                f"the submission took its archive and then did not answer as its server should ({error}), "
                "in two containers one after the other",
                await self.logs(),
            ) from error

    async def _create_once(self, claim: Claim, say: Say | None) -> PolicyConnector:
        if self._archive is None:
            self._archive = await self.fetch_archive()
        attempt = await self.tools.store.last_attempt(claim.job.job_id) + 1
        record = ContainerRecord(uuid4(), claim.job.job_id, attempt, None)
        await self.tools.store.register_container(claim, record)
        self._record = record
        lifetime = (claim.job.deadline_seconds_left or 0.0) + EXPIRY_GRACE_SECONDS
        spec = ContainerSpec(
            container_id=record.container_id,
            installation_id=self.tools.installation_id,
            job_id=record.job_id,
            attempt=attempt,
            expires_at=datetime.now(UTC) + timedelta(seconds=lifetime),
            session_key=self.tools.session_key(record.container_id),
            limits=self.tools.limits,
            image=claim.job.message.image,
        )
        # To its end, also where we are cancelled: what exists and is not recorded, nobody knows of.
        handle = await uninterrupted(self._create_recorded(claim, spec))
        record = ContainerRecord(record.container_id, record.job_id, attempt, handle)
        self._record = record
        return await self._await_policy(record, say)

    async def _create_recorded(self, claim: Claim, spec: ContainerSpec) -> str:
        """The handle of the container, once that is recorded.

        Raises:
            Fenced: another incarnation holds the job; the container is gone if it does not hold that, too.
        """
        handle = await self.tools.containers.create(spec)
        try:
            await self.tools.store.set_container_handle(claim, spec.container_id, handle)
        except Fenced:
            if await self.tools.store.mark_unclaimed_removing(spec.container_id):
                await self.tools.containers.remove(handle)
                await self.tools.store.forget_container(spec.container_id)
            raise
        return handle

    async def _await_policy(self, record: ContainerRecord, say: Say | None) -> PolicyConnector:
        assert record.handle is not None
        assert self._archive is not None
        key = self.tools.session_key(record.container_id)
        endpoint = await hand_over(
            self.tools.containers,
            record.handle,
            lambda endpoint: self.tools.host_client(endpoint, key),
            self._archive,
            self.tools.start_up_timeout_seconds,
            None if say is None else _now_and_then(say),
            say,
            self.tools.end_shows_seconds,
        )
        return self.tools.connector(endpoint, key)


def _now_and_then(say: Say) -> Say:
    """Passes on the first of what it hears, and then at most one thing in `PROGRESS_SECONDS`."""
    said_at = float("-inf")

    async def tell(what: str) -> None:
        nonlocal said_at
        now = time.monotonic()
        if not what or now - said_at >= PROGRESS_SECONDS:
            said_at = now
            await say(f"makes the submission's environment: {what}" if what else "starts the submission")

    return tell


async def hand_over(
    containers: Containers,
    handle: str,
    host_client: Callable[[Endpoint], HostClient],
    archive: Archive,
    timeout_seconds: float,
    tell: Say | None = None,
    tell_waiting: Say | None = None,
    end_shows_seconds: float = END_OF_PROCESS_SECONDS,
) -> Endpoint:
    """Give a fresh container its archive; where the policy answers, once it does.

    `tell_waiting` hears what the container waits for before it runs; `tell` what goes on while the
    submission's environment is made, and "" when that is done.

    Raises:
        SubmissionError: archive or policy cannot be used, or ended the container; with the log's tail.
            SubmissionKilled: by SIGKILL, and not for want of memory.
        SubmissionSilent: the submission has its archive and runs, but does not answer as its server should.
        InfrastructureError: the container did not come up through no fault of the submission.
    """
    endpoint = await containers.wait_ready(handle, timeout_seconds, tell_waiting)
    try:
        # All of the time: what the container needed until here is not the submission's doing.
        await host_client(endpoint).push_archive(archive.path, archive.sha256, timeout_seconds, tell)
    except SubmissionError as error:
        tail = error.log_tail or await containers.logs(handle, LOG_TAIL_BYTES)
        raise SubmissionError(error.reason, tail) from error
    except InfrastructureError as error:
        # The host is part of the container: what ended it decides whose fault this was.
        evidence = await settled_evidence(containers, handle, end_shows_seconds)
        if evidence.verdict is Verdict.SUBMISSION:
            reason = f"the submission ended before it answered: {evidence.reason}"
            killed = evidence.exit_code == KILLED and evidence.fault is FaultClass.CRASH
            error_class = SubmissionKilled if killed else SubmissionError
            raise error_class(reason, await containers.logs(handle, LOG_TAIL_BYTES)) from error
        if not evidence.running:
            raise InfrastructureError(f"the container ended: {evidence.reason}") from error
        raise
    return endpoint


async def settled_evidence(
    containers: Containers, handle: str, end_shows_seconds: float = END_OF_PROCESS_SECONDS
) -> Evidence:
    """How the container stands, given a moment for an end that is about to show."""
    until = time.monotonic() + end_shows_seconds
    while True:
        evidence = await containers.evidence(handle)
        if not evidence.running or time.monotonic() > until:
            return evidence
        await asyncio.sleep(0.05)


@dataclass
class ExternalPolicy:
    """`PolicySource` for a policy server that runs already: nothing to start, nothing known of its end."""

    connector: PolicyConnector
    connect_timeout_seconds: float

    async def start(self, claim: Claim, say: Say | None = None) -> PolicyConnector:
        """The connector, after one connection was made with it.

        Raises:
            SubmissionError: nobody answers there as a policy server does.
        """
        try:
            connection = await asyncio.to_thread(self.connector.connect, self.connect_timeout_seconds)
        except OrchestratorError as error:
            raise SubmissionError(f"the policy server does not answer: {error}") from error
        await asyncio.to_thread(connection.close)
        return self.connector

    async def replace(self, claim: Claim) -> PolicyConnector:
        return await self.start(claim)

    async def evidence(self) -> Evidence:
        return Evidence(True, "a policy server that somebody else runs")

    async def logs(self) -> str:
        return ""

    async def remove(self, claim: Claim) -> None:
        return None
