"""The policy server as a process, driven by our own client."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import msgpack
import numpy as np
import pytest

from orchestrator.adapters.policies.websocket import WebSocketConnection, WebSocketConnector
from orchestrator.domain.errors import PolicyLate, PolicyLost, PolicyRaised
from orchestrator.submission.transport import ByteStream, open_websocket
from orchestrator.submission.wire import packb, unpackb
from tests.policy_processes import RunningServer, running_policy_server, write_agent

AGENT = """
import os
import sys
import numpy as np

instances = 0

class Agent:
    def __init__(self):
        global instances
        instances += 1
        self.number = instances
        self.rng = None

    def reset(self, episode, seed):
        if episode < 0:
            raise ValueError("no such episode")
        self.rng = np.random.default_rng([episode, seed])

    def act(self, observation):
        if not isinstance(observation, dict):
            observation *= 2  # what it is given is its own
            return observation
        return getattr(self, observation["do"])(observation)

    def echo(self, observation):
        return observation

    def number_of_instance(self, observation):
        return self.number

    def draw(self, observation):
        return self.rng.normal(size=3)

    def own_reply(self, observation):
        return {"actions": np.ones(2), "note": "mine"}

    def unsendable(self, observation):
        return {"arm": object()}

    def nothing(self, observation):
        return None

    def exit(self, observation):
        sys.exit(3)

    def die(self, observation):
        os._exit(3)

    def environment(self, observation):
        return {"argv": sys.argv, "variables": sorted(os.environ)}

    def shout(self, observation):
        print("said by the agent")
        return 0
"""

Connect = Callable[[], WebSocketConnection]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    directory = write_agent(tmp_path_factory.mktemp("agent"), AGENT)
    with running_policy_server(directory, "--connections", "8") as server:
        yield server


@pytest.fixture
def connect(server: RunningServer) -> Iterator[Connect]:
    """Retries a while: the server may still be about to notice that the last test's connections ended."""
    with ExitStack() as stack:

        def run() -> WebSocketConnection:
            deadline = time.monotonic() + 10
            while True:
                try:
                    connection = WebSocketConnector("127.0.0.1", server.port).connect(10)
                except PolicyLost:
                    assert time.monotonic() < deadline
                    continue
                stack.callback(connection.close)
                return connection

        yield run


def test_the_metadata_announces_the_extensions(connect: Connect) -> None:
    connection = connect()

    assert connection.metadata["server"] == "orchestrator"
    assert connection.metadata["extensions"] == ["reset", "sequence"]
    assert connection.supports_reset


def test_an_observation_arrives_whole_and_without_our_own_key(connect: Connect) -> None:
    observation = {"do": "echo", "image": np.arange(12, dtype=np.uint8).reshape(2, 2, 3), "depth": [1, 2.5]}

    reply = connect().act(observation, 10)

    assert reply.keys() == {"do", "image", "depth"}
    assert np.array_equal(reply["image"], observation["image"])
    assert reply["image"].dtype == np.uint8


def test_a_lone_observation_is_handed_over_bare_and_may_be_changed(connect: Connect) -> None:
    assert connect().act({"observation": np.array([1.5, 2.0])}, 10).tolist() == [3.0, 4.0]


def test_every_connection_has_an_instance_of_its_own(connect: Connect) -> None:
    first, second = connect(), connect()

    numbers = [connection.act({"do": "number_of_instance"}, 10) for connection in (first, second, first)]

    assert numbers[0] == numbers[2] != numbers[1]


def test_a_reset_reaches_the_agent(connect: Connect) -> None:
    connection = connect()
    connection.reset(4, 2**31 - 1, 10)

    drawn = connection.act({"do": "draw"}, 10)

    assert np.array_equal(drawn, np.random.default_rng([4, 2**31 - 1]).normal(size=3))


def test_a_reply_of_the_agents_own_is_the_reply(connect: Connect) -> None:
    assert connect().act({"do": "own_reply"}, 10).tolist() == [1.0, 1.0]
    assert connect().act({"do": "nothing"}, 10) is None


def test_an_exception_gives_the_authors_traceback_and_only_ends_its_connection(
    connect: Connect, server: RunningServer
) -> None:
    doomed, other = connect(), connect()

    with pytest.raises(PolicyRaised) as caught:
        doomed.act({"do": "no_such_method"}, 10)

    assert 'agent.py", line' in str(caught.value)
    assert "AttributeError" in str(caught.value)
    assert "policy_server" not in str(caught.value)
    assert other.act({"do": "echo"}, 10) == {"do": "echo"}
    with pytest.raises(PolicyLost):
        doomed.act({"do": "echo"}, 10)
    server.wait_for_line("AttributeError")


