"""Plays the episodes of a check with a policy, and judges what they show of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
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
from orchestrator.authoring.repeatability import Words, judge_repetitions
from orchestrator.authoring.task_runs import CheckPlan, TaskRuns
from orchestrator.domain.episodes import PlannedEpisode
from orchestrator.domain.errors import PolicyError
from orchestrator.limits import episode_limits
from orchestrator.settings import Settings

MOST_RETURNS = 5


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
class EpisodeCheck:
    """The episodes of one check. Its methods raise CheckFailed where the policy does not play on."""

    thread: PlayingThread
    plan: CheckPlan
    settings: Settings
    report: Report
    words: Words

    async def play(self, policy: CheckedPolicy) -> list[TaskRuns]:
        """Every episode, and the first of each task again: in the same instance and in a fresh one.

        Both instances also begin some more episodes, one in order, the other in reverse.
        """
        tasks = self.plan.tasks(await self.thread.call(lambda player: player.task_ids))
        async with self._instance(policy) as instance:
            for task in tasks:
                await self._play_task(policy, instance, task)
        await self._measure(tasks)
        for task in tasks:
            async with self._instance(policy) as instance:
                await self._play_task_again(policy, instance, task)
        return tasks

    async def play_in_another_process(self, policy: CheckedPolicy, tasks: list[TaskRuns]) -> None:
        """The first episode of each task once more."""
        for task in tasks:
            async with self._instance(policy) as instance:
                task.other_process = await self._play(
                    policy, instance, task.episodes[0], "in another process", task.repeated_steps
                )

    def judge(self, tasks: list[TaskRuns]) -> None:
        """Report whether the policy forgets and repeats."""
        self.report.add(*sum_up([judge_repetitions(task.repetitions(self.words)) for task in tasks]))

    async def _play_task(self, policy: CheckedPolicy, instance: PolicyInstance, task: TaskRuns) -> None:
        for episode in task.episodes:
            task.played.append(await self._play(policy, instance, episode))
        self.report.add(_played(task.played))
        task.again = await self._play(policy, instance, task.episodes[0], "again", task.repeated_steps)

        for episode in task.affordable_beginnings:
            steps = task.steps_of_a_beginning
            task.in_order.append(await self._play(policy, instance, episode, max_steps=steps))

    async def _play_task_again(self, policy: CheckedPolicy, instance: PolicyInstance, task: TaskRuns) -> None:
        when = f"in {self.words.fresh}"
        task.other_instance = await self._play(policy, instance, task.episodes[0], when, task.repeated_steps)
        for episode in reversed(task.affordable_beginnings):
            steps = task.steps_of_a_beginning
            task.in_reverse.append(await self._play(policy, instance, episode, when, steps))

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
