"""The submission host as a process, from the push to the served policy."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from orchestrator.adapters.policies.host_client import SubmissionHostClient
from orchestrator.adapters.policies.websocket import WebSocketConnector
from orchestrator.domain.errors import (
    AuthenticationFailed,
    InfrastructureError,
    PolicyLost,
    PolicyRaised,
    SubmissionError,
)
from orchestrator.ports import Endpoint
from orchestrator.submission.handshake import (
    HandshakeFailed,
    prove_as_client,
    receive_message,
    send_message,
)
from orchestrator.submission.policy_server import EXIT_DISK_FULL
from orchestrator.submission.startup import KEY_VARIABLE, UnusableKey, take_session_key
from orchestrator.submission.transport import ByteStream, ConnectionLost
from tests.policy_processes import ECHO_AGENT, RunningServer, running, running_host, write_archive

KEY = bytes(range(32))


@contextmanager
def talking_to(port: int, key: bytes = KEY) -> Iterator[tuple[ByteStream, float]]:
    deadline = time.monotonic() + 20
    stream = ByteStream.connect("127.0.0.1", port, deadline)
    try:
        prove_as_client(stream, key, deadline)
        yield stream, deadline
    finally:
        stream.close()


def ask(port: int, **request: Any) -> dict[str, Any]:
    with talking_to(port) as (stream, deadline):
        send_message(stream, request, deadline)
        return receive_message(stream, deadline)


def client(server: RunningServer) -> SubmissionHostClient:
    return SubmissionHostClient(Endpoint("127.0.0.1", server.port), KEY)


def connector(server: RunningServer, key: bytes | None = KEY) -> WebSocketConnector:
    return WebSocketConnector("127.0.0.1", server.port, key)


@pytest.fixture(scope="module")
def waiting_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One that no test pushes anything to."""
    with running_host(tmp_path_factory.mktemp("host") / "work", KEY) as server:
        yield server


@pytest.fixture
def host(tmp_path: Path) -> Iterator[RunningServer]:
    with running_host(tmp_path / "work", KEY) as server:
        yield server


def test_a_port_file_names_the_port_and_the_log_is_left_to_the_submission(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, KEY)
    os.close(writer)
    port_file = tmp_path / "port"
    command = ["-m", "orchestrator.submission.host", "--directory", str(tmp_path / "work")]
    options = ["--port-file", str(port_file), "--key-fd", str(reader)]
    process = subprocess.Popen(
        [sys.executable, *command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=[reader],
    )
    os.close(reader)
    try:
        deadline = time.monotonic() + 60
        while not port_file.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)

        assert ask(int(port_file.read_text()), op="status")["state"] == "waiting"
    finally:
        process.terminate()
        printed, _ = process.communicate(timeout=30)
    assert printed == b""


async def test_a_work_directory_that_cannot_be_made_is_no_fault_of_the_submission(tmp_path: Path) -> None:
    sha256 = write_archive(tmp_path / "a.tar.gz", {"agent.py": ECHO_AGENT})
    (tmp_path / "file").touch()

    with (
        running_host(tmp_path / "file" / "work", KEY) as server,
        pytest.raises(InfrastructureError, match="no place for the submission"),
    ):
        await client(server).push_archive(tmp_path / "a.tar.gz", sha256, 60)


async def test_a_pushed_archive_is_served_by_the_same_process(host: RunningServer, tmp_path: Path) -> None:
    sha256 = write_archive(tmp_path / "a.tar.gz", {"mine/agent.py": ECHO_AGENT})
    assert ask(host.port, op="status") == {"ok": True, "state": "waiting", "error": None, "sealed": False}

    await client(host).push_archive(tmp_path / "a.tar.gz", sha256, 60)

    connection = connector(host).connect(10)
    assert connection.act({"observation": 5}, 10) == 5
    connection.close()
    assert ask(host.port, op="status")["state"] == "serving"
    assert host.process.poll() is None
    with pytest.raises(AuthenticationFailed):
        connector(host, bytes(32)).connect(10)
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["submission"]
    # Again: it has the archive, and takes no other.
    await client(host).push_archive(tmp_path / "a.tar.gz", sha256, 60)
    assert ask(host.port, op="push", size=1, sha256="0" * 64)["ok"] is False