@pytest.mark.parametrize(
    ("method", "text"), [("unsendable", "['actions']['arm']"), ("exit", "SystemExit: 3")]
)
def test_what_act_may_not_do_is_reported_as_its_exception(connect: Connect, method: str, text: str) -> None:
    with pytest.raises(PolicyRaised) as caught:
        connect().act({"do": method}, 10)

    assert text in str(caught.value)


def test_an_exception_in_reset_is_reported(connect: Connect) -> None:
    with pytest.raises(PolicyRaised, match="no such episode"):
        connect().reset(-1, 0, 10)


def test_what_the_agent_prints_comes_out_at_once(connect: Connect, server: RunningServer) -> None:
    connect().act({"do": "shout"}, 10)

    server.wait_for_line("said by the agent")


@pytest.mark.parametrize(
    "message",
    [
        b"\xc1",
        msgpack.packb([1]),
        "text",
        packb({"__orchestrator__": "stop"}),
        packb({"__orchestrator__": np.array([1, 2]), "episode": 1, "seed": 1}),
    ],
)
def test_a_client_that_breaks_the_protocol_is_cut_off(message: bytes | str, server: RunningServer) -> None:
    deadline = time.monotonic() + 10
    stream = ByteStream.connect("127.0.0.1", server.port, deadline)
    websocket = open_websocket(stream, "127.0.0.1", server.port, "/", 2**20, deadline)
    websocket.receive(deadline)
    websocket.send(message, deadline)

    with pytest.raises(ConnectionError, match="1002"):
        websocket.receive(deadline)
    websocket.close()


def test_a_client_that_numbers_nothing_gets_plain_replies(server: RunningServer) -> None:
    deadline = time.monotonic() + 10
    stream = ByteStream.connect("127.0.0.1", server.port, deadline)
    websocket = open_websocket(stream, "127.0.0.1", server.port, "/", 2**20, deadline)
    websocket.receive(deadline)
    websocket.send(packb({"do": "echo"}), deadline)

    reply = unpackb(websocket.receive(deadline))  # type: ignore[arg-type]

    assert reply.keys() == {"actions", "server_timing"}
    websocket.close()


def test_what_is_no_websocket_is_refused_over_http(server: RunningServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")

        assert client.recv(100).startswith(b"HTTP/1.1 426 ")


def test_connections_above_the_limit_are_closed_at_once_and_places_come_back(
    connect: Connect, server: RunningServer
) -> None:
    connections = [connect() for _ in range(8)]
    with pytest.raises(PolicyLost):
        WebSocketConnector("127.0.0.1", server.port).connect(10)
    for connection in connections:
        connection.close()

    assert connect().act({"do": "echo"}, 10) == {"do": "echo"}


def test_the_death_of_the_process_is_a_lost_connection(tmp_path: Path) -> None:
    with running_policy_server(write_agent(tmp_path / "agent", AGENT)) as server:
        connection = WebSocketConnector("127.0.0.1", server.port).connect(10)

        with pytest.raises(PolicyLost):
            connection.act({"do": "die"}, 10)

        assert server.process.wait(30) == 3


def test_sigterm_ends_it_at_once_whatever_the_agent_does(tmp_path: Path) -> None:
    busy = "import time\nclass Agent:\n    def act(self, o):\n        print('busy', flush=True)\n"
    with running_policy_server(write_agent(tmp_path / "agent", busy + "        time.sleep(600)")) as server:
        connection = WebSocketConnector("127.0.0.1", server.port).connect(10)
        with pytest.raises(PolicyLate):
            connection.act({"observation": 1}, 0.2)

        server.process.send_signal(signal.SIGTERM)

        assert server.process.wait(30) == -signal.SIGTERM


def test_a_constructor_that_fails_later_is_reported_to_its_connection(tmp_path: Path) -> None:
    once = (
        "made = []\nclass Agent:\n    def __init__(self):\n        made.append(1)\n"
        "        assert len(made) < 2, 'only one'\n    def act(self, o):\n        return o\n"
    )
    with running_policy_server(write_agent(tmp_path / "agent", once)) as server:
        connector = WebSocketConnector("127.0.0.1", server.port)
        first = connector.connect(10)

        with pytest.raises(PolicyRaised, match="only one"):
            connector.connect(10)

        assert first.act({"observation": 1}, 10) == 1
        first.close()
