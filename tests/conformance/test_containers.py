"""What every adapter of `Containers` promises; one joins by a fixture parameter and a `Backend` of its own.

`make test-kubernetes` runs it on a real cluster too, where nothing of it can be arranged from outside.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from orchestrator.domain.episodes import FaultClass
from orchestrator.domain.errors import InfrastructureError, SubmissionError
from orchestrator.ports import ContainerLimits, Containers, ContainerSpec, Evidence, Verdict
from tests.conformance.container_backends import MEBIBYTE, Backend, process_backend
from tests.conformance.kubernetes_backend import cluster_backend, double_backend

WAIT_FOREVER = "ready(); signal.pause()"


@pytest.fixture
def installation_id() -> UUID:
    return uuid4()


@pytest.fixture(
    params=[process_backend, double_backend, pytest.param(cluster_backend, marks=pytest.mark.kubernetes)],
    ids=["process", "double", "cluster"],
)
async def backend(
    request: pytest.FixtureRequest, tmp_path: Path, installation_id: UUID
) -> AsyncIterator[Backend]:
    async with request.param(tmp_path) as backend:
        try:
            yield backend
        finally:
            await backend.close(installation_id)


@pytest.fixture
def spec(installation_id: UUID) -> ContainerSpec:
    return ContainerSpec(
        container_id=uuid4(),
        installation_id=installation_id,
        job_id=7,
        attempt=1,
        expires_at=datetime.now(UTC) + timedelta(minutes=5),
        session_key=bytes(range(32)),
    )


async def end_of(backend: Backend, containers: Containers, handle: str) -> Evidence:
    """The evidence once the container has ended."""
    async with asyncio.timeout(backend.traits.deadline_seconds):
        while (evidence := await containers.evidence(handle)).running:
            await asyncio.sleep(0.05)
    return evidence


async def logged(backend: Backend, containers: Containers, handle: str, text: str) -> str:
    """The log once it has `text` in it: what was printed may still be on its way there."""
    async with asyncio.timeout(backend.traits.deadline_seconds):
        while text not in (log := await containers.logs(handle, 2 * MEBIBYTE)):
            await asyncio.sleep(0.05)
    return log


async def test_a_created_container_becomes_ready_and_runs_until_it_is_removed(
    backend: Backend, spec: ContainerSpec
) -> None:
    containers = backend.containers(WAIT_FOREVER)

    handle = await containers.create(spec)
    endpoint = await containers.wait_ready(handle, backend.traits.deadline_seconds)
    while_it_runs = await containers.evidence(handle)
    await containers.remove(handle)

    assert endpoint.port == backend.traits.port
    assert while_it_runs == Evidence(running=True, reason="running")
    gone = await containers.evidence(handle)
    assert (gone.running, gone.reason, gone.verdict) == (False, "gone", Verdict.INFRASTRUCTURE)
    assert await containers.list_owned(spec.installation_id) == []


async def test_two_creates_at_once_make_one_container(backend: Backend, spec: ContainerSpec) -> None:
    first, second = backend.containers(WAIT_FOREVER), backend.containers(WAIT_FOREVER)

    handles = await asyncio.gather(first.create(spec), second.create(spec), first.create(spec))

    assert len(set(handles)) == 1
    assert len(await first.list_owned(spec.installation_id)) == 1


async def test_create_gives_the_handle_of_a_container_that_has_ended(
    backend: Backend, spec: ContainerSpec
) -> None:
    containers = backend.containers("sys.exit(3)")
    handle = await containers.create(spec)
    await end_of(backend, containers, handle)

    again = await containers.create(spec)

    assert again == handle
    assert (await containers.evidence(again)).exit_code == 3


async def test_another_adapter_adopts_a_container_by_its_handle(
    backend: Backend, spec: ContainerSpec
) -> None:
    handle = await backend.containers("print('hello', flush=True); " + WAIT_FOREVER).create(spec)
    successor = backend.containers("")

    await successor.wait_ready(handle, backend.traits.deadline_seconds)

    assert (await successor.evidence(handle)).running
    assert await logged(backend, successor, handle, "hello")
    await successor.remove(handle)
    assert not (await successor.evidence(handle)).running


async def test_the_host_receives_the_session_key(backend: Backend, spec: ContainerSpec) -> None:
    containers = backend.containers(
        "import hashlib; print(hashlib.sha256(read_key().encode()).hexdigest(), flush=True); " + WAIT_FOREVER
    )

    handle = await containers.create(spec)
    await containers.wait_ready(handle, backend.traits.deadline_seconds)

    digest = hashlib.sha256(spec.session_key.hex().encode()).hexdigest()
    assert await logged(backend, containers, handle, digest)
    assert spec.session_key.hex() not in handle
    assert spec.session_key.hex() not in repr(spec)


@pytest.mark.parametrize(
    ("script", "words", "exit_code"),
    [
        ("sys.exit(3)", "3", 3),
        ("sys.exit(0)", "exited 0 by itself", 0),
        ("die_of(signal.SIGSEGV)", "SIGSEGV", 139),
        ("ready(); die_of(signal.SIGKILL)", "SIGKILL", 137),
    ],
)
async def test_an_end_of_its_own_is_the_submissions_crash(
    backend: Backend, spec: ContainerSpec, script: str, words: str, exit_code: int
) -> None:
    containers = backend.containers(script)

    handle = await containers.create(spec)
    evidence = await end_of(backend, containers, handle)

    assert words in evidence.reason
    assert evidence.exit_code == exit_code
    assert (evidence.verdict, evidence.fault) == (Verdict.SUBMISSION, FaultClass.CRASH)


async def test_an_end_before_it_is_ready_fails_the_wait_at_once_with_the_log(
    backend: Backend, spec: ContainerSpec
) -> None:
    containers = backend.containers("sys.exit('no such module: numpyy')")
    handle = await containers.create(spec)

    began = time.monotonic()
    with pytest.raises(SubmissionError) as caught:
        await containers.wait_ready(handle, timeout_seconds=300)

    assert time.monotonic() - began < backend.traits.deadline_seconds
    assert "exit code 1" in caught.value.reason
    assert "no such module: numpyy" in caught.value.log_tail


async def test_waiting_for_a_host_that_never_listens_ends_at_the_deadline(
    backend: Backend, spec: ContainerSpec
) -> None:
    containers = backend.containers("signal.pause()")
    handle = await containers.create(spec)

    with pytest.raises(InfrastructureError, match=backend.traits.never_listened):
        await containers.wait_ready(handle, timeout_seconds=0.1)


async def test_waiting_for_a_removed_container_is_no_fault_of_the_submission(
    backend: Backend, spec: ContainerSpec
) -> None:
    containers = backend.containers(WAIT_FOREVER)
    handle = await containers.create(spec)
    await containers.remove(handle)

    with pytest.raises(InfrastructureError, match="gone"):
        await containers.wait_ready(handle, backend.traits.deadline_seconds)


async def test_a_submission_above_its_memory_ends_out_of_memory(
    backend: Backend, spec: ContainerSpec
) -> None:
    limits = ContainerLimits(memory_bytes=128 * MEBIBYTE)
    containers = backend.containers("ready(); hoard = b'x' * (300 << 20); signal.pause()")

    handle = await containers.create(dataclasses.replace(spec, limits=limits))
    evidence = await end_of(backend, containers, handle)

    assert (evidence.verdict, evidence.fault) == (Verdict.SUBMISSION, FaultClass.OUT_OF_MEMORY)
    assert "out of memory" in evidence.reason.lower()


async def test_memory_counts_over_all_processes_of_a_container(backend: Backend, spec: ContainerSpec) -> None:
    if not backend.traits.memory_of_a_group:
        pytest.skip("whether a group of processes is killed depends on the cgroup version of the node")
    limits = ContainerLimits(memory_bytes=192 * MEBIBYTE)
    script = """
