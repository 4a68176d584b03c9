"""What a check plays of one task, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from orchestrator.authoring.playing import Played
from orchestrator.authoring.repeatability import Repetitions, Words
from orchestrator.domain.episodes import PlannedEpisode, open_secret, plan_episodes
from orchestrator.domain.messages import EvalJobMessage

DEFAULT_SEED = 0
# Later runs of an episode are cut where the first one took longer than this.
REPETITION_SECONDS = 10.0
FEWEST_REPEATED_STEPS = 5
# Only the first actions of an episode may tell what the last one left behind; and often not even they do.
BEGINNINGS = 8
STEPS_OF_A_BEGINNING = 10
BEGINNINGS_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class CheckPlan:
    """What is to be played: the job as it would be evaluated, and how many episodes of which tasks."""

    job: EvalJobMessage
    episodes: int = 2
    all_tasks: bool = False

    def tasks(self, task_ids: Sequence[str]) -> list[TaskRuns]:
        """The episodes of each task, with the seeds that `eval --seed` gives them."""
        seed = self.job.job_config.seed
        secret = open_secret(DEFAULT_SEED if seed is None else seed)
        count = self.episodes + BEGINNINGS
        runs = []
        for task_id in task_ids if self.all_tasks else task_ids[:1]:
            planned = plan_episodes([task_id], count, secret=secret, seed_group="open")
            runs.append(TaskRuns(planned[: self.episodes], planned[self.episodes :]))
        return runs


@dataclass
class TaskRuns:
    """The episodes of one task: those that are played to their end, and those of which only the beginning is.

    `in_order` and `in_reverse` are runs of the beginnings, after other episodes each time.
    """

    episodes: list[PlannedEpisode]
    beginnings: list[PlannedEpisode]
    played: list[Played] = field(default_factory=list)
    again: Played | None = None
    other_instance: Played | None = None
    other_process: Played | None = None
    in_order: list[Played] = field(default_factory=list)
    in_reverse: list[Played] = field(default_factory=list)

    @property
    def task_id(self) -> str:
        return self.episodes[0].task_id

    @property
    def repeated_steps(self) -> int | None:
        """How many steps of the first episode later runs play; None: all of them."""
        first = self.played[0]
        if first.policy_seconds <= REPETITION_SECONDS:
            return None
        share = REPETITION_SECONDS / first.policy_seconds
        return max(FEWEST_REPEATED_STEPS, int(len(first.exchanges) * share))

    @property
    def affordable_beginnings(self) -> list[PlannedEpisode]:
        """As many as there is time for."""
        return self.beginnings[: self._affordable_steps]

    @property
    def steps_of_a_beginning(self) -> int:
        return min(STEPS_OF_A_BEGINNING, max(1, self._affordable_steps // BEGINNINGS))

    @property
    def _affordable_steps(self) -> int:
        """In each of the two instances that begin these episodes."""
        first = self.played[0]
        return int(BEGINNINGS_SECONDS / 2 * len(first.exchanges) / (first.policy_seconds + 1e-9))

    def repetitions(self, words: Words) -> Repetitions:
        """The runs, for `judge_repetitions`."""
        assert self.again is not None
        assert self.other_instance is not None
        return Repetitions(
            self.played[0],
            self.again,
            self.other_instance,
            self.other_process,
            tuple(zip(self.in_order, reversed(self.in_reverse), strict=True)),
            self.repeated_steps,
            words,
        )
