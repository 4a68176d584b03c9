"""What only containers of the process adapter promise: how they outlive us, and how nothing outlives them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from orchestrator.adapters.process.containers import ProcessContainers
from orchestrator.adapters.process.processes import (
    MARKER,
    ProcessIdentity,
    identity_of,
    marked_with,
    started_at,
)
from orchestrator.adapters.process.scratch import ContainerDirectory
from orchestrator.domain.errors import InfrastructureError
from orchestrator.ports import ContainerLimits, ContainerSpec, Verdict

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")

DEADLINE_SECONDS = 30.0
PRELUDE = """
import os, signal, sys, time
port_file, work_directory, key_fd = sys.argv[1], sys.argv[2], int(sys.argv[3])
def ready():
    with open(port_file + ".new", "w") as file:
        file.write("4242")
    os.rename(port_file + ".new", port_file)
def daemon(environment=None):
    "Double-fork a process with a session of its own; print its number."
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.write(writer, str(os.getpid()).encode())
            os.execve("/bin/sleep", ["sleep", "600"], os.environ if environment is None else environment)
        os._exit(0)
    os.wait()
    print("daemon", os.read(reader, 100).decode(), flush=True)
"""
WAIT_FOREVER = "ready(); signal.pause()"


def running(script: str, *arguments: str) -> Callable[[Path, Path, int], list[str]]:
    """The command line of a container that runs this script."""
    return lambda port_file, directory, key_fd: [
        *(sys.executable, "-c", PRELUDE + script),
        *(str(port_file), str(directory), str(key_fd), *arguments),
    ]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tmp_path / "containers"


@pytest.fixture
async def spec(base: Path) -> AsyncIterator[ContainerSpec]:
    """What to create; whatever its container leaves is removed after the test."""
    spec = ContainerSpec(
        container_id=uuid4(),
        installation_id=uuid4(),
        job_id=7,
        attempt=1,
        expires_at=datetime.now(UTC) + timedelta(minutes=5),
        session_key=os.urandom(32),
    )
    try:
        yield spec
    finally:
        containers = ProcessContainers(base)
        for owned in await containers.list_owned(spec.installation_id):
            await containers.remove(owned.handle)


@contextlib.contextmanager
def other_process(
    *command: str, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A child of the test, killed in the end."""
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


async def started(
    base: Path, spec: ContainerSpec, script: str, *arguments: str
) -> tuple[ProcessContainers, str]:
    containers = ProcessContainers(base, command=running(script, *arguments))
    handle = await containers.create(spec)
    await containers.wait_ready(handle, DEADLINE_SECONDS)
    return containers, handle


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not condition():
            await asyncio.sleep(0.02)


def directory_of(base: Path, spec: ContainerSpec) -> ContainerDirectory:
    return ContainerDirectory.of(base, spec.installation_id, spec.container_id)


def shim_of(base: Path, spec: ContainerSpec) -> ProcessIdentity:
    processes = directory_of(base, spec).read_processes()
    assert processes is not None
    return processes.shim


def container_processes(base: Path, spec: ContainerSpec) -> list[psutil.Process]:
    found = []
    for identity in marked_with(directory_of(base, spec).marker):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended since
            process = psutil.Process(identity.pid)
            found += [process] if identity.alive else []
    return found


async def logged(containers: ProcessContainers, handle: str) -> str:
    """The log once a whole line is in it: what was printed may still be on its way there."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while "\n" not in (log := await containers.logs(handle, 1000)):
            await asyncio.sleep(0.02)
    return log


async def daemon_of(containers: ProcessContainers, handle: str) -> ProcessIdentity:
    printed = (await logged(containers, handle)).split()
    daemon = identity_of(int(printed[printed.index("daemon") + 1]))
    assert daemon is not None
    return daemon


async def test_a_container_outlives_the_process_that_created_it(base: Path, spec: ContainerSpec) -> None:
    creator = """
