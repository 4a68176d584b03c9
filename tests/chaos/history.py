"""What a chaos run leaves for its checker: what clients saw, what the database holds, what is left over."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

EpisodeKey = tuple[int, str, int]  # job, task, episode
Outcome = tuple[float, int]  # return, steps


@dataclass(frozen=True, slots=True)
class Received:
    """A message that a consumer of a queue got: that at `position` in a database's row of this number."""

    database: str
    queue: str
    row: int
    position: int
    message: dict[str, Any]

    @property
    def job_id(self) -> int:
        return int(self.message["job_id"])


@dataclass(frozen=True, slots=True)
class Write:
    """What a trigger noted of a write: `epoch` is that of who wrote, `current` the job's at that time."""

    what: str  # "outcome", "status" or "result"
    job_id: int
    task_id: str
    episode_id: int
    epoch: int
    current: int
    was_final: bool  # it had been finished before
    at: float = 0.0  # seconds since the epoch


@dataclass(frozen=True, slots=True)
class Play:
    """An episode that a submission was told to begin, at this time in seconds since the epoch."""

    job_id: int
    episode_id: int
    at: float


@dataclass(frozen=True, slots=True)
class EpisodeRow:
    """An episode as the ledger has it. `ended_at` is that of the run which counts."""

    job_id: int
    task_id: str
    episode_id: int
    finished: bool
    episode_return: float | None
    steps: int | None
    fault: str | None
    ended_at: float | None

    @property
    def key(self) -> EpisodeKey:
        return self.job_id, self.task_id, self.episode_id


@dataclass
class History:
    """Everything that the checker reads."""

    acknowledged: set[int] = field(default_factory=set)  # jobs whose enqueueing was answered
    received: list[Received] = field(default_factory=list)
    statuses: dict[int, str] = field(default_factory=dict)  # of every job in the database
    results: dict[int, dict[str, Any]] = field(default_factory=dict)
    episodes: list[EpisodeRow] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    plays: list[Play] = field(default_factory=list)
    expected: dict[EpisodeKey, Outcome] = field(default_factory=dict)  # of a run without faults
    done_to_submissions: dict[int, int] = field(default_factory=dict)  # job: faults that may cost an episode
    leftovers: list[str] = field(default_factory=list)
