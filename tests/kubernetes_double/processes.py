"""The process of a pod's container on this machine: what it runs, where, and what it printed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.kubernetes_double.refusals import Json

MARKER = "KUBERNETES_DOUBLE_POD"
LOG_FILE_BYTES = 10 * 2**20  # the runtime starts a new file then, and only the newest is read
EVERY_ADDRESS = ("0.0.0.0", "::")
REPOSITORY = Path(__file__).resolve().parents[2]
_REFERENCE = re.compile(r"\$\(([A-Za-z_][A-Za-z0-9_]*)\)")


class CannotStart(Exception):
    """The runtime could not start the container: `StartError`."""


class ConfigMissing(Exception):
    """Its environment names what is not there: `CreateContainerConfigError`."""


@dataclass(frozen=True)
class ContainerPlace:
    """Where the volumes of a pod stand on this machine, and under which address it is reached."""

    directory: Path
    address: str
    mounts: dict[str, Path]  # by mount path

    @classmethod
    def of(cls, pod: Json, directory: Path, address: str) -> ContainerPlace:
        """Its scratch directory, made, with one directory a volume."""
        container = pod["spec"]["containers"][0]
        mounts = {
            mount["mountPath"].rstrip("/"): directory / mount["name"]
            for mount in container.get("volumeMounts") or []
        }
        for path in [directory, *mounts.values()]:
            path.mkdir(parents=True, exist_ok=True)
        return cls(directory, address, mounts)

    def local(self, text: str) -> str:
        """An argument or a value as it has to be here: paths in volumes, and the pod's own address."""
        if text in EVERY_ADDRESS:
            return self.address
        option, equals, value = text.partition("=") if text.startswith("--") else ("", "", text)
        for mount_path, here in sorted(self.mounts.items(), reverse=True):
            if value == mount_path or value.startswith(mount_path + "/"):
                return f"{option}{equals}{here}{value[len(mount_path) :]}"
        return text

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)


def environment_of(pod: Json, config_maps: dict[str, Json], place: ContainerPlace) -> dict[str, str]:
    """The environment that its container asks for.

    Raises:
        ConfigMissing: a ConfigMap or a key of one.
    """
    environment: dict[str, str] = {}
    for variable in pod["spec"]["containers"][0].get("env") or []:
        value = variable.get("value")
        if value is None and "valueFrom" in variable:
            value = _value_from(variable["valueFrom"], pod, config_maps, place)
        if value is not None:
            environment[variable["name"]] = place.local(_expanded(value, environment))
    return environment


def _value_from(source: Json, pod: Json, config_maps: dict[str, Json], place: ContainerPlace) -> str | None:
    if "configMapKeyRef" in source:
        wanted = source["configMapKeyRef"]
        config_map = config_maps.get(wanted["name"])
        if config_map is None and not wanted.get("optional"):
            raise ConfigMissing(f'configmap "{wanted["name"]}" not found')
        value: str | None = ((config_map or {}).get("data") or {}).get(wanted["key"])
        if value is None and not wanted.get("optional"):
            raise ConfigMissing(
                f"couldn't find key {wanted['key']} in ConfigMap "
                f"{pod['metadata']['namespace']}/{wanted['name']}"
            )
        return value
    if "fieldRef" in source:
        if source["fieldRef"]["fieldPath"] == "status.podIP":
            return place.address
        found: object = pod
        for part in source["fieldRef"]["fieldPath"].split("."):
            found = found.get(part, "") if isinstance(found, dict) else ""
        return str(found)
    raise ConfigMissing(f"the double knows no {sorted(source)}")


def _expanded(text: str, environment: dict[str, str]) -> str:
    return _REFERENCE.sub(lambda match: environment.get(match[1], match[0]), text)


