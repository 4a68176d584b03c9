"""A Ray cluster of three nodes on this machine, with a GCS that keeps its tables on disk."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray.cluster_utils
from ray._private.state import GlobalState
from ray._raylet import GcsClientOptions

NODES = 3
CPUS = 4
OBJECT_STORE_BYTES = 80 * 2**20
ASK_SECONDS = 20.0
END_SECONDS = 30.0
PREFIX = "orc-cr-"  # short: sockets below it have long names


@dataclass(frozen=True, slots=True)
class Actor:
    """A living actor: its class, its name ("" without one), and its process."""

    kind: str
    name: str
    pid: int


class ChaosCluster:
    """Made in a directory of its own, with a short path; `close` leaves nothing of it."""

    def __init__(self) -> None:
        _sweep()
        self.directory = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir="/tmp"))
        # Nodes and what they start inherit it.
        os.environ.update(
            RAY_AUTH_MODE="disabled",
            RAY_USAGE_STATS_ENABLED="0",
            RAY_gcs_storage="rocksdb",
            RAY_gcs_storage_path=str(self.directory / "gcs"),
        )
        (self.directory / "gcs").mkdir()
        head: dict[str, Any] = {"include_dashboard": True, "dashboard_port": 0, **self._node()}
        # Nothing of Ray's at the exit: its hooks are for the main thread, and its reaper for the thread that
        # starts a node.
        self._cluster = ray.cluster_utils.Cluster(
            initialize_head=True, head_node_args=head, shutdown_at_exit=False
        )
        self.address: str = self._cluster.address
        self.dashboard = f"http://{self._cluster.head_node.webui_url}"
        self._workers = [self._cluster.add_node(**self._node()) for _ in range(NODES - 1)]
        self._state: GlobalState | None = None

    def _node(self) -> dict[str, Any]:
        return {
            "num_cpus": CPUS,
            "object_store_memory": OBJECT_STORE_BYTES,
            "temp_dir": str(self.directory),
        }

    # ------------------------------------------------------------------------------ what there is

    async def actors(self) -> list[Actor]:
        """The living actors.

        Raises:
            TimeoutError: the GCS does not answer.
        """
        table = await self._ask(lambda state: state.actor_table(None, None, None))
        return [
            Actor(row["ActorClassName"], row["Name"], row["Pid"])
            for row in table.values()
            if row["State"] == "ALIVE"
        ]

    async def placement_groups(self) -> list[str]:
        """The placement groups that hold, or wait for, resources."""
        table = await self._ask(lambda state: state.placement_group_table())
        return [name for name, row in table.items() if row["state"] != "REMOVED"]

    async def _ask(self, question: Any) -> dict[str, Any]:
        def ask() -> dict[str, Any]:
            if self._state is None:
                self._state = GlobalState()
                self._state._initialize_global_state(
                    GcsClientOptions.create(
                        self.address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False
                    )
                )
            answer: dict[str, Any] = question(self._state)
            return answer

        async with asyncio.timeout(ASK_SECONDS):
            return await asyncio.to_thread(ask)

    # --------------------------------------------------------------------------- what is done to it

    def kill_raylet(self, pick: float) -> int:
        """Kill the raylet of a node other than the head's, and with it its workers; its process's number."""
        node = self._workers.pop(int(pick * len(self._workers)))
        pid: int = node.all_processes["raylet"][0].process.pid
        os.kill(pid, signal.SIGKILL)
        self._cluster.remove_node(node, allow_graceful=False)
        return pid

    def add_node(self) -> None:
        """In the place of one that was killed."""
        self._workers.append(self._cluster.add_node(wait=False, **self._node()))

    def kill_gcs(self) -> int:
        head = self._cluster.head_node
        pid: int = head.all_processes["gcs_server"][0].process.pid
        os.kill(pid, signal.SIGKILL)
        head.kill_gcs_server(check_alive=False)
        return pid

    def start_gcs(self) -> None:
        self._cluster.head_node.start_gcs_server()

    def processes(self) -> list[psutil.Process]:
        """Every process of the cluster: all name its directory."""
        return _processes_of(self.directory)

    def close(self) -> None:
        """End every process of it."""
        with suppress(Exception):
            self._cluster.shutdown()
        _remove(self.directory)


def _sweep() -> None:
    """End the clusters whose runner was killed."""
    for directory in Path("/tmp").glob(f"{PREFIX}*-*"):
        runner = directory.name.removeprefix(PREFIX).split("-")[0]
        if runner.isdigit() and not psutil.pid_exists(int(runner)):
            _remove(directory)


def _remove(directory: Path) -> None:
    until = time.monotonic() + END_SECONDS
    while (left := _processes_of(directory)) and time.monotonic() < until:
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        time.sleep(0.1)
    shutil.rmtree(directory, ignore_errors=True)


def _processes_of(directory: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and any(str(directory) in part for part in process.cmdline()):
                found.append(process)
    return found
