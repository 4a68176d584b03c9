"""A million hostile inputs for all that reads a stranger's bytes; some of them for every commit.

`FUZZ_SEED` repeats a campaign. A finding names the command that plays its one input again.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.client import ClientProtocol
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.uri import WebSocketURI

from orchestrator.submission.transport import ByteStream, WebSocket
from tests.fuzz.campaign import run
from tests.fuzz.inputs import frame
from tests.fuzz.targets import local_pair

ROOT = Path(__file__).resolve().parents[2]
MILLION = {
    "decoder": 500_000,
    "actions": 100_000,
    "client": 120_000,
    "server": 120_000,
    "handshake": 60_000,
    "host": 60_000,
    "host_replies": 40_000,
}
FIXED_SEED = 20_260_101  # for every commit: what one change breaks is not found by another one


def campaign(target: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.fuzz.campaign", target, *options]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False, stdin=subprocess.DEVNULL
    )


def outcome(target: str, executions: int, seed: int) -> dict[str, Any]:
    done = campaign(target, "--executions", str(executions), "--seed", str(seed))
    again = f"python -m tests.fuzz.campaign {target} --seed {seed} --only NUMBER plays one input again"
    assert done.returncode == 0, f"{done.stderr}\n{again}"
    print(done.stdout)
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


@pytest.mark.parametrize(("target", "executions"), MILLION.items())
def test_some_hostile_inputs_end_as_documented_within_the_memory_cap(target: str, executions: int) -> None:
    seen = outcome(target, executions // 20, FIXED_SEED)

    assert seen["executions"] == executions // 20
    assert len(seen["endings"]) > 1  # some were taken, some refused


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("target", "executions"), MILLION.items())
def test_a_million_hostile_inputs_end_as_documented_within_the_memory_cap(
    target: str, executions: int
) -> None:
    seed = int(os.environ.get("FUZZ_SEED") or secrets.randbits(31))

    seen = outcome(target, executions, seed)

    assert seen["executions"] == executions
    assert len(seen["endings"]) > 1


def test_the_slow_campaigns_are_a_million() -> None:
    assert sum(MILLION.values()) == 1_000_000


def test_a_finding_is_named_by_its_number_and_seed(capfd: pytest.CaptureFixture[str]) -> None:
    class Faulty:
        def play(self, rng: random.Random) -> str:
            return "fine" if rng.random() < 0.9 else str(1 // 0)

    with pytest.raises(ZeroDivisionError):
        run(Faulty(), 7, range(1000))

    assert "finding: execution" in capfd.readouterr().err


HUNG_AFTER_ITS_FINDING = """
import threading
from tests.fuzz import campaign

class Faulty:
    def play(self, rng):
        raise ZeroDivisionError

campaign.HANG_SECONDS = 0.2
try:
    campaign.run(Faulty(), 7, range(1))
except ZeroDivisionError:
    threading.Event().wait(1.0)
    print("still there")
"""


def test_a_campaign_with_a_finding_leaves_no_watch_over_its_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HUNG_AFTER_ITS_FINDING], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stdout) == (0, "still there\n"), done.stderr


def test_memory_above_the_cap_is_a_finding() -> None:
    code = "from tests.fuzz import campaign as c; c.cap_memory(); bytearray(2 * c.MEMORY_BYTES)"

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)

    assert "MemoryError" in done.stderr


# ----------------------------------------------------------------------------------------- round trip

MESSAGES = st.lists(st.tuples(st.booleans(), st.binary(max_size=300)), min_size=1, max_size=4)
CONTROL = st.sampled_from([None, None, (9, b""), (9, b"ping"), (10, b"x" * 125)])


@st.composite
def conversations(draw: st.DrawFn, *, masked: bool) -> tuple[list[bytes | str], list[bytes]]:
    """Messages, and pieces of a stream that carries them in fragments with control frames in between."""
    messages: list[bytes | str] = []
    sent = bytearray()
    for is_text, payload in draw(MESSAGES):
        cuts = sorted(draw(st.lists(st.integers(0, len(payload)), max_size=4)))
        parts = [payload[start:end] for start, end in zip([0, *cuts], [*cuts, len(payload)], strict=True)]
        for index, part in enumerate(parts):
            opcode = (1 if is_text else 2) if index == 0 else 0
            sent += frame(part, opcode, fin=index == len(parts) - 1, masked=masked)
            if control := draw(CONTROL):
                sent += frame(control[1], control[0], masked=masked)
        messages.append(payload.decode("utf-8", "replace") if is_text else payload)
    ends = sorted(draw(st.lists(st.integers(0, len(sent)), max_size=6)))
    return messages, [bytes(sent[a:b]) for a, b in zip([0, *ends], [*ends, len(sent)], strict=True)]


@given(st.data(), st.booleans())
def test_messages_arrive_whole_and_in_order_however_they_are_cut(
    data: st.DataObject, at_server: bool
) -> None:
    messages, pieces = data.draw(conversations(masked=at_server))
    protocol: ClientProtocol | ServerProtocol
    if at_server:
        protocol = ServerProtocol(state=State.OPEN)
    else:
        protocol = ClientProtocol(WebSocketURI(False, "x", 1, "/", ""), state=State.OPEN)

    with local_pair() as (ours, peer):
        websocket = WebSocket(ByteStream(ours), protocol, pieces[0])
        for piece in pieces[1:]:
            peer.sendall(piece)
        peer.shutdown(socket.SHUT_WR)
        arrived = [websocket.receive(None) for _ in messages]

    assert arrived == messages