import asyncio, datetime, sys, uuid
from pathlib import Path
from orchestrator.adapters.process.containers import ProcessContainers
from orchestrator.ports import ContainerSpec
expires_at = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=5)
spec = ContainerSpec(uuid.UUID(sys.argv[2]), uuid.UUID(sys.argv[3]), 7, 1, expires_at, bytes(32))
program = ["sleep", "600"]
containers = ProcessContainers(Path(sys.argv[1]), command=lambda *_: program)
print(asyncio.run(containers.create(spec)))
"""
    arguments = [str(base), str(spec.container_id), str(spec.installation_id)]
    creation = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", creator, *arguments), stdout=subprocess.PIPE
    )
    printed, _ = await creation.communicate()
    successor = ProcessContainers(base)

    owned = await successor.list_owned(spec.installation_id)

    handle = printed.decode().splitlines()[-1]
    assert [(each.container_id, each.handle, each.job_id) for each in owned] == [
        (spec.container_id, handle, 7)
    ]
    assert (await successor.evidence(handle)).running
    await successor.remove(handle)
    assert container_processes(base, spec) == []


async def test_a_killed_shim_takes_the_host_along_and_charges_nobody(base: Path, spec: ContainerSpec) -> None:
    containers, handle = await started(base, spec, WAIT_FOREVER)

    os.kill(shim_of(base, spec).pid, signal.SIGKILL)
    await until(lambda: container_processes(base, spec) == [])
    evidence = await containers.evidence(handle)

    assert (evidence.running, evidence.verdict) == (False, Verdict.INFRASTRUCTURE)
    assert "lost" in evidence.reason


async def test_removal_after_a_killed_shim_ends_its_daemons(base: Path, spec: ContainerSpec) -> None:
    containers, handle = await started(base, spec, "daemon(); " + WAIT_FOREVER)
    daemon = await daemon_of(containers, handle)
    shim = shim_of(base, spec)
    os.kill(shim.pid, signal.SIGKILL)
    await until(lambda: not shim.alive)
    assert daemon.alive

    await containers.remove(handle)

    assert not daemon.alive
    assert not base.exists() or list(base.iterdir()) == []


async def test_a_daemon_ends_with_its_container_even_without_our_marker(
    base: Path, spec: ContainerSpec
) -> None:
    containers, handle = await started(base, spec, "daemon(environment={}); " + WAIT_FOREVER)
    daemon = await daemon_of(containers, handle)
    assert daemon.alive

    await containers.remove(handle)

    assert not daemon.alive


async def test_a_daemon_ends_when_the_host_ends(base: Path, spec: ContainerSpec) -> None:
    script = "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(3)); daemon(environment={}); " + WAIT_FOREVER
    containers, handle = await started(base, spec, script)
    daemon = await daemon_of(containers, handle)
    processes = directory_of(base, spec).read_processes()
    assert processes is not None

    os.kill(processes.host.pid, signal.SIGUSR1)
    await until(lambda: not processes.shim.alive)

    assert not daemon.alive
    assert (await containers.evidence(handle)).reason == "exit code 3"


async def test_the_end_of_the_host_is_seen_by_whoever_asks_at_once(base: Path, spec: ContainerSpec) -> None:
    containers, handle = await started(base, spec, WAIT_FOREVER)
    processes = directory_of(base, spec).read_processes()
    assert processes is not None

    os.kill(processes.host.pid, signal.SIGSEGV)
    await until(lambda: not processes.host.alive)
    evidence = await containers.evidence(handle)

    assert "SIGSEGV" in evidence.reason


async def test_a_container_with_a_frozen_shim_is_removed(base: Path, spec: ContainerSpec) -> None:
    containers, handle = await started(base, spec, "daemon(environment={}); " + WAIT_FOREVER)
    daemon = await daemon_of(containers, handle)
    shim = shim_of(base, spec)
    os.kill(shim.pid, signal.SIGSTOP)

    await containers.remove(handle)

    assert not shim.alive
    assert not daemon.alive


async def test_a_shim_that_does_not_obey_is_killed_with_all_below_it(base: Path, spec: ContainerSpec) -> None:
    stubborn = """
