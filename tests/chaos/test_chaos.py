"""A short chaos run: every kind of fault once, while at least twenty jobs flow."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.schedule import Kind

SEED = os.environ.get("SEED", "20")
KILLS = len(Kind)


@pytest.mark.ray
@pytest.mark.timeout(480)
def test_no_job_is_lost_no_result_comes_twice_and_nothing_is_left_whatever_dies(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    run = subprocess.run(
        [
            *(sys.executable, "-u", "-m", "tests.chaos", "--seed", SEED, "--kills", str(KILLS)),
            *("--gap", "4", "--report", str(report)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )

    assert run.returncode == 0, run.stdout
    assert f"SEED={SEED}" in run.stdout
    assert "VIOLATION" not in run.stdout
    told = json.loads(report.read_text())
    assert len(told["faults"]) + len(told["failpoints"]) >= KILLS
    [jobs] = re.findall(r"(\d+) jobs acknowledged", run.stdout)
    assert int(jobs) >= 20
