"""Checks a submission by the code that will judge it, without Ray and without a database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.actors.episode_runner import RunKind
from orchestrator.actors.submission_container import Archive
from orchestrator.adapters.artifacts.contents import LeftOut, survey
from orchestrator.adapters.artifacts.pack import PackedArchive, existing_archive, pack_directory
from orchestrator.adapters.policies.websocket import WebSocketConnector
from orchestrator.authoring.containers import (
    CheckContainers,
    RunningSubmission,
    check_containers,
    make_scratch_directory,
    remove_scratch_directory,
)
from orchestrator.authoring.episode_check import CheckFailed, EpisodeCheck
from orchestrator.authoring.faults import (
    LOADS,
    Circumstances,
    connection_failure,
    episode_failure,
    load_failure,
    silence,
)
from orchestrator.authoring.findings import Finding, Mark, Report
from orchestrator.authoring.playing import Played, playing
from orchestrator.authoring.repeatability import OF_AN_AGENT
from orchestrator.authoring.task_runs import CheckPlan
from orchestrator.domain.errors import PolicyError, SubmissionError, SubmissionSilent, UsageError
from orchestrator.limits import container_limits, episode_limits
from orchestrator.settings import Settings

PACKED = "packed"
ENVIRONMENT = "environment"
WARN_ABOVE = 0.5  # of the time to start up


async def check_submission(submission: Path, plan: CheckPlan, settings: Settings, report: Report) -> None:
    """Check a directory or an archive; what is found is in the report. Nothing of it is left running.

    Raises:
        UsageError: no submission is there, or the benchmark is unknown or its config unusable.
        InfrastructureError: it could not be checked, through no fault of the submission.
    """
    scratch = make_scratch_directory()
    try:
        packed, left_out = await asyncio.to_thread(_packed, submission, scratch / "archives")
        async with playing(plan.job, episode_limits(plan.job, settings)) as thread:
            report.add(_said_of_the_archive(packed, left_out))
            archive = Archive(packed.path, packed.sha256)
            limits = container_limits(plan.job, settings)
            async with check_containers(archive, limits, scratch, settings) as containers:
                episodes = EpisodeCheck(thread, plan, settings, report, OF_AN_AGENT)
                await _check(containers, episodes, settings.start_up_timeout_seconds, report)
    finally:
        remove_scratch_directory(scratch)


def _packed(submission: Path, store: Path) -> tuple[PackedArchive, Sequence[LeftOut]]:
    if submission.is_dir():
        contents = survey(submission)
        return pack_directory(submission, store, contents), contents.left_out
    if submission.is_file():
        return existing_archive(submission), ()
    raise UsageError(f"{submission} is no submission: give a directory, or an archive of one")


def _said_of_the_archive(packed: PackedArchive, left_out: Sequence[LeftOut]) -> Finding:
    """Its size; a warning where something is not in it that the submission may need."""
    missing = [each for each in left_out if each.surprising]
    if not missing:
        return Finding(Mark.OK, PACKED, f"{packed.size_bytes} bytes")
    lines = "\n".join(f"{each.path}: {each.reason}" for each in missing)
    return Finding(
        Mark.WARNING, PACKED, f"{packed.size_bytes} bytes, without what an archive cannot hold", lines
    )


async def _check(
    containers: CheckContainers, episodes: EpisodeCheck, start_up_seconds: float, report: Report
) -> None:
    """One process plays everything, and a second one the first episodes again."""
    try:
        async with _started(containers, start_up_seconds) as submission:
            if submission.preparation_seconds > 0:
                report.add(_prepared(submission.preparation_seconds))
            report.add(_loaded(submission.start_seconds, start_up_seconds))
            tasks = await episodes.play(_ContainedPolicy(containers, submission))
        async with _started(containers, start_up_seconds) as submission:
            await episodes.play_in_another_process(_ContainedPolicy(containers, submission), tasks)
    except CheckFailed as failed:
        text, detail = map(containers.as_the_author_sees, (failed.finding.text, failed.finding.detail))
        report.add(replace(failed.finding, text=text, detail=detail))
        return
    episodes.judge(tasks)


@asynccontextmanager
async def _started(containers: CheckContainers, start_up_seconds: float) -> AsyncIterator[RunningSubmission]:
    """The submission in a process of its own for the block; after a failure `check_containers` ends it."""
    try:
        submission = await containers.start(start_up_seconds)
    except SubmissionError as error:
        raise CheckFailed(load_failure(error)) from error
    except SubmissionSilent as error:
        raise CheckFailed(silence(error)) from error
    yield submission
    await containers.remove(submission)


def _prepared(seconds: float) -> Finding:
    return Finding(Mark.OK, ENVIRONMENT, f"made of requirements.txt in {seconds:.1f} s, and kept for later")


def _loaded(seconds: float, limit: float) -> Finding:
    if seconds > WARN_ABOVE * limit:
        text = f"in {seconds:.1f} s of the {limit:g} s that it may take"
        return Finding(Mark.WARNING, LOADS, text, advice="other machines are slower")
    return Finding(Mark.OK, LOADS, f"in {seconds:.1f} s, in a process of its own")


@dataclass(frozen=True)
class _ContainedPolicy:
    """`CheckedPolicy`: a submission whose process can be asked how it ended and what it printed."""

    containers: CheckContainers
    submission: RunningSubmission

    @property
    def connector(self) -> WebSocketConnector:
        return self.submission.connector

    async def failure(self, played: Played, circumstances: Circumstances) -> Finding:
        was_lost = played.report.kind is RunKind.POLICY_LOST
        evidence = await self.containers.evidence(self.submission, was_lost=was_lost)
        tail = await self.containers.log_tail(self.submission)
        return episode_failure(played, replace(circumstances, evidence=evidence, log_tail=tail))

    def connection_failure(self, error: PolicyError) -> Finding:
        return connection_failure(error)
