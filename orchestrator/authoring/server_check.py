"""Checks a policy server that already runs, in whatever language: its wire, and episodes played with it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from orchestrator.adapters.policies.websocket import WebSocketConnector
from orchestrator.authoring.episode_check import CheckFailed, EpisodeCheck
from orchestrator.authoring.faults import PLAYS, Circumstances, episode_failure
from orchestrator.authoring.findings import Finding, Mark, Report
from orchestrator.authoring.playing import Played, Player, playing
from orchestrator.authoring.repeatability import OF_A_SERVER
from orchestrator.authoring.task_runs import CheckPlan
from orchestrator.authoring.wire_check import MADE_UP, ProbeObservation, WireCheck
from orchestrator.authoring.wire_probe import ServerUnderTest
from orchestrator.domain.errors import PolicyError
from orchestrator.limits import episode_limits
from orchestrator.ports import Endpoint
from orchestrator.settings import Settings
from orchestrator.waiting import uninterrupted


async def check_server(
    endpoint: Endpoint, plan: CheckPlan | None, settings: Settings, report: Report
) -> None:
    """Hold the server against docs/protocol.md; with a plan, also play its episodes.

    Raises:
        UsageError: the benchmark is unknown or its config unusable.
        InfrastructureError: the episodes could not be played, through no fault of the server.
    """
    if plan is None:
        server = ServerUnderTest(endpoint, settings.connect_timeout_seconds, settings.step_timeout_seconds)
        await _check_wire(server, MADE_UP, report)
        return
    limits = episode_limits(plan.job, settings)
    server = ServerUnderTest(endpoint, settings.connect_timeout_seconds, limits.step_timeout_seconds)
    async with playing(plan.job, limits) as thread:

        def first_observation(player: Player) -> ProbeObservation:
            return ProbeObservation(player.first_observation(plan.tasks(player.task_ids)[0].episodes[0]))

        if not await _check_wire(server, await thread.call(first_observation), report):
            report.add(Finding(Mark.SKIPPED, PLAYS, "no episode can be played with such a server"))
            return
        episodes = EpisodeCheck(thread, plan, settings, report, OF_A_SERVER)
        try:
            episodes.judge(await episodes.play(_ServerPolicy(endpoint)))
        except CheckFailed as failed:
            report.add(failed.finding)


async def _check_wire(server: ServerUnderTest, probe: ProbeObservation, report: Report) -> bool:
    """Whether episodes can be played with the server."""
    check = asyncio.create_task(asyncio.to_thread(WireCheck(server, probe, report.add).run))
    try:
        return await asyncio.shield(check)
    except asyncio.CancelledError:
        server.stop()
        await uninterrupted(asyncio.wait({check}))
        raise


@dataclass(frozen=True)
class _ServerPolicy:
    """`CheckedPolicy`: nothing is known of it but what its connections say."""

    endpoint: Endpoint

    @property
    def connector(self) -> WebSocketConnector:
        return WebSocketConnector(self.endpoint.host, self.endpoint.port)

    async def failure(self, played: Played, circumstances: Circumstances) -> Finding:
        return episode_failure(played, circumstances)

    def connection_failure(self, error: PolicyError) -> Finding:
        return Finding(Mark.WRONG, PLAYS, f"a connection could not be opened: {error}")
