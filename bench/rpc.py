"""A policy's round trip: ours against the floor, and in CPU against the published client and its server."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

from bench.floor import floor
from bench.rounds import Case, Target
from orchestrator.adapters.policies.websocket import WebSocketConnection, WebSocketConnector
from orchestrator.submission.wire import packb
from tests.openpi_environment import openpi_interpreter
from tests.policy_processes import running_policy_server, write_agent

AGENT = """
import numpy as np

ACTION = np.zeros(4, np.float32)


class Agent:
    def act(self, observation):
        return ACTION
"""
STATE = {"observation": np.linspace(-1, 1, 39)}
IMAGE = np.random.default_rng(1).integers(0, 255, (224, 224, 3), dtype=np.uint8)
IMAGES = {"base": IMAGE, "wrist": IMAGE[::-1].copy()}
ACTION = np.zeros(4, np.float32)
CALLS = 3000
IMAGE_CALLS = 400
CALL_SECONDS = 30.0
STOCK_END_SECONDS = 20.0


class Block:
    """Calls of a policy, timed one by one, with the CPU that client and server took."""

    def __init__(self, connection: WebSocketConnection, server: psutil.Process) -> None:
        self._connection = connection
        self._server = server

    def run(self, observation: dict[str, Any], calls: int) -> tuple[float, float]:
        """The median in microseconds, and the CPU microseconds a call of both sides together."""
        act, now, taken = self._connection.act, time.perf_counter_ns, []
        before = time.process_time() + sum(self._server.cpu_times()[:2])
        for _ in range(calls):
            began = now()
            act(observation, CALL_SECONDS)
            taken.append(now() - began)
        used = time.process_time() + sum(self._server.cpu_times()[:2]) - before
        return median(taken) / 1000, used / calls * 1e6


def measure(rounds: int) -> list[Case]:
    trip = Case("policy round trip, 39 float64 in, 4 float32 out", "µs", "floor", Target(at_most=5))
    cpu = Case("CPU of client and server a call", "µs", "openpi-client and its server", Target(at_most=0.6))
    images = Case("two images of 224×224×3 in, 4 float32 out", "µs", "floor", Target(at_most=1.5))
    reply = len(packb({"actions": ACTION}))
    with (
        _policy() as block,
        _stock() as stock,
        floor(len(packb(STATE)), reply) as small,
        floor(len(packb(IMAGES)), reply) as large,
    ):
        block.run(STATE, CALLS // 4)  # warm
        for _ in range(rounds):
            reference = small.round_trips(CALLS)
            measured, ours = block.run(STATE, CALLS)
            trip.add(measured, reference)
            cpu.add(ours, _stock_block(stock)["cpu_us"])
            reference = large.round_trips(IMAGE_CALLS)
            images.add(block.run(IMAGES, IMAGE_CALLS)[0], reference)
    return [trip, cpu, images]


@contextmanager
def _policy() -> Iterator[Block]:
    with (
        tempfile.TemporaryDirectory(prefix="orc-bench-") as directory,
        running_policy_server(write_agent(Path(directory), AGENT)) as server,
    ):
        connection = WebSocketConnector("127.0.0.1", server.port).connect(CALL_SECONDS)
        try:
            yield Block(connection, psutil.Process(server.process.pid))
        finally:
            connection.close()


@contextmanager
def _stock() -> Iterator[subprocess.Popen[str]]:
    script = Path(__file__).with_name("stock.py")
    process = subprocess.Popen(
        [str(openpi_interpreter()), str(script), str(CALLS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError("the published client did not start")
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()  # it ends then, and its server with it
        try:
            process.wait(STOCK_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


def _stock_block(process: subprocess.Popen[str]) -> dict[str, float]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    answer: dict[str, float] = json.loads(process.stdout.readline())
    return answer
