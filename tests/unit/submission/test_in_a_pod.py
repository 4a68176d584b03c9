"""The submission host as the first process of a hardened pod, at every stage that it goes through."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.adapters.artifacts.pack import pack_directory
from orchestrator.adapters.policies.host_client import SubmissionHostClient
from orchestrator.adapters.policies.websocket import WebSocketConnector
from orchestrator.ports import Endpoint
from tests.pod_likeness import first_process, in_a_pod
from tests.policy_processes import RunningServer, running
from tests.wheels import write_wheel

KEY = bytes(range(32))
ENDED_BY_SIGTERM = 128 + signal.SIGTERM
SERVER = Path(__file__).parents[3] / "examples" / "cartpole_server" / "main.py"


@contextlib.contextmanager
def pod(
    directory: Path, *options: str, seals_at: int | None = None, **environ: str
) -> Iterator[RunningServer]:
    """A host that has nobody to dial, or this port of the loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        refusing = listener.getsockname()[1]
    work, temporary = directory / "work", directory / "tmp"
    for path in (work, temporary):
        path.mkdir()
    environ |= {
        "ORCHESTRATOR_SESSION_KEY": KEY.hex(),
        "KUBERNETES_SERVICE_HOST": "127.0.0.1",
        "KUBERNETES_SERVICE_PORT": str(seals_at or refusing),
        "HOME": str(temporary),
        "TMPDIR": str(temporary),
        "PYTHONDONTWRITEBYTECODE": "",
    }
    command = ["-m", "orchestrator.submission.host", "--directory", str(work), "--seal", *options]
    with running(command, environment=environ, below=in_a_pod(work, temporary)) as host:
        yield host


def submission(directory: Path, source: str, name: str = "agent.py") -> Path:
    path = directory / "submission"
    path.mkdir(exist_ok=True)
    (path / name).write_text(textwrap.dedent(source))
    return path


async def push(host: RunningServer, directory: Path) -> None:
    packed = pack_directory(directory, directory.parent / "archives")
    client = SubmissionHostClient(Endpoint("127.0.0.1", host.port), KEY, require_sealed=True)
    await client.push_archive(packed.path, packed.sha256, 120)


def act(host: RunningServer, observation: Any = None) -> Any:
    connection = WebSocketConnector("127.0.0.1", host.port, KEY).connect(20)
    try:
        return connection.act({"observation": observation}, 30)
    finally:
        connection.close()


def end(host: RunningServer) -> int:
    """Ask PID 1 to end, as the kubelet does; the container's exit code."""
    began = time.monotonic()
    os.kill(first_process(host.process.pid), signal.SIGTERM)
    code = host.process.wait(30)
    assert time.monotonic() - began < 5, "the kubelet would have killed it"
    return code


# ------------------------------------------------------------------------------------------- its end


