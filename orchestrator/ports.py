"""Everything that the control plane needs from outside, on one page.

Adapters implement it; fakes pass the same suites.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID

import gymnasium

from orchestrator.domain.episodes import (
    CommitOutcome,
    EpisodeKey,
    EpisodeOutcome,
    EpisodeRun,
    FaultClass,
    FinishedEpisode,
    PlannedEpisode,
)
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.messages import EvalJobMessage, EvalResultMessage

# --------------------------------------------------------------------------------------------- time


class Clock(Protocol):
    """Time as the control plane sees it. Leases and job deadlines use database time instead."""

    def monotonic(self) -> float: ...

    async def sleep(self, seconds: float) -> None: ...


# --------------------------------------------------------------------------------------------- jobs


class ClaimRefusal(StrEnum):
    """Why a claim gave nothing."""

    CAPACITY = "capacity"
    LEASED = "leased"
    FINAL = "final"
    UNKNOWN = "unknown"
    POISONED = "poisoned"  # the claim ended the job FAILED: too many claims without progress
    CANCELLED = "cancelled"  # the claim found the cancel flag on a queued job and ended it


@dataclass(frozen=True, slots=True)
class Job:
    """A row of `jobs`, as read in one statement."""

    job_id: int
    message: EvalJobMessage
    status: JobStatus
    detail: str | None
    epoch: int
    lease_holder: UUID | None
    lease_is_live: bool
    deadline_seconds_left: float | None
    cancel_requested: bool
    container_id: UUID | None
    outcomes_at_claim: int
    error: str | None
    created_at: datetime
    finished_at: datetime | None
    local: bool  # entered through the local CLI: may name `file://` archives and policy servers by address


@dataclass(frozen=True, slots=True)
class Claim:
    """A job that this supervisor holds until its lease lapses."""

    job: Job
    epoch: int
    holder: UUID


@dataclass(frozen=True, slots=True)
class RenewedLease:
    """What a renewal tells the supervisor."""

    cancel_requested: bool
    deadline_seconds_left: float | None
    cancel_reason: str | None = None


# Both get the outcomes in plan order and the number of planned episodes; the second the job as it ends.
ResultBuilder = Callable[[Sequence[EpisodeOutcome], int], EvalResultMessage]
UnheldResultBuilder = Callable[[Job, Sequence[EpisodeOutcome], int], EvalResultMessage]


class JobStore(Protocol):
    """Jobs, leases and results. Every write of a supervisor is fenced by its epoch.

    Fenced calls raise `Fenced` when the epoch is not current, and `IllegalTransition` on a bug.
    """

    async def insert(self, message: EvalJobMessage, *, enqueue: bool, local: bool = False) -> bool: ...

    async def insert_invalid(self, job_id: int, payload: bytes, reason: str) -> bool: ...

    async def get(self, job_id: int) -> Job | None: ...

    async def claim(self, job_id: int, holder: UUID) -> Claim | ClaimRefusal: ...

    async def renew(self, claim: Claim) -> RenewedLease: ...

    async def set_status(self, claim: Claim, status: JobStatus, detail: str | None = None) -> None: ...

    async def finish(self, claim: Claim, status: JobStatus, build: ResultBuilder) -> EvalResultMessage:
        """Commit result, final status and their queue rows. `build` sees the ledger as the transaction does.

        Raises:
            InfrastructureError: COMPLETED was asked for, but an episode has no outcome.
        """
        ...

    async def finish_unheld(
        self, job_id: int, status: JobStatus, reason: str, build: UnheldResultBuilder
    ) -> bool:
        """End a job that nobody holds; False where somebody does, or it is final already."""
        ...

    async def watch(self, claim: Claim) -> RenewedLease: ...

    async def request_cancel(self, job_id: int, reason: str) -> JobStatus | None:
        """Flag the job for cancelling; its supervisor, or the reconciler, ends it. None: unknown job."""
        ...

    async def release(self, claim: Claim, why: str | None) -> None:
        """Give the lease up before it lapses: to hand the job over (None), or after a failure of ours."""
        ...

    async def last_attempt(self, job_id: int) -> int: ...

    async def register_container(self, claim: Claim, record: ContainerRecord) -> None: ...

    async def set_container_handle(self, claim: Claim, container_id: UUID, handle: str) -> None: ...

    async def current_container(self, claim: Claim) -> ContainerRecord | None: ...

    async def mark_container_removing(self, claim: Claim, container_id: UUID) -> None: ...

    async def mark_unclaimed_removing(self, container_id: UUID) -> bool:
        """Mark a container that no unfinished job claims; False where one does. Unknown ones are nobody's."""
        ...

    async def forget_container(self, container_id: UUID) -> None: ...


