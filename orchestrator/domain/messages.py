"""The messages that enter and leave through pgqueuer: UTF-8 JSON, unknown fields kept."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from orchestrator.domain.errors import InvalidJob
from orchestrator.domain.lifecycle import JobStatus

QUEUE_ADD_JOB = "add_job"
QUEUE_RESULT = "eval_result"
QUEUE_STATUS = "job_status_update"
QUEUE_EPISODE = "episode_data"
QUEUE_STEP = "episode_step_data"
OUTGOING_QUEUES = (QUEUE_RESULT, QUEUE_STATUS, QUEUE_EPISODE, QUEUE_STEP)

MAX_JOB_ID = 2**63 - 1
JobId = Annotated[int, Field(ge=0, le=MAX_JOB_ID)]
ScoreName = Literal["success_rate", "avg_reward"]


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

    workers: Annotated[int, Field(ge=1, le=1024)] | None = None
    cpus_per_worker: Annotated[float, Field(gt=0, le=1024)] | None = None
    memory_bytes: Annotated[int, Field(ge=16 * 2**20)] | None = None


class JobConfig(BaseModel):
    """The part of a job's `config` that the control plane itself reads; the rest is the benchmark's."""

    model_config = ConfigDict(extra="allow", frozen=True)

    episodes_per_task: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    max_episode_steps: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    score: ScoreName = "success_rate"
    success_threshold: float | None = None
    step_log_interval: Annotated[int, Field(ge=1)] | None = None
    step_timeout_seconds: Annotated[float, Field(gt=0, le=86_400)] | None = None
    episode_timeout_seconds: Annotated[float, Field(gt=0, le=864_000)] | None = None
    action_horizon: Annotated[int, Field(ge=1)] = 1
    stateless: bool = False


class EvalJobMessage(Message):
    """`add_job`: evaluate this submission on this benchmark."""

    message_type: str = "eval_job"
    job_id: JobId
    competition_id: str = ""
    submission_id: str = ""
    miner_hotkey: str = ""
    hf_repo_id: str | None = None
    env_provider: Annotated[str, Field(min_length=1)]
    benchmark_name: Annotated[str, Field(min_length=1)]
    config: dict[str, Any] = Field(default_factory=dict)
    benchmark_spec: dict[str, Any] | None = None
    timeout_seconds: Annotated[float, Field(gt=0, le=10_000_000)] | None = None
    artifact_url: str | None = None
    artifact_expires_at: AwareDatetime | None = None
    artifact_sha256: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")] | None = None
    artifact_size_bytes: Annotated[int, Field(ge=0)] | None = None
    image: Annotated[str, Field(pattern=r"@sha256:[0-9a-f]{64}$")] | None = None
    protocol: str = "openpi"
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] = 0
    seed_group: str | None = None
    episodes_per_task: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    resources: Resources = Field(default_factory=Resources)
    tags: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _config_is_sound(self) -> Self:
        JobConfig.model_validate(self.config)
        return self

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
        try:
            return cls.model_validate_json(payload)
        except ValidationError as error:
            raise InvalidJob(_readable_job_id(payload), _in_words(error)) from error


def _readable_job_id(payload: bytes | str) -> int | None:
    class OnlyJobId(BaseModel):
        model_config = ConfigDict(extra="ignore")
        job_id: JobId

    try:
        return OnlyJobId.model_validate_json(payload).job_id
    except ValidationError:
        return None


def _in_words(error: ValidationError) -> str:
    """What is wrong, in printable characters and bounded: names and values come from strangers."""
    parts = []
    for item in error.errors(include_url=False, include_input=True)[:5]:
        place = ".".join(str(part) for part in item["loc"]) or "message"
        shown = repr(item.get("input"))
        given = "" if len(shown) > 80 or item["type"] == "missing" else f" (got {shown})"
        parts.append(f"{_shortened(place, 80)}: {_shortened(item['msg'], 240)}{given}")
    return printable("; ".join(parts))


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def printable(text: str) -> str:
    """`text` with its control characters and lone surrogates escaped: no JSONB column takes a NUL."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text
    )


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
