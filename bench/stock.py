"""The published openpi-client and a server as openpi's, measured in their own environment: `stock.py CALLS`.

For each line on standard input, one block of calls, and a line of JSON. Nothing of ours is imported.
"""

import json
import os
import sys
import time
from multiprocessing import get_context
from statistics import median

import numpy as np
import websockets.exceptions
import websockets.sync.server
from openpi_client import msgpack_numpy, websocket_client_policy

ACTIONS = np.zeros(4, np.float32)


def converse(connection):
    packer = msgpack_numpy.Packer()
    connection.send(packer.pack({}))
    while True:
        try:
            msgpack_numpy.unpackb(connection.recv())
            connection.send(packer.pack({"actions": ACTIONS}))
        except websockets.exceptions.ConnectionClosed:
            return


def serve(told):
    with websockets.sync.server.serve(converse, "127.0.0.1", 0, compression=None, max_size=None) as server:
        told.send(server.socket.getsockname()[1])
        server.serve_forever()


def cpu_seconds(pid):
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main(calls):
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(theirs,), daemon=True)
    server.start()
    policy = websocket_client_policy.WebsocketClientPolicy("127.0.0.1", ours.recv())
    observation = {"observation": np.linspace(-1, 1, 39)}
    print("ready", flush=True)
    for _ in sys.stdin:
        taken, before = [], (time.process_time(), cpu_seconds(server.pid))
        for _ in range(calls):
            began = time.perf_counter_ns()
            policy.infer(observation)
            taken.append(time.perf_counter_ns() - began)
        used = time.process_time() - before[0] + cpu_seconds(server.pid) - before[1]
        print(json.dumps({"median_us": median(taken) / 1000, "cpu_us": used / calls * 1e6}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
