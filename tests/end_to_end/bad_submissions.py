"""Submissions that do wrong, each as its author might have written it, or as somebody who means harm would.

All but those that never load share `COMMON`: a policy that plays well but for what `at_reset` and
`at_step_10` do, which stand below it. What happens on the wire, where an `agent.py` has no say, is done as a
hostile one would do it: by changing the server that it runs in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

EPISODES_BY_DEFAULT = 2
GOOD_EPISODES = 20
STEP_TIMEOUT_SECONDS = 8
MEMORY_BYTES = 200 * 2**20
DISK_BYTES = 64 * 2**20
MAX_CONTAINERS = 3


@dataclass(frozen=True)
class Submission:
    """An `agent.py`, how many episodes it plays, and what its job says besides."""

    source: str
    episodes: int = EPISODES_BY_DEFAULT
    config: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)


COMMON = """
import os, sys, time
import numpy as np


class Agent:
    def reset(self, episode, seed):
        self.episode, self.step = episode, -1
        at_reset(episode)

    def act(self, observation):
        self.step += 1
        action = np.zeros(1, np.float32)
        return at_step_10(self.episode, action) if self.step == 10 else action


def at_reset(episode):
    pass


def at_step_10(episode, action):
    return action
"""

# ------------------------------------------------------------------------------- what never plays

SYNTAX_ERROR = """
class Agent:
    def act(self, observation)
        return 0
"""

MISSING_CLASS = """
class Policy:
    def act(self, observation):
        return 0
"""

MISSING_PACKAGE = """
import numpy
import no_such_package


class Agent:
    def act(self, observation):
        return 0
"""

SYS_EXIT = "import sys\n\nsys.exit(0)\n"

EXITS_AT_ONCE = "import os\n\nprint('nothing to do', flush=True)\nos._exit(0)\n"

CLOSES_ITS_PORT = """
import contextlib, gc, socket, time


def close_the_port():
    for thing in gc.get_objects():
        if type(thing) is socket.socket:
            with contextlib.suppress(OSError):  # of a connection that was closed meanwhile
                if thing.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    thing.shutdown(socket.SHUT_RDWR)
    time.sleep(3600)
"""

NEVER_OPENS_ITS_PORT = "\nclose_the_port()\n"

OPENS_IT_IN_THE_SECOND_CONTAINER = """
import pathlib

been_here = pathlib.Path({notes!r} + "-been-here")
if not been_here.exists():
    been_here.touch()
    close_the_port()
"""

REFUSES_THE_KEY = """
import time
from orchestrator.submission import door

prove = door.prove_as_server
door.prove_as_server = lambda stream, key, deadline: prove(stream, bytes(32), deadline)
time.sleep(3600)
"""

OPENS_TOO_LATE = """
import time


def download_weights():
    time.sleep(3600)


download_weights()
"""

OPENS_LATE = "import time\n\ntime.sleep(3)\n"

# --------------------------------------------------------------------------- what plays, and how

ACTIONS = """
def look_up(table, state):
    return table[state]


BAD = {
    1: lambda action: action * np.nan,
    3: lambda action: action + np.inf,
    5: lambda action: np.zeros(3),
    7: lambda action: action > 0,
    9: lambda action: action.astype(complex),
    11: lambda action: "left",
    13: lambda action: look_up({}, "upright"),
    17: lambda action: action + 5,
}


def at_reset(episode):
    if episode == 15:
        raise RuntimeError("no weights for this episode")


def at_step_10(episode, action):
    return BAD[episode](action) if episode in BAD else action
"""

OUT_OF_BOUNDS = """
def at_step_10(episode, action):
    return action - 2.5 if episode == 1 else action
"""

WIRE = """
import struct
from orchestrator.submission.transport import WebSocket
from orchestrator.submission.wire import packb, unpackb

honest_send = WebSocket.send
tricks = []  # what is done in place of the next send


def send(websocket, message, deadline):
    (tricks.pop() if tricks else honest_send)(websocket, message, deadline)


WebSocket.send = send


def twice(websocket, message, deadline):
    frames = []
    for _ in range(2):
        websocket._protocol.send_binary(message)
        frames += websocket._protocol.data_to_send()
    websocket._stream.send_all(b"".join(frames), deadline)


def for_an_earlier_request(websocket, message, deadline):
    reply = unpackb(message)
    reply["__sequence__"] -= 1
    honest_send(websocket, packb(reply), deadline)


def of_one_gigabyte(websocket, message, deadline):
    websocket._stream.send_all(struct.pack("!BBQ", 0x82, 127, 2**30), deadline)
    for _ in range(2**10):
        websocket._stream.send_all(bytes(2**20), deadline)


def none_but_hang_up(websocket, message, deadline):
    websocket._stream.close()


def byte_by_byte(websocket, message, deadline):
    websocket._protocol.send_binary(message)
    for byte in b"".join(websocket._protocol.data_to_send()):
        websocket._stream.send_all(bytes([byte]), None)
        time.sleep(0.2)
"""

REPLIES = """
def at_step_10(episode, action):
    bad = {1: twice, 3: for_an_earlier_request, 5: of_one_gigabyte, 7: none_but_hang_up}
    if episode in bad:
        tricks.append(bad[episode])
    return action
