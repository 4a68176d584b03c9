"""The messages that enter and leave through pgqueuer: UTF-8 JSON, unknown fields kept."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)

from orchestrator.domain.errors import InvalidJob
from orchestrator.domain.job_documents import (
    MAX_JOB_ID,
    absurdity_of,
    excess_of,
    in_words,
    lenient_document,
    printable,
    readable_job_id,
)
from orchestrator.domain.lifecycle import JobStatus

QUEUE_ADD_JOB = "add_job"
QUEUE_RESULT = "eval_result"
QUEUE_STATUS = "job_status_update"
QUEUE_EPISODE = "episode_data"
QUEUE_STEP = "episode_step_data"
NOT_VALID = "the job's message is not valid: "
PROTOCOLS = ("openpi",)

OUTGOING_QUEUES = (QUEUE_RESULT, QUEUE_STATUS, QUEUE_EPISODE, QUEUE_STEP)

MAX_NAME_CHARS = 512
# Of a message that does not validate, these are kept for its result.
IDENTIFYING_FIELDS = ("competition_id", "submission_id", "miner_hotkey", "env_provider", "benchmark_name")


def _no_bool(value: Any) -> Any:
    """Python takes true for 1, which nobody means."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _sha256(value: str) -> str:
    if re.fullmatch("[0-9a-fA-F]{64}", value) is None:
        raise ValueError("must be a sha256 as 64 hexadecimal digits")
    return value


def _pinned_image(value: str) -> str:
    if re.search("@sha256:[0-9a-f]{64}$", value) is None:
        raise ValueError("must be an image pinned by its digest, like name@sha256:...")
    return value


def _known_protocol(value: str) -> str:
    if value not in PROTOCOLS:
        raise ValueError(f"must be a protocol that is spoken here: {', '.join(PROTOCOLS)}")
    return value


# Strict: a job_id that was meant as text or a fraction is none, and must not become another job's.
JobId = Annotated[int, Field(strict=True, ge=0, le=MAX_JOB_ID)]
Whole = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
# Names stand in every telemetry message of a job.
Name = Annotated[str, Field(max_length=MAX_NAME_CHARS)]
ScoreName = Literal["success_rate", "avg_reward"]
OutOfBounds = Literal["clip", "fault"]


def utc_now() -> datetime:
    return datetime.now(UTC)


class Message(BaseModel):
    """What all messages share."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=True, ser_json_inf_nan="null")

    message_type: str
    timestamp: AwareDatetime = Field(default_factory=utc_now)

    def to_json(self) -> bytes:
        """UTF-8 JSON; numbers that are not finite become null."""
        return self.model_dump_json(exclude_none=True).encode()


class Resources(BaseModel):
    """What one job may use."""

    model_config = ConfigDict(extra="allow", frozen=True)

    workers: Annotated[Whole, Field(ge=1, le=1024)] | None = None
    cpus_per_worker: Annotated[Number, Field(ge=0.01, le=1024)] | None = None
    memory_bytes: Annotated[Whole, Field(ge=16 * 2**20, le=2**50)] | None = (
        None  # of the submission, as below
    )
    disk_bytes: Annotated[Whole, Field(ge=2**20, le=2**50)] | None = None
    cpus: Annotated[Number, Field(ge=0.01, le=1024)] | None = None
    gpus: Annotated[Whole, Field(ge=0, le=64)] | None = None


class JobConfig(BaseModel):
    """The part of a job's `config` that the control plane itself reads; the rest is the benchmark's."""

    model_config = ConfigDict(extra="allow", frozen=True)

    episodes_per_task: Annotated[Whole, Field(ge=1, le=1_000_000)] | None = None
    max_episode_steps: Annotated[Whole, Field(ge=1, le=100_000_000)] | None = None
    seed: Annotated[Whole, Field(ge=0, le=2**63 - 1)] | None = None
    score: ScoreName = "success_rate"
    success_threshold: Number | None = None
    step_log_interval: Annotated[Whole, Field(ge=1, le=1_000_000_000)] | None = None
    step_timeout_seconds: Annotated[Number, Field(gt=0, le=86_400)] | None = None
    episode_timeout_seconds: Annotated[Number, Field(gt=0, le=864_000)] | None = None
    action_horizon: Annotated[Whole, Field(ge=1, le=1_000_000)] = 1
    stateless: bool = False
    out_of_bounds_actions: OutOfBounds | None = None


class EvalJobMessage(Message):
    """`add_job`: evaluate this submission on this benchmark."""

    message_type: str = "eval_job"
    job_id: JobId
    competition_id: Name = ""
    submission_id: Name = ""
    miner_hotkey: Name = ""
    hf_repo_id: Name | None = None
    env_provider: Annotated[Name, Field(min_length=1)]
    benchmark_name: Annotated[Name, Field(min_length=1)]
    config: dict[str, Any] = Field(default_factory=dict)
    benchmark_spec: dict[str, Any] | None = None
    timeout_seconds: Annotated[Number, Field(gt=0, le=10_000_000)] | None = None
    artifact_url: Annotated[str, Field(max_length=8192)] | None = None
    artifact_expires_at: AwareDatetime | None = None
    artifact_sha256: Annotated[str, AfterValidator(_sha256)] | None = None
    artifact_size_bytes: Annotated[Whole, Field(ge=0, le=2**50)] | None = None
    image: Annotated[Name, AfterValidator(_pinned_image)] | None = None
    protocol: Annotated[Name, AfterValidator(_known_protocol)] = "openpi"
    priority: Annotated[Whole, Field(ge=-(2**31), le=2**31 - 1)] = 0
    seed_group: Name | None = None
    episodes_per_task: Annotated[Whole, Field(ge=1, le=1_000_000)] | None = None
    resources: Resources = Field(default_factory=Resources)
    tags: Annotated[dict[str, str], Field(max_length=1000)] = Field(default_factory=dict)

    @field_validator("config")
    @classmethod
    def _config_is_sound(cls, config: dict[str, Any]) -> dict[str, Any]:
        JobConfig.model_validate(config)
        return config

    @property
    def job_config(self) -> JobConfig:
        return JobConfig.model_validate(self.config)

    @property
    def effective_seed_group(self) -> str:
        """What the job's seeds are derived for; a job that names this group gets the same seeds."""
        if self.seed_group is None and self.job_config.seed is not None:
            return "open"
        return self.seed_group or self.competition_id or f"job-{self.job_id}"

    @classmethod
    def parse(cls, payload: bytes | str) -> EvalJobMessage:
        """The message in `payload`.

        Raises:
            InvalidJob: it does not validate; its `job_id` is the message's where one can be read, else None.
        """
        excess = excess_of(payload)
        if excess is not None:
            raise _not_valid(payload, excess)
        try:
            message = cls.model_validate_json(payload)
        except ValidationError as error:
            raise _not_valid(payload, in_words(error)) from error
        absurdity = absurdity_of(payload)
        if absurdity is not None:
            raise _not_valid(payload, absurdity)
        return message

    @classmethod
    def salvage(cls, job_id: int, payload: bytes | str) -> EvalJobMessage:
        """What identifies the job of a message that does not validate, "unknown" for what cannot be read.

        Its `message_type` is "invalid": it is not the same job as a valid message with these fields.
        """
        document = lenient_document(payload)
        read = {name: document[name] for name in IDENTIFYING_FIELDS if _is_a_name(document.get(name))}
        fixed = {"message_type": "invalid", "job_id": job_id}
        return cls.model_validate({"env_provider": "unknown", "benchmark_name": "unknown"} | read | fixed)

    def to_json(self) -> bytes:
        """UTF-8 JSON without the known fields that are null; of unknown ones nothing is left out."""
        return self.model_dump_json(
            exclude={**_null_fields(self), "resources": _null_fields(self.resources)}
        ).encode()


