"""The command line in this process: what it prints and exits with, on a database of the test's own."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import structlog

from orchestrator.adapters.postgres.pool import Database, open_pool
from orchestrator.cli import app
from orchestrator.cli.usage import run_app
from tests.conftest import run_in_own_loop

if TYPE_CHECKING:
    from tests.conftest import Pool


@pytest.fixture(autouse=True)
def untouched_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


@dataclass(frozen=True)
class Ran:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class CommandLine:
    """`orchestrator` on the test's database."""

    database: Database
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *arguments: object) -> Ran:
        self.capsys.readouterr()
        code = self._run([*map(str, arguments)])
        return Ran(code, *self.capsys.readouterr())

    def prepare(self, *steps: Callable[[Pool], Awaitable[object]]) -> None:
        """Do something with the database first, in this order."""

        async def prepared() -> None:
            async with open_pool(self.database, application_name="tests") as pool:
                for step in steps:
                    await step(pool)

        run_in_own_loop(prepared)

    def transcript(self, *commands: str) -> str:
        """What a person sees of the commands, without what varies from run to run."""
        return "\n".join(self._shown(command) for command in commands)

    def _shown(self, command: str) -> str:
        terminal = io.StringIO()  # both streams, in the order in which they come
        with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
            code = self._run(command.split())
        lines = [f"$ orchestrator {command}", *terminal.getvalue().splitlines()]
        if code:
            lines.append(f"(exit code {code})")
        return "".join(self._settled(line).rstrip() + "\n" for line in lines)

    def _run(self, arguments: Sequence[str]) -> int:
        return run_app(app, [*arguments, "--database-url", self.database.dsn])

    def _settled(self, line: str) -> str:
        line = line.replace(str(self.database), "<database>")
        line = re.sub(r"\b\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\b", "2026-01-01 12:00:00", line)
        return re.sub(r"\b1[6-9]\d{14}\b", "<fresh id>", line)


@pytest.fixture
def orchestrator(
    database: Database, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> CommandLine:
    monkeypatch.delenv("COLUMNS", raising=False)
    return CommandLine(database, capsys)
