"""The real submission host in a pod of the double: sealed, given an archive, and serving its policy."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from orchestrator.adapters.artifacts.pack import pack_directory
from orchestrator.adapters.policies.host_client import SubmissionHostClient
from orchestrator.adapters.policies.websocket import WebSocketConnector
from orchestrator.domain.errors import InfrastructureError
from orchestrator.ports import Endpoint
from tests.kubernetes_double import ApiDouble, Plan, PodControl
from tests.kubernetes_double.refusals import Json
from tests.unit.kubernetes_double.double_client import Client, a_config_map, a_pod

CARTPOLE = Path(__file__).resolve().parents[3] / "examples" / "cartpole"
KEY = bytes(range(32))
RPC_PORT = 8000


def a_host() -> Json:
    """A pod as the adapter makes it: the key by its anchor, volumes for work and tmp, the host sealed."""
    pod = a_pod("host")
    pod["spec"]["volumes"].append({"name": "tmp", "emptyDir": {}})
    container = pod["spec"]["containers"][0]
    container["command"] = [
        *("python", "-m", "orchestrator.submission.host"),
        *("--directory", "/work", "--host", "0.0.0.0", "--port", str(RPC_PORT), "--no-index", "--seal"),
    ]
    container["volumeMounts"].append({"name": "tmp", "mountPath": "/tmp"})
    reference = {"configMapKeyRef": {"name": "anchor", "key": "session-key"}}
    container["env"] = [
        {"name": "ORCHESTRATOR_SESSION_KEY", "valueFrom": reference},
        {"name": "HOME", "value": "/tmp"},
    ]
    return pod


async def running_host(client: Client) -> tuple[PodControl, Endpoint]:
    await client.create(a_config_map("anchor", **{"session-key": KEY.hex()}))
    assert (answer := await client.create(a_host())).status == 201, answer.body
    control = client.double.pod("host")
    running = await control.reaches("Running")
    return control, Endpoint(running["status"]["podIP"], RPC_PORT)


async def test_a_host_seals_takes_its_archive_serves_and_ends_at_a_signal(
    client: Client, tmp_path: Path
) -> None:
    packed = pack_directory(CARTPOLE, tmp_path)
    _, endpoint = await running_host(client)
    host = SubmissionHostClient(endpoint, KEY, require_sealed=True)

    await host.push_archive(packed.path, packed.sha256, timeout_seconds=60)
    connector = WebSocketConnector(endpoint.host, endpoint.port, session_key=KEY)
    connection = await asyncio.to_thread(connector.connect, 10.0)
    action = await asyncio.to_thread(connection.act, {"observation": np.zeros(4, np.float32)}, 10.0)
    connection.close()
    version = client.double.store.version
    await client.call("DELETE", "pods/host")
    async with asyncio.timeout(20):
        while client.double.names("pods"):
            await client.double.store.next_change.wait()

    ends = [
        change.after["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"]
        for change in client.double.store.changes_after(version)
        if change.after is not None and "terminated" in str(change.after)
    ]
    assert action in (0, 1)
    assert set(ends) == {143}  # by the signal, and not by the end of the grace period


async def test_a_host_whose_egress_stays_open_is_given_nothing(
    double: ApiDouble, client: Client, tmp_path: Path
) -> None:
    packed = pack_directory(CARTPOLE, tmp_path)
    double.next_pod(Plan(egress_stays_open=True))
    _, endpoint = await running_host(client)
    host = SubmissionHostClient(endpoint, KEY, require_sealed=True)

    with pytest.raises(InfrastructureError, match="NetworkPolicy"):
        await host.push_archive(packed.path, packed.sha256, timeout_seconds=4)
