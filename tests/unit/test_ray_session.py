"""An actor's process and its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from orchestrator import ray_session

# A parent that starts an actor's process and waits to be killed; nobody reaps it by then.
PARENT = """
import subprocess, sys
actor = '''
import time
from orchestrator import ray_session
ray_session.PARENT_POLL_SECONDS = 0.02
ray_session.end_with_parent()
print("runs", flush=True)
time.sleep(600)
'''
subprocess.Popen([sys.executable, "-c", actor]).wait()
"""


def test_an_actor_ends_with_the_raylet_that_started_it_though_that_one_is_a_zombie() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"runs\n"

        os.kill(parent.pid, signal.SIGKILL)

        assert parent.stdout.read() == b""  # the actor held the other end, too: nobody has it any more


def test_what_ray_tells_of_dead_workers_goes_to_standard_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._private import worker

    monkeypatch.setattr(worker, "print_worker_logs", worker.print_worker_logs)  # put back afterwards

    for _ in range(2):
        ray_session.keep_standard_output()
    worker.print_to_stdstream(
        {"lines": ["A worker died"], "pid": "raylet", "is_err": False}, ignore_prefix=False
    )

    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("A worker died")) == ("", 1)
