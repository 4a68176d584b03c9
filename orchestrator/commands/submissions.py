"""`orchestrator submission init` and `check`."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.authoring.findings import Report
from orchestrator.authoring.printing import ReportPrinter
from orchestrator.authoring.scaffold import first_submission, write_submission
from orchestrator.authoring.server_check import check_server
from orchestrator.authoring.submission_check import check_submission
from orchestrator.authoring.task_runs import CheckPlan
from orchestrator.commands.session import ReadSettings
from orchestrator.domain.errors import InvalidJob, UsageError
from orchestrator.domain.messages import NOT_VALID, EvalJobMessage
from orchestrator.ports import Endpoint
from orchestrator.presentation import make_console


@dataclass(frozen=True, slots=True)
class CheckRequest:
    """What the command line asks to be checked: a submission, or the server at an address."""

    submission: Path | None
    address: str | None
    benchmark: str | None
    episodes: int = 2
    all_tasks: bool = False
    seed: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def endpoint(self) -> Endpoint | None:
        """Where the server listens; None where a submission is to be checked.

        Raises:
            UsageError: the address is none.
        """
        if self.address is None:
            return None
        host, _, port = self.address.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not host or not port.isdigit() or not 0 < int(port) < 2**16:
            raise UsageError(f"{self.address!r} is no address: write HOST:PORT, like localhost:8000")
        return Endpoint(host, int(port))

    def plan(self) -> CheckPlan | None:
        """The episodes to play; None without a benchmark.

        Raises:
            UsageError: the benchmark is not written as PROVIDER/NAME, or the config is unusable.
        """
        if self.benchmark is None:
            return None
        provider, _, name = self.benchmark.partition("/")
        if not name:
            raise UsageError(
                f"{self.benchmark!r} names no benchmark: write PROVIDER/NAME, like gymnasium/CartPole-v1"
            )
        job = {
            "job_id": 0,
            "submission_id": str(self.submission or self.address),
            "env_provider": provider,
            "benchmark_name": name,
            "config": dict(self.config) | ({} if self.seed is None else {"seed": self.seed}),
        }
        try:
            return CheckPlan(EvalJobMessage.parse(json.dumps(job)), self.episodes, self.all_tasks)
        except InvalidJob as error:
            # Nobody gave a job, so none is named.
            raise UsageError(error.reason.removeprefix(NOT_VALID)) from error


async def init_command(directory: Path, benchmark: str) -> int:
    """Write a first submission, and say what to do with it."""
    submission = await asyncio.to_thread(first_submission, benchmark)
    path = write_submission(directory, submission)
    options = f"{shlex.quote(str(directory))} --benchmark {benchmark}"
    options += f" --config {submission.config}" if submission.config else ""
    print(f"wrote {path}, which {submission.does}; next:")
    print(f"  orchestrator submission check {options}")
    print(f"  orchestrator eval {options} --episodes 100 --seed 7")
    return 0


async def check_command(read_settings: ReadSettings, request: CheckRequest, *, as_json: bool) -> int:
    """Check, and say what was found; 0 where nothing is wrong, else 1."""
    settings, plan, endpoint = read_settings(), request.plan(), request.endpoint
    if (request.submission is None) == (endpoint is None):
        raise UsageError("say what to check: a submission's directory or archive, or --address HOST:PORT")
    subject = f"{request.submission or request.address}"
    subject += f" on {request.benchmark}" if request.benchmark else ""
    with shown_report(subject, as_json=as_json) as report:
        if endpoint is not None:
            await check_server(endpoint, plan, settings, report)
        elif request.submission is not None:
            if plan is None:
                raise UsageError("say what it is to play: --benchmark PROVIDER/NAME")
            await check_submission(request.submission, plan, settings, report)
    return 0 if report.is_right else 1


@contextmanager
def shown_report(subject: str, *, as_json: bool) -> Iterator[Report]:
    """A report for the block: each finding printed as it comes, or all of it as JSON at the end."""
    if as_json:
        report = Report(subject)
        yield report
        print(json.dumps(report.as_json(), indent=2))
        return
    printer = ReportPrinter(make_console(sys.stdout), subject)
    report = Report(subject, printer.finding)
    yield report
    printer.verdict(report)
