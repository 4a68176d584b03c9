"""Plays the episodes of a check with a policy, and judges what they show of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from orchestrator.actors.episode_runner import EpisodeLimits
from orchestrator.adapters.policies.websocket import WebSocketConnector
from orchestrator.authoring.faults import PLAYS, Circumstances
from orchestrator.authoring.findings import Finding, Mark, Report, counted, sum_up
from orchestrator.authoring.measurements import (
    TaskActions,
    count_actions,
    judge_actions,
    judge_speed,
    space_in_words,
)
from orchestrator.authoring.playing import Played, Player, PlayingThread, PolicyInstance
from orchestrator.authoring.repeatability import Repetitions, Words, judge_repetitions
from orchestrator.domain.episodes import PlannedEpisode, open_secret, plan_episodes
from orchestrator.domain.errors import PolicyError
from orchestrator.domain.messages import EvalJobMessage
from orchestrator.limits import episode_limits
from orchestrator.settings import Settings

DEFAULT_SEED = 0
MOST_RETURNS = 5
# Later runs of an episode are cut where the first one took longer than this.
REPETITION_SECONDS = 10.0
FEWEST_REPEATED_STEPS = 5


@dataclass(frozen=True, slots=True)
class CheckPlan:
    """What is to be played: the job as it would be evaluated, and how many episodes of which tasks."""

    job: EvalJobMessage
    episodes: int = 2
    all_tasks: bool = False

    def tasks(self, task_ids: Sequence[str]) -> list[list[PlannedEpisode]]:
        """The episodes of each task, with the seeds that `eval --seed` gives them."""
        seed = self.job.job_config.seed
        secret = open_secret(DEFAULT_SEED if seed is None else seed)
        return [
            plan_episodes([task_id], self.episodes, secret=secret, seed_group="open")
            for task_id in (task_ids if self.all_tasks else task_ids[:1])
        ]


class CheckFailed(Exception):
    """The policy did what ends its check; `finding` says what."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding)
        self.finding = finding


class CheckedPolicy(Protocol):
    """A policy that answers, and can say more about its failures than a connection does."""

    @property
    def connector(self) -> WebSocketConnector: ...

    async def failure(self, played: Played, circumstances: Circumstances) -> Finding: ...

    def connection_failure(self, error: PolicyError) -> Finding: ...


@dataclass
class TaskRuns:
    """The episodes of one task as they were played."""

    episodes: list[PlannedEpisode]
    played: list[Played] = field(default_factory=list)
    again: Played | None = None
    other_instance: Played | None = None
    other_process: Played | None = None

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

    def repetitions(self, words: Words) -> Repetitions:
        assert self.again is not None
        assert self.other_instance is not None
        return Repetitions(
            self.played[0],
            self.again,
            self.other_instance,
            self.other_process,
            self.repeated_steps,
            words,
        )


@dataclass
class EpisodeCheck:
    """The episodes of one check. Its methods raise CheckFailed where the policy does not play on."""

    thread: PlayingThread
    plan: CheckPlan
    settings: Settings
    report: Report
    words: Words

    async def play(self, policy: CheckedPolicy) -> list[TaskRuns]:
        """Every episode, and the first of each task again: in the same instance and in a fresh one."""
        task_ids = await self.thread.call(lambda player: player.task_ids)
        tasks = [TaskRuns(episodes) for episodes in self.plan.tasks(task_ids)]
        async with self._instance(policy) as instance:
            for task in tasks:
                await self._play_task(policy, instance, task)
        await self._measure(tasks)
        for task in tasks:
            task.other_instance = await self._repeat(policy, task, f"in {self.words.fresh}")
        return tasks

    async def play_in_another_process(self, policy: CheckedPolicy, tasks: list[TaskRuns]) -> None:
        """The first episode of each task once more."""
        for task in tasks:
            task.other_process = await self._repeat(policy, task, "in another process")

    def judge(self, tasks: list[TaskRuns]) -> None:
        """Report whether the policy forgets and repeats."""
        self.report.add(*sum_up([judge_repetitions(task.repetitions(self.words)) for task in tasks]))

    async def _play_task(self, policy: CheckedPolicy, instance: PolicyInstance, task: TaskRuns) -> None:
        for episode in task.episodes:
            task.played.append(await self._play(policy, instance, episode))
        self.report.add(_played(task.played))
        task.again = await self._play(policy, instance, task.episodes[0], "again", task.repeated_steps)

    async def _repeat(self, policy: CheckedPolicy, task: TaskRuns, when: str) -> Played:
        async with self._instance(policy) as instance:
            return await self._play(policy, instance, task.episodes[0], when, task.repeated_steps)

    async def _play(
        self,
        policy: CheckedPolicy,
        instance: PolicyInstance,
        episode: PlannedEpisode,
        when: str = "",
        max_steps: int | None = None,
    ) -> Played:
        try:
            played = await self.thread.call(partial(_play, instance, episode, max_steps))
        except PolicyError as error:
            raise CheckFailed(policy.connection_failure(error)) from error
        if played.is_sound:
            return played
        space = await self.thread.call(lambda player: space_in_words(player.action_space(episode.task_id)))
        circumstances = Circumstances(self._limits, space, f"played {when}" if when else "")
        raise CheckFailed(await policy.failure(played, circumstances))

    @asynccontextmanager
    async def _instance(self, policy: CheckedPolicy) -> AsyncIterator[PolicyInstance]:
        instance = PolicyInstance(
            policy.connector,
            stateless=self.plan.job.job_config.stateless,
            connect_seconds=self.settings.connect_timeout_seconds,
        )
        async with self.thread.using(instance):
            yield instance

    async def _measure(self, tasks: list[TaskRuns]) -> None:
        horizon = self._limits.action_horizon
        by_space: dict[str, list[TaskActions]] = {}
        for task in tasks:
            actions = await self.thread.call(partial(_actions, task, horizon))
            by_space.setdefault(actions.space, []).append(actions)
        self.report.add(*(judge_actions(same, horizon) for same in by_space.values()))
        self.report.add(judge_speed([each for task in tasks for each in task.played], self._limits))

    @property
    def _limits(self) -> EpisodeLimits:
        return episode_limits(self.plan.job, self.settings)


def _play(instance: PolicyInstance, episode: PlannedEpisode, max_steps: int | None, player: Player) -> Played:
    return player.play(instance, episode, max_steps=max_steps)


def _actions(task: TaskRuns, horizon: int, player: Player) -> TaskActions:
    return count_actions(task.played, player.action_space(task.task_id), horizon)


def _played(episodes: Sequence[Played]) -> Finding:
    finished = [played.report.finished for played in episodes if played.report.finished is not None]
    returns = [outcome.episode_return for outcome in finished]
    shown = ", ".join(f"{value:.6g}" for value in returns[:MOST_RETURNS])
    shown += ", ..." if len(returns) > MOST_RETURNS else ""
    successes = sum(outcome.success for outcome in finished)
    text = (
        f"{counted(len(returns), 'episode')} of {episodes[0].episode.task_id}: "
        f"{'return' if len(returns) == 1 else 'returns'} {shown}; {successes} of {len(returns)} successful"
    )
    return Finding(Mark.OK, PLAYS, text)