class Ledger(Protocol):
    """The episodes of jobs: the plan, the runs that were handed out, the outcomes."""

    async def store_plan(self, claim: Claim, episodes: Sequence[PlannedEpisode]) -> None: ...

    async def missing(self, job_id: int) -> list[PlannedEpisode]: ...

    async def assign(self, claim: Claim, keys: Sequence[EpisodeKey]) -> list[EpisodeRun]: ...

    async def commit(self, finished: Sequence[FinishedEpisode]) -> list[CommitOutcome]: ...

    async def stage_part(self, run: EpisodeRun, part: int, step_messages: Sequence[bytes]) -> bool: ...

    async def outcomes(self, job_id: int) -> list[EpisodeOutcome]: ...


# --------------------------------------------------------------------------------------- containers


@dataclass(frozen=True, slots=True)
class ContainerLimits:
    """What a submission may use. Bytes and cores."""

    memory_bytes: int | None = None
    disk_bytes: int | None = None
    log_bytes: int = 4 * 2**20
    cpus: float | None = None
    gpus: int | None = None


@dataclass(frozen=True, slots=True)
class ContainerSpec:
    """One container attempt. `session_key` (32 bytes) is for this container alone and never logged."""

    container_id: UUID
    installation_id: UUID
    job_id: int
    attempt: int
    expires_at: datetime
    session_key: bytes = field(repr=False)
    limits: ContainerLimits = field(default_factory=ContainerLimits)
    image: str | None = None


@dataclass(frozen=True, slots=True)
class ContainerRecord:
    """A row of `containers`."""

    container_id: UUID
    job_id: int
    attempt: int
    handle: str | None
    removing: bool = False


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a policy listens."""

    host: str
    port: int


class Verdict(StrEnum):
    """Whose fault a container's end was."""

    SUBMISSION = "submission"
    INFRASTRUCTURE = "infrastructure"


@dataclass(frozen=True, slots=True)
class Evidence:
    """How a container stands or ended. `verdict` and `fault` are None while it runs."""

    running: bool
    reason: str  # words for a person: "running", "exit code 139 (SIGSEGV)", "out of memory", "gone"
    verdict: Verdict | None = None
    fault: FaultClass | None = None
    exit_code: int | None = None


@dataclass(frozen=True, slots=True)
class OwnedContainer:
    """Something of ours that exists outside, for the reconciler."""

    container_id: UUID
    handle: str
    job_id: int | None
    expired: bool


class Containers(Protocol):
    """Where submissions run. Every method is idempotent; a `handle` is an opaque string that outlives us."""

    async def create(self, spec: ContainerSpec) -> str:
        """The handle of the container of `spec.container_id`, created unless it exists.

        Raises:
            InfrastructureError: it could not be created; nothing of it is left.
        """
        ...

    async def wait_ready(
        self,
        handle: str,
        timeout_seconds: float,
        tell: Callable[[str], Awaitable[None]] | None = None,
    ) -> Endpoint:
        """Where its submission host accepts connections. `tell` hears each new reason why it still waits.

        Raises:
            SubmissionError: it ended before (the evidence is against the submission).
            InfrastructureError: it ended through no fault of the submission, or the time is over.
            UsageError: it can never begin, because of what the job itself asks for.
        """
        ...

    async def logs(self, handle: str, tail_bytes: int) -> str:
        """The end of what it printed, control characters escaped; "" when it is gone."""
        ...

    async def evidence(self, handle: str) -> Evidence: ...

    async def remove(self, handle: str) -> None:
        """Returns when every process and file of it is gone; silently when it was gone before."""
        ...

    async def list_owned(self, installation_id: UUID) -> list[OwnedContainer]: ...