import os, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    print(os.getpid(), flush=True)
while True:
    signal.pause()
"""
    _, handle = await started(base, spec, WAIT_FOREVER)
    containers = ProcessContainers(base, stop_timeout_seconds=0.1)
    with other_process(sys.executable, "-c", stubborn) as shim:
        assert shim.stdout is not None
        below = started_at(int(await asyncio.to_thread(shim.stdout.readline)))
        forged = json.loads(handle) | {"shim": dataclasses.asdict(started_at(shim.pid))}

        await containers.remove(json.dumps(forged))

        assert shim.wait(DEADLINE_SECONDS) == -signal.SIGKILL
    assert not below.alive
    assert container_processes(base, spec) == []


async def test_a_process_that_has_the_number_of_a_dead_shim_is_not_touched(
    base: Path, spec: ContainerSpec
) -> None:
    containers, handle = await started(base, spec, WAIT_FOREVER)
    shim = shim_of(base, spec)
    with other_process("sleep", "600") as bystander:
        forged = json.loads(handle) | {"shim": {"pid": bystander.pid, "started": shim.started}}

        await containers.remove(json.dumps(forged))

        assert bystander.poll() is None
    assert container_processes(base, spec) == []


async def test_a_container_ends_with_the_process_that_it_depends_on(base: Path, spec: ContainerSpec) -> None:
    with other_process("sleep", "600") as node:
        containers = ProcessContainers(base, watch_pid=node.pid, command=running(WAIT_FOREVER))
        handle = await containers.create(spec)
        await containers.wait_ready(handle, DEADLINE_SECONDS)
        node.kill()

    await until(lambda: container_processes(base, spec) == [])

    evidence = await containers.evidence(handle)
    assert (evidence.running, evidence.verdict) == (False, Verdict.INFRASTRUCTURE)


async def test_a_container_ends_when_its_directory_is_removed(base: Path, spec: ContainerSpec) -> None:
    await started(base, spec, WAIT_FOREVER)

    await asyncio.to_thread(shutil.rmtree, base)

    await until(lambda: container_processes(base, spec) == [])


async def test_processes_without_a_directory_are_listed_and_removed(base: Path, spec: ContainerSpec) -> None:
    containers = ProcessContainers(base)
    marker = directory_of(base, spec).marker
    with other_process("sleep", "600", environment={MARKER: marker}) as orphan:
        owned = await containers.list_owned(spec.installation_id)

        await containers.remove(owned[0].handle)

        assert [each.container_id for each in owned] == [spec.container_id]
        assert orphan.wait(DEADLINE_SECONDS) == -signal.SIGKILL
    assert await containers.list_owned(spec.installation_id) == []


async def test_a_start_that_was_cut_off_is_begun_anew(base: Path, spec: ContainerSpec) -> None:
    directory = directory_of(base, spec)
    directory.root.mkdir(parents=True)
    (directory.root / "spec.json").write_text('{"job')

    _, handle = await started(base, spec, WAIT_FOREVER)

    assert (await ProcessContainers(base).evidence(handle)).running


async def test_a_container_that_cannot_start_leaves_nothing(base: Path, spec: ContainerSpec) -> None:
    containers = ProcessContainers(base, command=lambda *_: ["/no/such/program"])

    with pytest.raises(InfrastructureError, match="/no/such/program"):
        await containers.create(spec)

    assert await containers.list_owned(spec.installation_id) == []
    assert list(base.iterdir()) == []
    assert container_processes(base, spec) == []


async def test_the_environment_holds_nothing_of_ours(
    base: Path, spec: ContainerSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ORCHESTRATOR_DATABASE_URL", "RAY_ADDRESS", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "our-secret")
    await started(base, spec, WAIT_FOREVER)

    processes = container_processes(base, spec)

    assert len(processes) == 2  # the shim and the host
    for process in processes:
        environment = process.environ()
        assert "our-secret" not in environment.values()
        assert [name for name in environment if name.startswith(("ORCHESTRATOR_", "RAY_"))] == [MARKER]
        assert environment["HOME"] == str(directory_of(base, spec).home)
        assert environment["TMPDIR"].startswith(environment["HOME"])
        assert environment["OMP_NUM_THREADS"] == "1"


async def test_the_session_key_is_in_no_command_line_environment_or_file(
    base: Path, spec: ContainerSpec
) -> None:
    script = "os.fdopen(key_fd).read(); " + WAIT_FOREVER
    _, handle = await started(base, spec, script)
    secrets = (spec.session_key, spec.session_key.hex().encode())

    seen = [handle.encode()]
    for process in container_processes(base, spec):
        proc = Path(f"/proc/{process.pid}")
        seen += [(proc / "cmdline").read_bytes(), (proc / "environ").read_bytes()]
    seen += [path.read_bytes() for path in base.rglob("*") if path.is_file()]

    assert len(seen) >= 8
    assert not [text for text in seen if any(secret in text for secret in secrets)]


async def test_only_this_user_may_look_into_the_directory(base: Path, spec: ContainerSpec) -> None:
    await started(base, spec, WAIT_FOREVER)

    directory = directory_of(base, spec)

    for path in (base, directory.root.parent, directory.root, directory.home, directory.work):
        assert path.stat().st_mode & 0o777 == 0o700


async def test_what_a_submission_made_hard_to_remove_is_removed(base: Path, spec: ContainerSpec) -> None:
    script = """