class ContainerProcess:
    """PID 1 of a container, everything below it, and its log. `exit_code` is as the kubelet reports it."""

    def __init__(self, process: asyncio.subprocess.Process, uid: str) -> None:
        self._process = process
        self._uid = uid
        self._log = bytearray()
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(
        cls, pod: Json, place: ContainerPlace, environment: dict[str, str], api: tuple[str, int]
    ) -> ContainerProcess:
        """The container's command, as a process.

        Raises:
            CannotStart: there is no such program.
        """
        container = pod["spec"]["containers"][0]
        command = [*(container.get("command") or ["python"]), *(container.get("args") or [])]
        command = [place.local(_expanded(part, environment)) for part in command]
        if command[0] in ("python", "python3", "/usr/bin/python3", "/usr/local/bin/python"):
            command[0] = sys.executable
        uid = pod["metadata"]["uid"]
        # The runtime's own variables come besides; nothing of ours goes along.
        whole = {
            "PATH": os.pathsep.join((os.path.dirname(sys.executable), os.defpath)),
            "PYTHONPATH": str(REPOSITORY),  # what the image has installed
            "HOSTNAME": pod["metadata"]["name"],
            "TMPDIR": str(place.directory),
            "KUBERNETES_SERVICE_HOST": api[0],
            "KUBERNETES_SERVICE_PORT": str(api[1]),
            "KUBERNETES_SERVICE_PORT_HTTPS": str(api[1]),
            "KUBERNETES_PORT": f"tcp://{api[0]}:{api[1]}",
            **environment,
            MARKER: uid,
        }
        directory = place.local(container.get("workingDir") or str(place.directory))
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                env=whole,
                cwd=directory,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise CannotStart(
                f'failed to create containerd task: exec: "{command[0]}": {error.strerror}'
            ) from error
        return cls(process, uid)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> bytes:
        """The newest file of its log."""
        return bytes(self._log)

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while chunk := await self._process.stdout.read(2**16):
            self._log += chunk
            if len(self._log) > LOG_FILE_BYTES:
                newest = self._log.rfind(b"\n", 0, len(self._log) // 2) + 1
                del self._log[: newest or LOG_FILE_BYTES // 2]

    async def wait(self) -> int:
        """The exit code, once PID 1 has ended; by then nothing else of the container runs either."""
        code = await self._process.wait()
        await self._end_all()
        await asyncio.wait({self._reading})
        return code if code >= 0 else 128 - code

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def kill(self) -> None:
        """Everything in it at once, as the kernel does when the memory of a cgroup is used up."""
        for pid in [self.pid, *descendants(self.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    async def _end_all(self) -> None:
        await asyncio.to_thread(end_marked, self._uid)


def descendants(pid: int) -> list[int]:
    """The processes below this one, without looking at every process of the machine."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


def memory_bytes(pid: int) -> int:
    """The resident memory of a process and all below it."""
    total = 0
    for each in [pid, *descendants(pid)]:
        with contextlib.suppress(psutil.Error):
            total += psutil.Process(each).memory_info().rss
    return total


def directory_bytes(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):
            if not path.is_symlink() and path.is_file():
                total += path.stat().st_blocks * 512
    return total


def marked(uids: Iterable[str]) -> Iterator[int]:
    """Every process that carries the mark of one of these pods."""
    wanted = {f"{MARKER}={uid}".encode() for uid in uids}
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            if not wanted.isdisjoint(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")):
                yield pid


def end_marked(uid: str) -> None:
    """Kill whatever is left of a pod, until nothing is."""
    for _ in range(1000):
        left = [pid for pid in marked([uid]) if pid != os.getpid()]
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def free_address(taken: Iterable[str], numbers: Iterator[int], port: int) -> str:
    """A loopback address on which this port is free, and which no other pod has."""
    taken = set(taken)
    for number in numbers:
        address = f"127.{64 + (number >> 16) % 128}.{(number >> 8) % 256}.{1 + number % 254}"
        if address in taken:
            continue
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
            return address
    raise AssertionError("unreachable: the numbers have no end")
