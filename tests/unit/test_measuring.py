"""`make coverage` measures processes that leave by other doors than Python's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import coverage
import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import os, sys, time
from orchestrator.domain.lifecycle import JobStatus
assert JobStatus.FAILED.is_final
{end}
"""
ENDS = {
    "returns": "pass",
    "leaves by _exit": "os._exit(0)",
    "becomes another program": "os.execv(sys.executable, [sys.executable, '-c', ''])",
    "is killed": "time.sleep(600)",
    "forks": "sys.exit() if os.fork() else os._exit(0)",
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of its own, so that its data never meets that of a real measurement."""
    shutil.copytree(ROOT / "tests" / "measuring", tmp_path / "tests" / "measuring")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize("end", ENDS)
def test_what_a_process_ran_is_measured_however_it_ends(end: str, project: Path) -> None:
    python_path = os.pathsep.join([str(project / "tests" / "measuring"), str(ROOT)])
    script = SCRIPT.format(end=ENDS[end])
    with subprocess.Popen([sys.executable, "-c", script], env={"PYTHONPATH": python_path}) as process:
        try:
            deadline = time.monotonic() + 60
            while process.poll() is None and not is_measured(project):
                assert time.monotonic() < deadline
        finally:
            process.kill()

    assert is_measured(project)


def is_measured(project: Path) -> bool:
    """Whether the body of `JobStatus.is_final` was saved as run, until now."""
    file = ROOT / "orchestrator" / "domain" / "lifecycle.py"
    line = file.read_text().splitlines().index("        return self in FINAL") + 1
    for path in (project / ".measured").glob(".coverage.*"):
        data = coverage.CoverageData(str(path))
        data.read()
        if line in (data.lines(str(file)) or ()):
            return True
    return False
