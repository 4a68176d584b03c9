"""Submissions that serve the protocol themselves: `main.py` behind a real submission host."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.adapters.policies.host_client import SubmissionHostClient
from orchestrator.adapters.policies.websocket import WebSocketConnector
from orchestrator.adapters.process.processes import identity_of
from orchestrator.domain.errors import (
    AuthenticationFailed,
    InfrastructureError,
    PolicyLost,
    PolicyProtocolError,
    PolicyRaised,
    SubmissionError,
)
from orchestrator.ports import Endpoint
from orchestrator.submission.children import Children, Stopping
from orchestrator.submission.handshake import prove_as_client, receive_message, send_message
from orchestrator.submission.transport import ByteStream
from tests.golden_texts import check_golden
from tests.policy_processes import ECHO_AGENT, RunningServer, running_host, write_archive

KEY = bytes(range(32))
EXAMPLE = Path(__file__).parents[3] / "examples" / "cartpole_server" / "main.py"
# A server of the protocol in a few lines; `{start}` runs before it listens, `{reply}` for each observation.
SERVER = """
import argparse, os, signal, sys, time
import msgpack
from websockets.sync.server import serve

parser = argparse.ArgumentParser()
parser.add_argument("--host")
parser.add_argument("--port", type=int)
options = parser.parse_args()
{start}

def converse(connection):
    {greet}
    for message in connection:
        observation = msgpack.unpackb(message)
        {reply}

print("main.py is process", os.getpid(), flush=True)
with serve(converse, options.host, options.port, compression=None) as server:
    server.serve_forever()
