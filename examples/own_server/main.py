"""Serves the policy protocol itself: a CartPole controller without our base class, or any of our code.

It is started as `python main.py --host 127.0.0.1 --port PORT`, and runs until it is stopped. On each
connection (a WebSocket, binary messages of msgpack) it speaks first, with a map of whatever it wants to tell
of itself; then each observation gets one reply, a map with the key `actions`. To write one in another
language, see docs/protocol.md.
"""

import argparse
import struct

import msgpack
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import serve

# For cart position, cart velocity, pole angle and pole angular velocity; see examples/cartpole.
WEIGHTS = (0.1, 0.35, 3.0, 1.0)


def numbers(array):
    """An array as it travels, {b"__ndarray__": True, b"dtype": "<f4", b"shape": [4], b"data": ...}."""
    letter = {"<f4": "f", "<f8": "d"}[array[b"dtype"]]
    return struct.unpack(f"<{array[b'shape'][0]}{letter}", array[b"data"])


def push(observation):
    """0 to push the cart to the left, 1 to the right."""
    return int(sum(weight * value for weight, value in zip(WEIGHTS, observation, strict=True)) > 0)


def converse(connection):
    """One connection, in a thread of its own: one episode after the other."""
    try:
        connection.send(msgpack.packb({"policy": "linear controller"}))
        for message in connection:
            observation = msgpack.unpackb(message)["observation"]
            connection.send(msgpack.packb({"actions": push(numbers(observation))}))
    except ConnectionClosed:
        return  # the evaluation is over


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    # Without compression, and without a limit: observations may hold images.
    with serve(converse, options.host, options.port, compression=None, max_size=None) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
