"""A Ray cluster as an operator starts one, `ray start --head`, on ports and in a directory of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.end_to_end.command_processes import environment, processes_naming, wait_until

START_TRIES = 2
START_SECONDS = 120.0


@dataclass(frozen=True)
class RayHead:
    """What is needed to work with it. `variables` are those of every process in it, and of its clients."""

    address: str
    dashboard: str
    http_port: int
    metrics_port: int
    variables: dict[str, str]

    def serve(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Serve's command line, on this cluster."""
        command = [sys.executable, "-m", "ray.serve.scripts", *map(str, arguments), "-a", self.dashboard]
        return self._run(command)

    def ray(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Ray's command line."""
        return self._run([sys.executable, "-m", "ray.scripts.scripts", *map(str, arguments)])

    def orchestrator(self, *arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Our command line, with this cluster as RAY_ADDRESS."""
        return self._run([sys.executable, "-m", "orchestrator.cli", *map(str, arguments)], stdin)

    def _run(self, command: list[str], stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            text=True,
            env=environment(**self.variables, RAY_ADDRESS=self.address),
            timeout=START_SECONDS,
            check=False,
        )


@contextmanager
def ray_head(cpus: int = 4, resources: str = "{}", **variables: str) -> Iterator[RayHead]:
    """The cluster for the block; all of its processes are gone afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="orc-head-", dir="/tmp"))
    try:
        for attempt in range(1, START_TRIES + 1):
            gcs, dashboard, http, metrics, *others = free_ports(6)
            fixed = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
            head = RayHead(
                f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", http, metrics, fixed | variables
            )
            started = _start(head, directory / str(attempt), others, cpus, resources)
            if started.returncode == 0:
                break
            _kill(
                directory
            )  # its fixed waits are too short for a busy machine, or a port was taken meanwhile
        assert started.returncode == 0, started.stdout + started.stderr
        yield head
    finally:
        _kill(directory)
        shutil.rmtree(directory, ignore_errors=True)


def _start(
    head: RayHead, directory: Path, others: list[int], cpus: int, resources: str
) -> subprocess.CompletedProcess[str]:
    arguments = {
        "--node-ip-address": "127.0.0.1",
        "--port": head.address.rpartition(":")[2],
        "--dashboard-port": head.dashboard.rpartition(":")[2],
        "--metrics-export-port": str(head.metrics_port),
        "--dashboard-agent-listen-port": str(others[0]),
        "--ray-client-server-port": str(others[1]),
        "--temp-dir": str(directory),
        "--num-cpus": str(cpus),
        "--resources": resources,
    }
    return subprocess.run(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--disable-usage-stats"),
            *(f"{name}={value}" for name, value in arguments.items()),
        ],
        capture_output=True,
        text=True,
        env=environment(**head.variables),
        timeout=START_SECONDS,
        check=False,
    )


def _kill(directory: Path) -> None:
    deadline = time.monotonic() + 30
    while victims := processes_naming(f"{directory}/"):
        assert time.monotonic() < deadline, victims
        for victim in victims:
            with suppress(ProcessLookupError):
                os.kill(victim.pid, signal.SIGKILL)
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, below those that the system and Ray give out themselves."""
    ports: list[int] = []
    with ExitStack() as stack:
        candidate = 20_000 + os.getpid() % 2_000 * 5
        while len(ports) < count:
            candidate = candidate + 1 if candidate < 32_000 else 20_000
            listener = stack.enter_context(socket.socket())
            with suppress(OSError):
                listener.bind(("127.0.0.1", candidate))
                ports.append(candidate)
    return ports


__all__ = ["RayHead", "free_ports", "ray_head", "wait_until"]