def test_it_ends_while_it_seals_itself(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as open_egress:
        port = open_egress.getsockname()[1]
        with pod(tmp_path, seals_at=port) as host:
            open_egress.accept()[0].close()

            assert end(host) == ENDED_BY_SIGTERM


def test_it_ends_while_it_waits(tmp_path: Path) -> None:
    with pod(tmp_path) as host:
        assert end(host) == ENDED_BY_SIGTERM


async def test_it_ends_while_packages_are_installed(tmp_path: Path) -> None:
    path = submission(tmp_path, "class Agent:\n    def act(self, o): return o\n")
    (path / "requirements.txt").write_text("never-there\n")
    with socket.create_server(("127.0.0.1", 0)) as silent_index:
        index = f"http://127.0.0.1:{silent_index.getsockname()[1]}/simple"
        with pod(tmp_path, PIP_INDEX_URL=index) as host:
            pushing = asyncio.create_task(push(host, path))
            connection, _ = await asyncio.to_thread(silent_index.accept)  # pip asks, and hears nothing

            assert await asyncio.to_thread(end, host) == ENDED_BY_SIGTERM

            connection.close()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                pushing.cancel()
                await pushing


async def test_it_ends_while_the_agent_loads_and_lets_nothing_else_run(tmp_path: Path) -> None:
    path = submission(tmp_path, "print('begins', flush=True)\nwhile True: pass\n")
    with pod(tmp_path) as host:
        pushing = asyncio.create_task(push(host, path))
        await asyncio.to_thread(host.wait_for_line, "begins")

        assert await asyncio.to_thread(end, host) == ENDED_BY_SIGTERM

        with contextlib.suppress(asyncio.CancelledError, Exception):
            pushing.cancel()
            await pushing


async def test_it_ends_while_it_serves(tmp_path: Path) -> None:
    with pod(tmp_path) as host:
        await push(host, submission(tmp_path, "class Agent:\n    def act(self, o): return o\n"))
        assert act(host, 5) == 5

        assert end(host) == ENDED_BY_SIGTERM


@pytest.mark.parametrize("ignores", [False, True])
async def test_it_ends_with_a_server_of_the_submissions_own(tmp_path: Path, ignores: bool) -> None:
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if ignores else ""
    source = SERVER.read_text()
    with pod(tmp_path) as host:
        await push(host, submission(tmp_path, deaf + source, "main.py"))

        assert end(host) == ENDED_BY_SIGTERM


@pytest.mark.parametrize(
    ("how", "code"),
    [("os._exit(7)", 7), ("os.kill(os.getpid(), signal.SIGKILL)", 137), ("os.abort()", 134)],
)
async def test_the_end_of_the_policy_is_that_of_the_container(tmp_path: Path, how: str, code: int) -> None:
    source = f"import os, signal\nclass Agent:\n    def act(self, o): {how}\n"
    with pod(tmp_path) as host:
        await push(host, submission(tmp_path, source))

        with contextlib.suppress(Exception):
            act(host)

        assert host.process.wait(30) == code


# ------------------------------------------------------------------------------------------ its duties


async def test_orphans_are_reaped_and_the_agents_own_children_are_left_to_it(tmp_path: Path) -> None:
    source = """
        import os, subprocess, sys

        class Agent:
            def act(self, o):
                own = subprocess.run([sys.executable, "-c", "raise SystemExit(7)"]).returncode
                for _ in range(5):  # each leaves an orphan that ends by itself
                    subprocess.run(["sh", "-c", "sh -c 'read x; exit 3' < /dev/null &"], check=True)
                return own

            def reset(self, episode, seed): ...
    """
    with pod(tmp_path) as host:
        await push(host, submission(tmp_path, source))

        assert act(host) == 7

        first = first_process(host.process.pid)
        until = time.monotonic() + 20
        while len(Path(f"/proc/{first}/task/{first}/children").read_text().split()) > 1:
            assert time.monotonic() < until


async def test_the_session_key_is_hidden_from_what_the_submission_starts(tmp_path: Path) -> None:
    reads = """
        import glob, os
        own = glob.glob(f"/proc/{os.getpid()}/*")
        for path in {*glob.glob("/proc/[0-9]*/environ"), *glob.glob("/proc/[0-9]*/mem")}.difference(own):
            try:
                with open(path, "rb") as file:
                    seen = file.read(1)
            except OSError as error:
                seen = error.strerror
            print("sees", path, seen, flush=True)
        print("environ", b"SESSION_KEY" in open("/proc/self/environ", "rb").read(), flush=True)
    """
    source = textwrap.dedent(reads) + SERVER.read_text()
    with pod(tmp_path) as host:
        await push(host, submission(tmp_path, source, "main.py"))

        seen = [line.split(maxsplit=2)[2] for line in host.printed if line.startswith("sees")]
        assert seen == ["Permission denied"] * 4  # of PID 1 and of the host
        assert "environ False" in host.printed
        os.kill(first_process(host.process.pid), signal.SIGTERM)


# ---------------------------------------------------------------------------------------- its place


async def test_wheels_are_installed_into_the_work_volume_by_the_pip_of_the_standard_library_alone(
    tmp_path: Path,
) -> None:
    """The image has our code and what it needs; pip comes from ensurepip, where there is no other."""
    source = """
        import new_package, os, sys, tempfile

        class Agent:
            def act(self, o):
                with tempfile.NamedTemporaryFile() as file, open("mine.txt", "w"):
                    return [new_package.__version__, new_package.__file__, file.name, os.getcwd()]
    """
    path = submission(tmp_path, source)
    (path / "requirements.txt").write_text("new_package\n")
    write_wheel(path / "wheels", "new_package", "1.2")
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        f"""
import importlib.util, sys
def find_spec(name, package=None, find=importlib.util.find_spec):
    return None if name == "pip" and sys.prefix == {sys.prefix!r} else find(name, package)
importlib.util.find_spec = find_spec
"""
    )
    with pod(tmp_path, "--no-index", PYTHONPATH=str(hidden)) as host:
        await push(host, path)

        version, file, temporary, cwd = act(host)

    assert version == "1.2"
    assert file.startswith(str(tmp_path / "work" / "environments"))
    assert temporary.startswith(str(tmp_path / "tmp"))
    assert cwd == str(tmp_path / "work" / "submission")


def test_libraries_start_as_many_threads_as_the_container_has_cpus(tmp_path: Path) -> None:
    from orchestrator.submission.threads import THREAD_VARIABLES, cpu_limit, limit_threads

    first, second, none = tmp_path / "first", tmp_path / "second", tmp_path / "none"
    (first / "cpu").mkdir(parents=True)
    (first / "cpu" / "cpu.cfs_quota_us").write_text("250000\n")
    (first / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    second.mkdir()
    (second / "cpu.max").write_text("50000 100000\n")
    (none / "cpu").mkdir(parents=True)
    (none / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (none / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    environ = {"OMP_NUM_THREADS": "9"}

    limit_threads(environ, first)

    assert [cpu_limit(each) for each in (first, second, none, tmp_path / "other")] == [2.5, 0.5, None, None]
    assert environ == {**dict.fromkeys(THREAD_VARIABLES, "2"), "OMP_NUM_THREADS": "9"}
    limit_threads(environ := {}, second)
    assert set(environ.values()) == {"1"}
    limit_threads(environ := {}, none)
    assert environ == {}


def test_outside_of_a_container_the_host_is_the_process_that_was_started(tmp_path: Path) -> None:
    code = "import os\nbefore = os.getpid()\nfrom orchestrator.submission.first_process import *\n"
    code += "leave_first_process()\nassert os.getpid() == before"

    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
