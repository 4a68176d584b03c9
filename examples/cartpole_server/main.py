"""Balances CartPole-v1 as a server of its own: all of docs/protocol.md that a policy needs, in one file.

It shows the wire, so it does by hand what a library could: it needs `websockets` and `msgpack`, and neither
NumPy nor anything of Orchestrator. Start it by `python main.py --host 127.0.0.1 --port 8000`, or submit its
directory: a submission with a `main.py` is started just so. The numbers in brackets are sections of the page.
"""

import argparse
import struct
import traceback

import msgpack
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import serve

MAX_MESSAGE_BYTES = 64 * 2**20  # [8]
METADATA = {"extensions": ["reset", "sequence"]}  # [3, 6]

# The weights of cart position, cart velocity, pole angle and pole angular velocity: see examples/cartpole.
WEIGHTS = (0.1, 0.35, 3.0, 1.0)
PUSH_LEFT, PUSH_RIGHT = 0, 1

FORMATS = {"|b1": "?", "|i1": "b", "|u1": "B"} | {
    f"{order}{kind}": order + letter
    for order in "<>"
    for kind, letter in zip(("i2", "i4", "i8", "u2", "u4", "u8", "f2", "f4", "f8"), "hiqHIQefd", strict=True)
}


class Policy:
    """One connection's policy [9]."""

    def __init__(self):
        self.seed = 0

    def reset(self, episode, seed):
        """An episode begins: a policy with a memory, or with random numbers, would begin afresh here."""
        self.seed = seed

    def act(self, observation):
        """The push for four numbers."""
        lean = sum(weight * value for weight, value in zip(WEIGHTS, observation["observation"], strict=True))
        return PUSH_RIGHT if lean > 0 else PUSH_LEFT


def decode(message):
    """The value of a binary message, its arrays as flat tuples of numbers [4]."""
    if isinstance(message, str):
        raise ValueError("a request is a binary message")
    return msgpack.unpackb(message, object_hook=numbers, strict_map_key=True)


def numbers(entries):
    """The numbers of an array or a scalar; any other map as it is."""
    if b"__ndarray__" in entries:
        letters = FORMATS[entries[b"dtype"]]
        return tuple(value for (value,) in struct.iter_unpack(letters, entries[b"data"]))
    if b"__npgeneric__" in entries:
        return entries[b"data"]
    return entries


def answer(policy, request):
    """The reply to one request [5, 6]."""
    if "__orchestrator__" in request:
        policy.reset(request["episode"], request["seed"])
        return {"__orchestrator__": "reset", "sequence": request["sequence"]}
    sequence = request.pop("__sequence__")
    return {"actions": policy.act(request), "__sequence__": sequence}


def converse(connection):
    """One connection, from the metadata to its end."""
    policy = Policy()
    try:
        connection.send(msgpack.packb(METADATA))  # the server speaks first [3]
        while True:
            request = decode(connection.recv())
            connection.send(msgpack.packb(answer(policy, request)))
    except ConnectionClosed:
        return  # the client has done with this policy [10]
    except Exception:  # noqa: BLE001 - whatever it is, the client is told
        connection.send(traceback.format_exc())  # a text message is an error [7]
        connection.close(1011, "the policy failed")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    # No compression and no pings [1], and messages as large as pictures are [8].
    settings = {"compression": None, "ping_interval": None, "max_size": MAX_MESSAGE_BYTES}
    with serve(converse, options.host, options.port, **settings) as server:
        print(f"serving on {options.host}:{server.socket.getsockname()[1]}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