"""
GREET = "connection.send(msgpack.packb({}))"
REPLY = "connection.send(msgpack.packb({'actions': observation['observation']}))"


def server(start: str = "", greet: str = GREET, reply: str = REPLY) -> str:
    return SERVER.format(start=start, greet=greet, reply=reply)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[RunningServer]:
    with running_host(tmp_path / "work", KEY) as running:
        yield running
        _end(running)


def _end(host: RunningServer) -> None:
    """A host that is killed leaves main.py behind; in a container it is the shim that ends it."""
    host.process.terminate()
    host.process.wait(30)


def push(host: RunningServer, tmp_path: Path, main: str, **files: str) -> None:
    sha256 = write_archive(tmp_path / "archive.tar.gz", {"main.py": main, **files})
    client = SubmissionHostClient(Endpoint("127.0.0.1", host.port), KEY, grace_seconds=0.2)
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        runner.run(client.push_archive(tmp_path / "archive.tar.gz", sha256, 120))


def connector(host: RunningServer) -> WebSocketConnector:
    return WebSocketConnector("127.0.0.1", host.port, KEY)


def refusal(host: RunningServer, tmp_path: Path, main: str) -> str:
    with pytest.raises(SubmissionError) as caught:
        push(host, tmp_path, main)
    return re.sub(r"\(\d{4,5}\)", "(<port>)", caught.value.reason)


def process_of(host: RunningServer) -> int:
    host.wait_for_line("main.py is process")
    return next(int(line.split()[-1]) for line in host.printed if "main.py is process" in line)


def status(host: RunningServer) -> dict[str, Any]:
    deadline = time.monotonic() + 20
    stream = ByteStream.connect("127.0.0.1", host.port, deadline)
    try:
        prove_as_client(stream, KEY, deadline)
        send_message(stream, {"op": "status"}, deadline)
        return receive_message(stream, deadline)
    finally:
        stream.close()


# ----------------------------------------------------------------------------------------- what serves


def test_the_example_serves_connections_side_by_side_and_only_with_the_key(
    host: RunningServer, tmp_path: Path
) -> None:
    push(host, tmp_path, EXAMPLE.read_text())

    connections = [connector(host).connect(20) for _ in range(3)]
    leaning = np.float32([0, 0, 0.1, 0])
    answers = [
        connection.act({"observation": sign * leaning}, 20) for connection in connections for sign in (1, -1)
    ]
    assert answers == [1, 0] * 3
    assert dict(connections[0].metadata) == {"extensions": ["reset", "sequence"]}
    assert connections[0].supports_reset
    for connection in connections:
        connection.close()
    with pytest.raises(AuthenticationFailed):
        WebSocketConnector("127.0.0.1", host.port, bytes(32)).connect(20)
    push(host, tmp_path, EXAMPLE.read_text())  # again: it is there already


def test_large_messages_pass_through_whole_both_ways(host: RunningServer, tmp_path: Path) -> None:
    push(host, tmp_path, server().replace("compression=None", "compression=None, max_size=None"))
    image = np.random.default_rng(1).integers(0, 255, 5_000_000, dtype=np.uint8)
    connection = connector(host).connect(20)

    for _ in range(3):
        assert np.array_equal(connection.act({"observation": image}, 60), image)

    connection.close()


def test_of_both_entry_points_agent_py_counts(host: RunningServer, tmp_path: Path) -> None:
    push(host, tmp_path, "raise SystemExit(5)", **{"agent.py": ECHO_AGENT})

    connection = connector(host).connect(20)
    assert connection.act({"observation": 5}, 20) == 5
    connection.close()


def test_it_runs_in_its_directory_with_its_arguments_and_without_the_key(
    host: RunningServer, tmp_path: Path
) -> None:
    start = "print('seen', os.getcwd(), sys.argv, open('data').read(), sorted(os.environ), flush=True)"

    push(host, tmp_path, server(start), data="beside it")

    host.wait_for_line("seen")
    (seen,) = (line for line in host.printed if line.startswith("seen"))
    assert f"seen {tmp_path / 'work' / 'submission'} ['main.py', '--host', '127.0.0.1', '--port', '" in seen
    assert "beside it" in seen
    assert "SESSION_KEY" not in seen


def test_one_that_opens_its_port_late_but_in_time_serves(host: RunningServer, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    start = f"while not os.path.exists({str(gate)!r}): time.sleep(0.02)"
    with ThreadPoolExecutor() as pool:
        pushed = pool.submit(push, host, tmp_path, server(start))
        with pytest.raises(PolicyLost):
            connector(host).connect(20)
        assert not pushed.done()
        gate.touch()
        pushed.result()

    connection = connector(host).connect(20)
    assert connection.act({"observation": 1}, 20) == 1
    connection.close()


# ------------------------------------------------------------------------------------- how it ends


@pytest.mark.parametrize(
    ("ending", "code"),
    [("os._exit(9)", 9), ("os._exit(0)", 0), ("os.kill(os.getpid(), signal.SIGSEGV)", -11)],
)
def test_its_end_is_that_of_the_container(
    host: RunningServer, tmp_path: Path, ending: str, code: int
) -> None:
    push(host, tmp_path, server(reply=f"{REPLY}; {ending}"))
    connection = connector(host).connect(20)

    assert connection.act({"observation": 1}, 20) == 1  # its last words arrive
    with pytest.raises(PolicyLost):
        connection.act({"observation": 2}, 20)

    assert host.process.wait(30) == code


def test_a_signal_is_passed_on_and_nothing_is_left(host: RunningServer, tmp_path: Path) -> None:
    start = (
        "import subprocess; child = subprocess.Popen(['sleep', '600'])\n"
        "print('child is process', child.pid, flush=True)\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('asked to end', flush=True), os._exit(0)))"
    )
    push(host, tmp_path, server(start))
    child = next(int(line.split()[-1]) for line in host.printed if "child is process" in line)

    host.process.send_signal(signal.SIGTERM)

    assert host.process.wait(30) == -signal.SIGTERM
    host.wait_for_line("asked to end")
    assert identity_of(process_of(host)) is None
    assert identity_of(child) is None


def test_one_that_ignores_signals_is_killed_with_its_group(tmp_path: Path) -> None:
    children = Children()
    script = "trap '' TERM; sleep 600 & echo $!; wait"
    process = children.start(["sh", "-c", script], cwd=tmp_path, environ=os.environ, stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout as output:
        below = int(output.readline())

        children.end_all(timeout_seconds=0.1)

    assert process.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while identity_of(below) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(Stopping):
        children.start(["true"], cwd=tmp_path, environ=os.environ)


# ----------------------------------------------------------------------------------- what does not serve


@pytest.mark.parametrize(
    ("case", "main"),
    [
        ("exits_0_at_once", "print('done')"),
        ("exits_3_at_once", "import sys\nsys.exit(3)"),
        ("raises", "import no_such_package"),
        ("is_killed", "import os\nos.kill(os.getpid(), 9)"),
        (
            "speaks_http_only",
            "import http.server, sys\nhttp.server.test(bind='127.0.0.1', port=int(sys.argv[4]))",
        ),
        ("sends_a_text_first", server(greet="connection.send('Traceback: no weights')")),
        ("sends_a_list_first", server(greet="connection.send(msgpack.packb([1, 2]))")),
        ("sends_no_msgpack_first", server(greet="connection.send(bytes([0xc1, 0xc1]))")),
    ],
)
def test_one_that_cannot_be_used_is_told_at_once(
    host: RunningServer, tmp_path: Path, case: str, main: str
) -> None:
    check_golden("main_py", case, refusal(host, tmp_path, main))


@pytest.mark.parametrize(
    ("case", "main"),
    [
        ("never_opens_its_port", "import time\ntime.sleep(600)"),
        (
            "listens_and_says_nothing",
            "import socket, sys, time\n"
            "listener = socket.create_server(('127.0.0.1', int(sys.argv[4])))\ntime.sleep(600)",
        ),
        ("sends_no_metadata", server(greet="pass")),
    ],
)
def test_who_waits_is_told_how_far_it_came(host: RunningServer, tmp_path: Path, case: str, main: str) -> None:
    expected = {"never_opens_its_port": "does not listen", "listens_and_says_nothing": "does not answer"}
    with ThreadPoolExecutor() as pool:
        pushed = pool.submit(push, host, tmp_path, main)
        where = ""
        while expected.get(case, "does not send") not in where:
            assert not pushed.done(), pushed.result()
            time.sleep(0.02)
            where = status(host).get("where", "")
        _end(host)
        with pytest.raises(InfrastructureError):
            pushed.result()

    check_golden("main_py", case, re.sub(r"\(\d{4,5}\)", "(<port>)", where))


def test_the_hosts_own_deadline_ends_it(tmp_path: Path) -> None:
    with running_host(tmp_path / "work", KEY, "--load-timeout", "0.5") as host:
        text = refusal(
            host,
            tmp_path,
            "import os, time\nprint('main.py is process', os.getpid(), flush=True)\ntime.sleep(600)",
        )

        check_golden("main_py", "beyond_the_hosts_deadline", text)
        pid = process_of(host)
        deadline = time.monotonic() + 30
        while identity_of(pid) is not None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        _end(host)


def test_an_early_end_is_that_of_the_container_too_once_it_was_told(
    host: RunningServer, tmp_path: Path
) -> None:
    refusal(host, tmp_path, "import sys\nsys.exit(3)")

    assert host.process.poll() is None  # whoever asks is told
    assert "exit code 3" in refusal(host, tmp_path, "import sys\nsys.exit(3)")
    host.process.terminate()
    assert host.process.wait(30) == -signal.SIGTERM


def test_errors_of_the_protocol_are_those_of_the_policy(host: RunningServer, tmp_path: Path) -> None:
    reply = "connection.send('Traceback: out of memory' if observation['observation'] else b'xyz')"
    push(host, tmp_path, server(reply=reply))

    with pytest.raises(PolicyRaised, match="out of memory"):
        connector(host).connect(20).act({"observation": 1}, 20)
    with pytest.raises(PolicyProtocolError):
        connector(host).connect(20).act({"observation": 0}, 20)
