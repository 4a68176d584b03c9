"""An actor's process and its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

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
