"""What every server of the default wire gives our client, and what our server gives openpi's client."""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import platformdirs
import pytest

from orchestrator.adapters.policies.host_client import SubmissionHostClient
from orchestrator.adapters.policies.websocket import WebSocketConnector
from orchestrator.authoring.findings import Finding, Mark
from orchestrator.authoring.wire_check import ProbeObservation, WireCheck
from orchestrator.authoring.wire_probe import ServerUnderTest
from orchestrator.domain.errors import PolicyLate, PolicyLost, PolicyRaised
from orchestrator.ports import Endpoint, PolicyConnection
from tests.policy_processes import running, running_host, running_policy_server, write_agent, write_archive

HERE = Path(__file__).parent
PEER = HERE / "openpi_peer.py"
POLICY = (HERE / "scripted_policy.py").read_text()
KEY = bytes(range(32))
OPENPI_CLIENT = "openpi-client==0.1.2"
# The first run makes an environment, which takes its time on a busy machine.
pytestmark = pytest.mark.timeout(900)
UNREACHABLE = re.compile(
    r"Failed to establish|Name or service|name resolution|ConnectTimeout|ReadTimeout|ProxyError"
)


@pytest.fixture(scope="session")
def openpi_python() -> Path:
    """The interpreter of an environment with the published openpi-client; its numpy pin excludes ours."""
    version = "".join(map(str, sys.version_info[:2]))
    cache = Path(platformdirs.user_cache_dir("orchestrator-tests"))
    home = cache / f"{OPENPI_CLIENT.replace('==', '-')}-py{version}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{home.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "complete").exists():
            shutil.rmtree(home, ignore_errors=True)
            _install_openpi_client(home)
            (home / "complete").touch()
    return home / "bin" / "python"


def _install_openpi_client(home: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True, timeout=300)
    # It imports typing_extensions without requiring it. Its numpy has no wheels for Python 3.13, where the
    # client itself works with a newer one.
    wanted = [OPENPI_CLIENT, "typing_extensions"]
    if sys.version_info >= (3, 13):
        wanted = ["--no-deps", *wanted, "numpy", "msgpack", "websockets"]
    pip = [
        str(home / "bin" / "python"),
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--retries",
        "2",
    ]
    done = subprocess.run(
        [*pip, "--only-binary", ":all:", *wanted], capture_output=True, text=True, timeout=600
    )
    if done.returncode == 0:
        return
    shutil.rmtree(home, ignore_errors=True)
    output = done.stdout + done.stderr
    said = f"{OPENPI_CLIENT} cannot be installed:\n{output[-2000:]}"
    if UNREACHABLE.search(output) and not os.environ.get("CI"):
        pytest.skip(f"the package index cannot be reached, so nothing was checked: {said}")
    pytest.fail(said)


@pytest.fixture(scope="module")
def openpi_server(openpi_python: Path) -> Iterator[WebSocketConnector]:
    with running([str(PEER), "server"], python=openpi_python) as server:
        yield WebSocketConnector("127.0.0.1", server.port)


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebSocketConnector]:
    with running_policy_server(write_agent(tmp_path_factory.mktemp("agent"), POLICY)) as server:
        yield WebSocketConnector("127.0.0.1", server.port)


@pytest.fixture(scope="module")
def pushed_submission(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebSocketConnector]:
    directory = tmp_path_factory.mktemp("pushed")
    sha256 = write_archive(directory / "a.tar.gz", {"agent.py": POLICY})
    with running_host(directory / "work", KEY) as server:
        host = SubmissionHostClient(Endpoint("127.0.0.1", server.port), KEY)
        # A loop factory leaves the event loop of the tests alone.
        with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
            runner.run(host.push_archive(directory / "a.tar.gz", sha256, 60))
        yield WebSocketConnector("127.0.0.1", server.port, KEY)


@pytest.fixture(params=["openpi_server", "own_server", "pushed_submission"])
def connector(request: pytest.FixtureRequest) -> WebSocketConnector:
    return request.getfixturevalue(request.param)


@pytest.fixture
def connection(connector: WebSocketConnector) -> Iterator[PolicyConnection]:
    connection = connector.connect(20)
    yield connection
    connection.close()


@pytest.mark.parametrize(
    "value",
    [
        np.random.default_rng(1).integers(0, 255, (64, 48, 3), dtype=np.uint8),
        np.float32([0.1, -0.0, np.inf]),
        np.float16(0.3),
        np.array(7),
        np.zeros((0, 4), np.int16),
        np.array([True, False]),
        np.arange(6, dtype=">i4").reshape(2, 3),
    ],
    ids=lambda value: f"{value.dtype}{list(value.shape)}",
)
def test_arrays_come_back_bit_for_bit(connection: PolicyConnection, value: np.ndarray) -> None:
    actions = connection.act({"do": "echo", "value": value}, 20)

    assert (actions.dtype, actions.shape, actions.tobytes()) == (value.dtype, value.shape, value.tobytes())


@pytest.mark.parametrize("value", [5, -0.25, True, None, "text", [1, [2.5]], {"arm": 1, "grip": False}])
def test_plain_values_come_back_as_they_were(connection: PolicyConnection, value: object) -> None:
    assert connection.act({"do": "echo", "value": value}, 20) == value


def test_the_policy_keeps_its_state_over_the_steps(connection: PolicyConnection) -> None:
    assert [connection.act({"do": "count"}, 20) for _ in range(200)] == list(range(1, 201))


def test_connections_do_not_share_a_policy_instance(connector: WebSocketConnector) -> None:
    first, second = connector.connect(20), connector.connect(20)

    counts = [connection.act({"do": "count"}, 20) for connection in (first, first, second)]

    assert counts == [1, 2, 1]
    first.close()
    second.close()


def test_a_reset_is_harmless_whether_or_not_it_is_announced(connection: PolicyConnection) -> None:
    connection.reset(3, 4, 20)

    assert connection.act({"do": "count"}, 20) == 1
    assert connection.supports_reset == (connection.metadata.get("server") == "orchestrator")


def test_an_exception_is_told_and_ends_the_connection(connection: PolicyConnection) -> None:
    with pytest.raises(PolicyRaised, match="the policy cannot go on"):
        connection.act({"do": "raise"}, 20)
    with pytest.raises(PolicyLost):
        connection.act({"do": "count"}, 20)


def test_a_stalled_policy_is_late_and_its_reply_is_never_used(connection: PolicyConnection) -> None:
    with pytest.raises(PolicyLate):
        connection.act({"do": "stall", "value": 1}, 0.1)
    with pytest.raises(PolicyLost):
        connection.act({"do": "count"}, 20)


@pytest.mark.parametrize("name", ["openpi_server", "own_server"])
def test_servers_of_the_wire_keep_every_rule_of_the_page(name: str, request: pytest.FixtureRequest) -> None:
    connector: WebSocketConnector = request.getfixturevalue(name)
    findings: list[Finding] = []
    server = ServerUnderTest(Endpoint(connector.host, connector.port), 20, 20)

    is_playable = WireCheck(server, ProbeObservation({"do": "echo", "value": 1}), findings.append).run()

    assert is_playable
    assert [finding for finding in findings if finding.mark is Mark.WRONG] == []


def test_the_published_client_drives_our_server(own_server: WebSocketConnector, openpi_python: Path) -> None:
    done = subprocess.run(
        [str(openpi_python), str(PEER), "client", str(own_server.port)],
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert "every exchange was right" in done.stdout, done.stderr