for _ in range(3):
    if os.fork() == 0:
        hoard = os.urandom(1) * (100 << 20)
        signal.pause()
signal.pause()
"""
    containers = backend.containers(script)

    handle = await containers.create(dataclasses.replace(spec, limits=limits))
    evidence = await end_of(backend, containers, handle)

    assert evidence.fault is FaultClass.OUT_OF_MEMORY


@pytest.mark.parametrize(
    "script",
    [
        # Many files, each within the bound.
        """
for number in range(40):
    with open(f"{number}.bin", "wb") as file:
        file.write(bytes(1 << 20))
signal.pause()
""",
        # One file that grows above it, by a submission that dies of it.
        """
with open("one.bin", "wb") as file:
    while True:
        file.write(bytes(1 << 20))
""",
    ],
)
async def test_a_submission_above_its_disk_ends_out_of_disk(
    backend: Backend, spec: ContainerSpec, script: str
) -> None:
    if "while True" in script and not backend.traits.bounded_disk:
        pytest.skip("until a node notices, this would fill its disk")
    containers = backend.containers(script)

    handle = await containers.create(
        dataclasses.replace(spec, limits=ContainerLimits(disk_bytes=20 * MEBIBYTE))
    )
    evidence = await end_of(backend, containers, handle)

    assert (evidence.verdict, evidence.fault) == (Verdict.SUBMISSION, FaultClass.OUT_OF_DISK)


async def test_a_container_ends_when_it_expires(backend: Backend, spec: ContainerSpec) -> None:
    containers = backend.containers(WAIT_FOREVER)

    expires_at = datetime.now(UTC) + timedelta(seconds=backend.traits.lifetime_seconds)
    handle = await containers.create(dataclasses.replace(spec, expires_at=expires_at))
    evidence = await end_of(backend, containers, handle)

    assert (evidence.reason, evidence.verdict) == ("lifetime exceeded", Verdict.SUBMISSION)
    async with asyncio.timeout(backend.traits.deadline_seconds):  # the end may come a moment before
        while not [each for each in await containers.list_owned(spec.installation_id) if each.expired]:
            await asyncio.sleep(0.05)


async def test_a_flood_of_output_neither_blocks_nor_fills_the_disk(
    backend: Backend, spec: ContainerSpec
) -> None:
    limits = ContainerLimits(log_bytes=MEBIBYTE)
    script = """