async def test_the_agent_never_sees_the_key_or_where_it_came_from(tmp_path: Path) -> None:
    agent = (
        "import os, sys\nclass Agent:\n    def act(self, o):\n"
        "        return [dict(os.environ), open('/proc/self/environ').read(), sys.orig_argv]\n"
    )
    sha256 = write_archive(tmp_path / "a.tar.gz", {"agent.py": agent})
    command = ["-m", "orchestrator.submission.host", "--directory", str(tmp_path / "work")]
    with running(command, environment={KEY_VARIABLE: KEY.hex()}) as server:
        await client(server).push_archive(tmp_path / "a.tar.gz", sha256, 60)
        connection = connector(server).connect(10)

        seen = repr(connection.act({"observation": None}, 10))

        connection.close()
        assert KEY.hex() not in seen
        assert KEY_VARIABLE not in seen


def test_without_the_key_nothing_is_answered(waiting_host: RunningServer) -> None:
    with pytest.raises(HandshakeFailed), talking_to(waiting_host.port, bytes(32)):
        pass
    with pytest.raises(AuthenticationFailed):
        connector(waiting_host, bytes(32)).connect(10)
    with pytest.raises(PolicyLost):
        connector(waiting_host, None).connect(10)


def test_a_policy_is_refused_before_there_is_one(waiting_host: RunningServer) -> None:
    with pytest.raises(PolicyLost, match="waiting"):
        connector(waiting_host).connect(10)


async def test_an_agent_that_does_not_import_is_reported_with_its_line(
    host: RunningServer, tmp_path: Path
) -> None:
    sha256 = write_archive(tmp_path / "a.tar.gz", {"agent.py": "import nothing_of_this_name\n"})

    with pytest.raises(SubmissionError) as caught:
        await client(host).push_archive(tmp_path / "a.tar.gz", sha256, 60)

    assert 'agent.py", line 1' in caught.value.reason
    assert "No module named 'nothing_of_this_name'" in caught.value.reason
    assert "loading.py" not in caught.value.reason
    assert ask(host.port, op="policy")["state"] == "failed"
    host.wait_for_line("No module named")
    host.process.send_signal(signal.SIGTERM)
    assert host.process.wait(30) == -signal.SIGTERM


async def test_an_agent_that_loads_for_ever_is_reported_with_where_it_stands(tmp_path: Path) -> None:
    agent = "import threading\nclass Agent:\n    def __init__(self):\n        threading.Event().wait()\n"
    sha256 = write_archive(tmp_path / "a.tar.gz", {"agent.py": agent + "    def act(self, o): ..."})
    with (
        running_host(tmp_path / "work", KEY, "--load-timeout", "2") as server,
        pytest.raises(SubmissionError) as caught,
    ):
        await client(server).push_archive(tmp_path / "a.tar.gz", sha256, 60)

    assert "did not load within 2 s" in caught.value.reason
    assert "threading.Event().wait()" in caught.value.reason


async def test_a_submission_that_still_loads_says_where_it_stands(
    host: RunningServer, tmp_path: Path
) -> None:
    agent = "import threading\ndef download():\n    threading.Event().wait()\nprint('begins')\ndownload()\n"
    sha256 = write_archive(tmp_path / "a.tar.gz", {"agent.py": agent})
    push = asyncio.create_task(client(host).push_archive(tmp_path / "a.tar.gz", sha256, 60))
    await asyncio.to_thread(host.wait_for_line, "begins")

    until = time.monotonic() + 30
    while "wait()" not in (answer := await asyncio.to_thread(ask, host.port, op="status")).get("where", ""):
        assert time.monotonic() < until

    push.cancel()
    assert answer["state"] == "loading"
    assert answer["where"].splitlines()[-2:] == [
        '  File "agent.py", line 3, in download',
        "    threading.Event().wait()",
    ]


async def test_a_disk_that_is_full_ends_the_container_in_the_episode_that_filled_it(
    host: RunningServer, tmp_path: Path
) -> None:
    agent = (
        "import errno\nclass Agent:\n    def act(self, o):\n"
        "        raise OSError(getattr(errno, o), 'the weights do not fit')\n"
    )
    sha256 = write_archive(tmp_path / "a.tar.gz", {"agent.py": agent})
    await client(host).push_archive(tmp_path / "a.tar.gz", sha256, 60)

    with pytest.raises(PolicyRaised, match="the weights do not fit"):
        connector(host).connect(10).act({"observation": "EACCES"}, 10)
    with pytest.raises(PolicyLost):
        connector(host).connect(10).act({"observation": "ENOSPC"}, 10)

    assert host.process.wait(30) == EXIT_DISK_FULL
    host.wait_for_line("OSError: [Errno 28] the weights do not fit")


