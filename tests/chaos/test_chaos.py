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
LIMIT_SECONDS = 480.0
ENDING_SECONDS = 90.0


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_no_job_is_lost_no_result_comes_twice_and_nothing_is_left_whatever_dies(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    run = subprocess.Popen(
        [
            *(sys.executable, "-u", "-m", "tests.chaos", "--seed", SEED, "--kills", str(KILLS)),
            *("--gap", "4", "--report", str(report)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = run.communicate(timeout=LIMIT_SECONDS)
    except BaseException:
        run.terminate()  # it ends what it started
        print(run.communicate(timeout=ENDING_SECONDS)[0])
        raise

    assert run.returncode == 0, output
    assert f"SEED={SEED}" in output
    assert "VIOLATION" not in output
    told = json.loads(report.read_text())
    assert len(told["faults"]) + len(told["without_victim"]) == KILLS
    assert len(told["faults"]) >= KILLS - 2
    [jobs] = re.findall(r"(\d+) jobs acknowledged", output)
    assert int(jobs) >= 20
