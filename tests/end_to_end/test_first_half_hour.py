"""docs/first-half-hour.md, typed in as it stands: every command prints what the page shows."""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.end_to_end.conftest import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

PAGE = ROOT / "docs" / "first-half-hour.md"
STEP = re.compile(
    r"```console(?: exit=(?P<exit>\d+))?\n(?P<console>.*?)```"
    r"|<!-- file: (?P<file>\S+) -->\n```python\n(?P<content>.*?)```"
    r'|<!-- insert: (?P<into>\S+) before "(?P<before>[^"]+)" -->\n```python\n(?P<lines>.*?)```',
    re.DOTALL,
)
PROGRESS = re.compile(r"gymnasium/\S+: ")
COMMAND_SECONDS = 300.0


@dataclass(frozen=True)
class Newcomer:
    """Somebody with an empty directory and a shell."""

    home: Path
    environment: dict[str, str]

    def types(self, command: str) -> tuple[str, int]:
        """What the shell shows, and the exit code."""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.home,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        # In place of the table of progress there are lines here, as many as there is time for.
        lines = [line for line in done.stdout.splitlines() if not PROGRESS.match(line)]
        return "\n".join(map(str.rstrip, lines)) + "\n", done.returncode


@pytest.fixture
def newcomer(ray_cluster: None, scratch: Path) -> Newcomer:
    """On the cluster of the other tests: what a command prints is the same, and Ray need not start again."""
    import ray

    scratch.chmod(0o755)  # the account of the database has to get through
    home = scratch / "home"
    home.mkdir()
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "PYTHONPATH") if name in os.environ}
    environment = kept | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "COLUMNS": "100",
        "ORCHESTRATOR_DATA_DIR": str(scratch / "data"),
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "RAY_AUTH_MODE": os.environ["RAY_AUTH_MODE"],
        "RAY_AUTH_TOKEN": os.environ["RAY_AUTH_TOKEN"],
    }
    return Newcomer(home, environment)


def test_every_command_prints_what_the_page_shows(newcomer: Newcomer) -> None:
    page = PAGE.read_text()

    typed, failures = walk_through(page, newcomer)

    assert failures == []
    if os.environ.get("UPDATE_GOLDEN") == "1":
        PAGE.write_text(typed)
    else:
        difference = difflib.unified_diff(
            page.splitlines(), typed.splitlines(), PAGE.name, "now", lineterm=""
        )
        assert typed == page, "\n".join(difference)


def walk_through(page: str, newcomer: Newcomer) -> tuple[str, list[str]]:
    """The page with the output of now, where that means something else; and commands that ended otherwise."""
    failures: list[str] = []

    def take(step: re.Match[str]) -> str:
        if step["file"]:
            (newcomer.home / step["file"]).write_text(step["content"])
        elif step["into"]:
            path = newcomer.home / step["into"]
            path.write_text(path.read_text().replace(step["before"], f"{step['lines']}\n{step['before']}", 1))
        else:
            command, _, shown = step["console"].removeprefix("$ ").partition("\n")
            printed, exit_code = newcomer.types(command)
            if exit_code != int(step["exit"] or 0):
                failures.append(f"{command}: exit code {exit_code}\n{printed}")
            if normalised(printed) != normalised(shown):
                return step[0].replace(step["console"], f"$ {command}\n{printed}")
        return step[0]

    return STEP.sub(take, page), failures


def normalised(text: str) -> str:
    """`text` without what differs from run to run."""
    text = re.sub(r"\d+(\.\d+)? m?s\b", "TIME", text)
    text = re.sub(r"\b\d{15,17}\b", "JOB", text)
    return re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:PORT", text)