line = b"x" * 1023 + b"\\n"
for _ in range(100 * 1024):
    sys.stdout.buffer.write(line)
print("last words", flush=True)
"""
    containers = backend.containers(script + WAIT_FOREVER)

    handle = await containers.create(dataclasses.replace(spec, limits=limits))
    await containers.wait_ready(handle, backend.traits.deadline_seconds)
    text = await logged(backend, containers, handle, "last words\n")

    assert backend.traits.kept_log_bytes <= len(text) <= MEBIBYTE


async def test_the_log_obeys_its_bound_and_shows_control_characters_escaped(
    backend: Backend, spec: ContainerSpec
) -> None:
    containers = backend.containers(
        r"os.write(1, b'\x1b[31mred\x00\r\xff\tcaf\xc3\xa9\nerror\n'); sys.exit(1)"
    )
    handle = await containers.create(spec)
    await end_of(backend, containers, handle)

    assert await containers.logs(handle, 1000) == "\\x1b[31mred\\x00\\r\\xff\tcafé\nerror\n"
    assert await containers.logs(handle, 6) == "error\n"


async def test_what_is_printed_to_either_stream_is_in_the_log(backend: Backend, spec: ContainerSpec) -> None:
    containers = backend.containers("print('out'); print('err', file=sys.stderr); sys.exit(1)")
    handle = await containers.create(spec)
    await end_of(backend, containers, handle)

    text = await containers.logs(handle, 1000)

    assert sorted(text.split()) == ["err", "out"]


async def test_removing_twice_and_at_once_is_silent(backend: Backend, spec: ContainerSpec) -> None:
    containers = backend.containers(WAIT_FOREVER)
    handle = await containers.create(spec)

    await asyncio.gather(containers.remove(handle), backend.containers("").remove(handle))
    await containers.remove(handle)

    assert await containers.list_owned(spec.installation_id) == []
    assert await containers.logs(handle, 1000) == ""


async def test_only_the_containers_of_an_installation_are_listed(
    backend: Backend, spec: ContainerSpec
) -> None:
    containers = backend.containers(WAIT_FOREVER)
    other = dataclasses.replace(spec, container_id=uuid4(), job_id=8)

    handles = {await containers.create(spec), await containers.create(other)}
    owned = await containers.list_owned(spec.installation_id)

    assert {(each.container_id, each.job_id) for each in owned} == {
        (spec.container_id, 7),
        (other.container_id, 8),
    }
    assert {each.handle for each in owned} == handles
    assert not any(each.expired for each in owned)
    assert await containers.list_owned(uuid4()) == []


async def test_a_handle_of_something_else_is_gone(backend: Backend) -> None:
    containers = backend.containers("")

    for handle in ("", "{}", "null", '{"backend": "another"}'):
        evidence = await containers.evidence(handle)
        await containers.remove(handle)

        assert (evidence.running, evidence.verdict) == (False, Verdict.INFRASTRUCTURE)
        assert await containers.logs(handle, 100) == ""