os.mkdir("locked"); open("locked/file", "w").close(); os.chmod("locked", 0)
for _ in range(1500):
    os.mkdir("deep")
    os.chdir("deep")
"""
    containers, handle = await started(base, spec, script + WAIT_FOREVER)

    await containers.remove(handle)

    assert list(base.iterdir()) == []


CHAIN = """
# Each process lives for a moment and leaves a successor. Should we fail to end them, they end by themselves.
fifo = os.open(sys.argv[4], os.O_WRONLY)
until = time.monotonic() + 20
if os.fork() > 0:
    os.wait()
    ready()
    signal.pause()
os.setsid()
if os.fork() > 0:
    os._exit(0)
while time.monotonic() < until:
    if os.fork() > 0:
        os._exit(0)
    if NEW_SESSIONS:
        os.setsid()
    time.sleep(0.002)
os._exit(0)
"""


@pytest.mark.parametrize(("new_sessions", "shim_killed"), [(False, False), (True, False), (False, True)])
async def test_a_chain_of_processes_that_replace_each_other_is_ended(
    base: Path, tmp_path: Path, spec: ContainerSpec, new_sessions: bool, shim_killed: bool
) -> None:
    # All of them hold the pipe's writing end: the reader meets the end of file when the last one is gone.
    os.mkfifo(tmp_path / "fifo")
    script = CHAIN.replace("NEW_SESSIONS", str(new_sessions))
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    try:
        containers, handle = await started(base, spec, script, str(tmp_path / "fifo"))
        if shim_killed:
            os.kill(shim_of(base, spec).pid, signal.SIGKILL)
        with pytest.raises(BlockingIOError):
            os.read(reader, 1)

        await containers.remove(handle)

        # A killed process closes what it holds a moment later; a chain that lives never does.
        async with asyncio.timeout(20):
            while not _has_ended(reader):
                await asyncio.sleep(0.01)
    finally:
        os.close(reader)


def _has_ended(reader: int) -> bool:
    try:
        return os.read(reader, 1) == b""
    except BlockingIOError:
        return False


async def test_cores_set_the_number_of_threads(base: Path, spec: ContainerSpec) -> None:
    wider = dataclasses.replace(spec, limits=ContainerLimits(cpus=2.5))
    containers, handle = await started(base, wider, "print(os.environ['OMP_NUM_THREADS']); " + WAIT_FOREVER)

    assert await logged(containers, handle) == "2\n"