async def test_a_refused_archive_is_reported_with_the_reason(host: RunningServer, tmp_path: Path) -> None:
    sha256 = write_archive(tmp_path / "a.tar.gz", {"agent.py": ECHO_AGENT, "../outside": ""})

    with pytest.raises(SubmissionError, match="a path that leads out of it"):
        await client(host).push_archive(tmp_path / "a.tar.gz", sha256, 60)

    with pytest.raises(SubmissionError, match="a path that leads out of it"):
        await client(host).push_archive(tmp_path / "a.tar.gz", sha256, 60)
    assert not list((tmp_path / "work").iterdir())


async def test_an_archive_above_the_limit_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    sha256 = write_archive(tmp_path / "a.tar.gz", {"agent.py": ECHO_AGENT})
    with (
        running_host(tmp_path / "work", KEY, "--max-archive-bytes", "10") as server,
        pytest.raises(SubmissionError, match="above the limit of 10"),
    ):
        await client(server).push_archive(tmp_path / "a.tar.gz", sha256, 60)


async def test_a_push_that_broke_off_or_was_damaged_can_be_made_again(
    host: RunningServer, tmp_path: Path
) -> None:
    archive = tmp_path / "a.tar.gz"
    sha256 = write_archive(archive, {"agent.py": ECHO_AGENT})
    size = archive.stat().st_size
    with talking_to(host.port) as (stream, deadline):
        send_message(stream, {"op": "push", "size": size, "sha256": sha256}, deadline)
        assert receive_message(stream, deadline)["state"] == "waiting"
        stream.send_all(archive.read_bytes()[:-1], deadline)
    with talking_to(host.port) as (stream, deadline):
        send_message(stream, {"op": "push", "size": size, "sha256": sha256}, deadline)
        receive_message(stream, deadline)
        stream.send_all(bytes(size), deadline)
        assert receive_message(stream, deadline) == {
            "ok": False,
            "state": "waiting",
            "error": "the sha256 differs",
            "sealed": False,
        }

    await client(host).push_archive(archive, sha256, 60)

    assert ask(host.port, op="status")["state"] == "serving"


async def test_a_new_push_takes_over_from_one_that_hangs(host: RunningServer, tmp_path: Path) -> None:
    sha256 = write_archive(tmp_path / "a.tar.gz", {"agent.py": ECHO_AGENT})
    with talking_to(host.port) as (hanging, deadline):
        send_message(hanging, {"op": "push", "size": 1000, "sha256": sha256}, deadline)
        receive_message(hanging, deadline)

        await client(host).push_archive(tmp_path / "a.tar.gz", sha256, 60)

        with pytest.raises(ConnectionLost):
            hanging.receive_exactly(1, deadline)


@pytest.mark.parametrize(
    "request_", [{"op": "push"}, {"op": "push", "size": -1, "sha256": "0" * 64}, {"op": "dance"}, {}]
)
def test_a_senseless_request_is_refused_and_changes_nothing(
    waiting_host: RunningServer, request_: dict[str, Any]
) -> None:
    assert ask(waiting_host.port, **request_)["ok"] is False
    assert ask(waiting_host.port, op="status")["state"] == "waiting"


def test_silent_connections_do_not_keep_others_out(waiting_host: RunningServer) -> None:
    silent = [socket.create_connection(("127.0.0.1", waiting_host.port)) for _ in range(20)]
    try:
        assert ask(waiting_host.port, op="status")["ok"] is True
    finally:
        for sock in silent:
            sock.close()


def test_sigterm_ends_a_waiting_host_at_once(host: RunningServer) -> None:
    host.process.send_signal(signal.SIGTERM)

    assert host.process.wait(30) == -signal.SIGTERM


def test_a_key_is_taken_out_of_the_environment() -> None:
    environment = {KEY_VARIABLE: KEY.hex(), "OTHER": "1"}

    assert take_session_key(None, environment) == KEY
    assert environment == {"OTHER": "1"}


@pytest.mark.parametrize("written", [KEY, KEY.hex().encode(), KEY.hex().encode() + b"\n"])
def test_a_key_is_read_from_a_descriptor_raw_or_in_digits(written: bytes) -> None:
    reader, writer = os.pipe()
    os.write(writer, written)
    os.close(writer)

    assert take_session_key(reader, {}) == KEY
    with pytest.raises(OSError):
        os.fstat(reader)


@pytest.mark.parametrize("text", ["", "xyz", "00", "00" * 33])
def test_what_is_no_key_is_refused_without_showing_it(text: str) -> None:
    with pytest.raises(UnusableKey) as caught:
        take_session_key(None, {KEY_VARIABLE: text})

    assert not text or text not in str(caught.value)