# -------------------------------------------------------------------------------------------- policy

Observation = dict[str, Any]


class PolicyConnection(Protocol):
    """One blocking connection to a policy. After any error it must be closed, never used again.

    Raises (both calls): PolicyLost, PolicyLate, PolicyProtocolError, PolicyRaised.
    """

    @property
    def metadata(self) -> Mapping[str, Any]: ...

    @property
    def supports_reset(self) -> bool: ...

    def reset(self, episode: int, seed: int, timeout_seconds: float) -> None:
        """Tell the policy that an episode begins; a no-op where the server did not announce `reset`."""
        ...

    def act(self, observation: Observation, timeout_seconds: float) -> Any:
        """The `actions` of the reply to one observation: an array, a scalar or a dict of arrays."""
        ...

    def close(self) -> None: ...


class PolicyConnector(Protocol):
    """Opens connections to one endpoint. Pickles, so that a supervisor can hand it to its workers."""

    def connect(self, timeout_seconds: float) -> PolicyConnection:
        """A connection whose metadata was read.

        Raises:
            PolicyLost, PolicyLate, PolicyProtocolError, AuthenticationFailed.
            PolicyRaised: the server could not make an instance of the policy for this connection.
        """
        ...


class HostClient(Protocol):
    """Talks to the submission host of a container before it is a policy server."""

    async def push_archive(
        self,
        archive: Path,
        sha256: str,
        timeout_seconds: float,
        tell: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        """Returns when the policy answers; pushing again to one that has the archive only waits.

        While the host makes the submission's environment, the time stands still, and `tell` hears what goes
        on, and "" when that is done.

        Raises:
            SubmissionError: the archive was refused or the policy did not load, with the reason (traceback).
            SubmissionSilent: the host held the archive, then was lost or broke the protocol.
            InfrastructureError: the host was lost, or was late before it held the archive.
        """
        ...


# ----------------------------------------------------------------------------------------- benchmarks


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step of an environment gave. `reward` is a Python float, bit for bit the environment's."""

    observation: Observation
    reward: float
    terminated: bool
    truncated: bool
    info: Mapping[str, Any]


class Environment(Protocol):
    """One environment of one task. Observations are dicts, just as they are sent on the wire."""

    @property
    def action_space(self) -> gymnasium.Space[Any]: ...

    @property
    def observation_space(self) -> gymnasium.Space[Any]: ...

    def reset(self, seed: int) -> Observation: ...

    def step(self, action: Any) -> StepResult: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class EpisodeSummary:
    """What a success rule may look at. `info_success` is None where no step's info had `success`."""

    episode_return: float
    steps: int
    terminated: bool
    truncated: bool
    info_success: bool | None


@dataclass(frozen=True, slots=True)
class BenchmarkDescription:
    """What a worker says of a job's benchmark; made where the simulators are installed."""

    task_ids: tuple[str, ...]
    default_episodes_per_task: int
    success_rule: str
    env_specs: tuple[dict[str, Any], ...]
    versions: dict[str, str]


class Benchmark(Protocol):
    """A named set of tasks of one provider, made for one job's config."""

    @property
    def task_ids(self) -> Sequence[str]: ...

    @property
    def default_episodes_per_task(self) -> int: ...

    @property
    def success_rule(self) -> str:
        """The rule of `succeeded` in words, for the result."""
        ...

    def make(self, task_id: str) -> Environment: ...

    def succeeded(self, task_id: str, episode: EpisodeSummary) -> bool: ...

    def env_name(self, task_id: str) -> str: ...

    def env_specs(self) -> list[dict[str, Any]]: ...

    def versions(self) -> dict[str, str]:
        """Versions of simulator and packages that decide the numbers."""
        ...


class BenchmarkProvider(Protocol):
    """What an entry point of the group `orchestrator.benchmarks` names."""

    name: str

    def benchmark_names(self) -> Sequence[str]: ...

    def load(
        self, benchmark_name: str, config: Mapping[str, Any], spec: Mapping[str, Any] | None
    ) -> Benchmark:
        """The benchmark.

        Raises:
            UsageError: unknown name (lists what there is and the nearest match) or unusable config.
        """
        ...