"""

HANGS = """
import threading


def at_reset(episode):
    if episode == 3:
        threading.Event().wait()


def at_step_10(episode, action):
    if episode == 1:
        print("waits for a message that never comes", flush=True)
        threading.Event().wait()
    if episode == 5:
        tricks.append(byte_by_byte)
    return action
"""

ENDS = """
import ctypes


def at_step_10(episode, action):
    if episode == 1:
        print("cannot go on like this")
        os._exit(9)
    if episode == 3:
        ctypes.string_at(0)
    if episode == 5:
        os._exit(0)
    return action
"""

ALWAYS_ENDS = """
def at_step_10(episode, action):
    os._exit(1)
"""

MEMORY = """
def hoard():
    held = []
    for _ in range(20):
        held.append(bytearray(b"x") * 2**24)
        time.sleep(0.02)
    time.sleep(3600)


def at_step_10(episode, action):
    if episode == 1:
        hoard()
    if episode == 3:
        for _ in range(4):
            if os.fork() == 0:
                held = bytearray(b"x") * 2**26
                time.sleep(3600)
        time.sleep(3600)
    return action
"""

DISK = """
def at_step_10(episode, action):
    if episode == 1:
        for number in range(16):
            with open(f"rollout-{number}", "wb") as file:
                file.write(bytes(2**23))
            time.sleep(0.05)
        time.sleep(3600)
    if episode == 3:
        with open("cache", "wb") as file:
            while True:
                file.write(bytes(2**20))
    return action
"""

PRINTS = """
def at_reset(episode):
    if episode == 2:
        root = os.path.abspath("../../..")
        sizes = [os.stat(f"{{root}}/{{name}}").st_size for name in ("log", "log.old")]
        open({notes!r} + "-log-bytes", "w").write(str(sum(sizes)))


def at_step_10(episode, action):
    if episode == 1:
        block = (b"printed " * 8)[:-1] + b"\\n"
        for _ in range(2**10):
            os.write(1, block * 2**14)
    return action
"""

# Each process notes itself, as it is known to the kernel: its number, and when it started.
FORKS = """
def note():
    with open({notes!r}, "a") as file:
        stat = open("/proc/self/stat").read()
        file.write(f"{{os.getpid()}} {{stat[stat.rindex(')') + 2:].split()[19]}}\\n")


def live_on_as_a_child():
    if os.fork() == 0:
        note()
        os.write(noted, b".")
        time.sleep(3600)


def live_on_as_a_daemon():
    if os.fork() == 0:
        os.setsid()
        if os.fork() > 0:
            os._exit(0)
        os.chdir("/")
        note()
        os.write(noted, b".")
        os.execve("/bin/sleep", ["sleep", "3600"], {{}})  # without the mark of its container


def at_step_10(episode, action):
    global noted
    if episode in (1, 3, 5):
        heard, noted = os.pipe()
        live_on_as_a_daemon() if episode == 3 else live_on_as_a_child()
        os.read(heard, 1)
    if episode == 5:
        os._exit(7)
    return action
"""


def submissions(notes: str) -> dict[str, Submission]:
    """Every submission by name, in the order in which their jobs are queued."""
    late = {"step_timeout_seconds": STEP_TIMEOUT_SECONDS}
    patient = {"step_timeout_seconds": 120}
    return {
        "opens_too_late": Submission(OPENS_TOO_LATE + COMMON),
        "hangs": Submission(COMMON + WIRE + HANGS, 7, late),
        "good": Submission(COMMON, GOOD_EPISODES),
        "syntax_error": Submission(SYNTAX_ERROR),
        "missing_class": Submission(MISSING_CLASS),
        "missing_package": Submission(MISSING_PACKAGE),
        "sys_exit": Submission(SYS_EXIT),
        "exits_at_once": Submission(EXITS_AT_ONCE),
        "never_opens_its_port": Submission(CLOSES_ITS_PORT + NEVER_OPENS_ITS_PORT),
        "silent_once": Submission(
            CLOSES_ITS_PORT + OPENS_IT_IN_THE_SECOND_CONTAINER.format(notes=notes) + COMMON
        ),
        "refuses_the_key": Submission(REFUSES_THE_KEY),
        "opens_late": Submission(OPENS_LATE + COMMON),
        "actions": Submission(COMMON + ACTIONS, GOOD_EPISODES),
        "out_of_bounds": Submission(COMMON + OUT_OF_BOUNDS, 3, {"out_of_bounds_actions": "fault"}),
        "replies": Submission(COMMON + WIRE + REPLIES, 9),
        "ends": Submission(COMMON + ENDS, 7),
        "always_ends": Submission(COMMON + ALWAYS_ENDS, MAX_CONTAINERS + 2),
        "memory": Submission(COMMON + MEMORY, 5, patient, {"resources": {"memory_bytes": MEMORY_BYTES}}),
        "disk": Submission(COMMON + DISK, 5, patient),
        "prints": Submission(COMMON + PRINTS.format(notes=notes), 3, patient),
        "forks": Submission(COMMON + FORKS.format(notes=notes), 7, patient),
        "good_at_the_end": Submission(COMMON, GOOD_EPISODES),
    }