def _null_fields(model: BaseModel) -> dict[str, Literal[True]]:
    return {name: True for name in type(model).model_fields if getattr(model, name) is None}


def _not_valid(payload: bytes | str, reason: str) -> InvalidJob:
    return InvalidJob(readable_job_id(payload), f"{NOT_VALID}{printable(reason)}")


def _is_a_name(value: Any) -> bool:
    try:
        return isinstance(value, str) and 0 < len(value) <= MAX_NAME_CHARS and bool(value.encode())
    except UnicodeEncodeError:  # JSON can spell half a character
        return False


class JobStatusUpdateMessage(Message):
    """`job_status_update`: one for every change of a job's status."""

    message_type: Literal["job_status_update"] = "job_status_update"
    job_id: JobId
    validator_hotkey: str
    status: JobStatus
    detail: str | None = None


class EvalResultMessage(Message):
    """`eval_result`: exactly one for every job."""

    message_type: Literal["eval_result"] = "eval_result"
    status: JobStatus
    job_id: JobId
    validator_hotkey: str
    miner_hotkey: str
    competition_id: str
    env_provider: str
    benchmark_name: str
    config: dict[str, Any]
    benchmark_spec: dict[str, Any] | None = None
    score: float | None
    success_rate: float | None = None
    avg_reward: float | None = None
    total_episodes: int | None = None
    env_specs: list[dict[str, Any]] | None = None
    logs: str | None = None
    error: str | None = None
    extra_data: dict[str, Any] | None = None

    def to_json(self) -> bytes:
        """UTF-8 JSON with every field: a score that there is none of is null, and not left out."""
        return self.model_dump_json().encode()


class EpisodeDataMessage(Message):
    """`episode_data`: one for every episode with an outcome. `final_reward` is the episode's return."""

    message_type: Literal["episode_data"] = "episode_data"
    job_id: JobId
    submission_id: str
    task_id: str
    episode_id: int
    env_name: str
    benchmark_name: str
    final_reward: float
    success: bool
    steps: int
    start_time: AwareDatetime
    end_time: AwareDatetime
    extra_metrics: dict[str, Any] | None = None


class EpisodeStepDataMessage(Message):
    """`episode_step_data`: one for every logged step.

    `action` is `{"type", "value", "shape"}`; `observation_refs` maps a camera to `{"bucket", "key", "url"}`.
    """

    message_type: Literal["episode_step_data"] = "episode_step_data"
    job_id: JobId
    env_name: str
    benchmark_name: str
    submission_id: str
    task_id: str
    episode_id: int
    step: int
    action: dict[str, Any]
    reward: float
    done: bool
    truncated: bool
    observation_refs: dict[str, dict[str, str]] = Field(default_factory=dict)
    info: dict[str, Any] | None = None
    step_timestamp: AwareDatetime
