"""One side of a conversation with the published openpi-client's own code; run in its environment.

`client PORT` drives a server with their client; `server` serves the scripted policy as openpi's servers do,
with their codec.
"""

import sys
import traceback

import numpy as np
import websockets.exceptions
import websockets.sync.server
from openpi_client import msgpack_numpy, websocket_client_policy
from scripted_policy import Agent


def drive(port):
    policy = websocket_client_policy.WebsocketClientPolicy("127.0.0.1", port)
    assert policy.get_server_metadata()["server"] == "orchestrator"
    image = np.random.default_rng(1).integers(0, 255, (224, 224, 3), dtype=np.uint8)
    for value in (
        image,
        np.float32([0.5, -1]),
        np.array(2, np.int64),
        np.zeros((0, 3)),
        np.array([True, False]),
    ):
        actions = policy.infer({"do": "echo", "value": value, "prompt": "open the drawer"})["actions"]
        assert actions.dtype == value.dtype
        assert actions.shape == value.shape
        assert actions.tobytes() == value.tobytes()
    nested = policy.infer({"do": "echo", "value": {"arm": np.ones(7), "grip": np.float32(0.25)}})["actions"]
    assert nested["arm"].tolist() == [1.0] * 7
    assert nested["grip"] == 0.25
    reply = policy.infer({"do": "count"})
    assert reply["actions"] == 7
    assert reply["server_timing"]["infer_ms"] >= 0
    try:
        policy.infer({"do": "raise"})
        told = "nothing"
    except RuntimeError as error:
        told = str(error)
    assert "the policy cannot go on" in told
    print("every exchange was right")


def converse(connection):
    packer = msgpack_numpy.Packer()
    agent = Agent()
    connection.send(packer.pack({"policy": "scripted"}))
    while True:
        try:
            observation = msgpack_numpy.unpackb(connection.recv())
            connection.send(packer.pack({"actions": agent.act(observation)}))
        except websockets.exceptions.ConnectionClosed:
            return
        except Exception:
            connection.send(traceback.format_exc())
            connection.close(1011, "the policy raised")
            return


def serve():
    with websockets.sync.server.serve(converse, "127.0.0.1", 0, compression=None, max_size=None) as server:
        print(f"serving on 127.0.0.1:{server.socket.getsockname()[1]}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    drive(int(sys.argv[2])) if sys.argv[1] == "client" else serve()
