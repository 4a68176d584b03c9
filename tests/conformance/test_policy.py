"""What every server of the default wire gives our client, and what our server gives openpi's client."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from orchestrator.adapters.policies.host_client import SubmissionHostClient
from orchestrator.adapters.policies.websocket import WebSocketConnector
from orchestrator.authoring.findings import Finding, Mark
from orchestrator.authoring.wire_check import ProbeObservation, WireCheck
from orchestrator.authoring.wire_probe import ServerUnderTest
from orchestrator.domain.errors import PolicyLate, PolicyLost, PolicyRaised
from orchestrator.ports import Endpoint, PolicyConnection
from tests.openpi_environment import NotInstalled, openpi_interpreter
from tests.policy_processes import running, running_host, running_policy_server, write_agent, write_archive

HERE = Path(__file__).parent
PEER = HERE / "openpi_peer.py"
POLICY = (HERE / "scripted_policy.py").read_text()
KEY = bytes(range(32))
# The first run makes an environment, which takes its time on a busy machine.
pytestmark = pytest.mark.timeout(900)
UNREACHABLE = re.compile(
    r"Failed to establish|Name or service|name resolution|ConnectTimeout|ReadTimeout|ProxyError"
)


@pytest.fixture(scope="session")
def openpi_python() -> Path:
    """The interpreter of an environment with the published openpi-client; its numpy pin excludes ours."""
    try:
        return openpi_interpreter()
    except NotInstalled as failed:
        if UNREACHABLE.search(str(failed)) and not os.environ.get("CI"):
            pytest.skip(f"the package index cannot be reached, so nothing was checked: {failed}")
        pytest.fail(str(failed))


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
