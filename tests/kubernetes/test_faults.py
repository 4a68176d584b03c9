"""Every call of the adapter meets every fault of an API server, and the container lives and goes as ever."""

from __future__ import annotations

import asyncio
import dataclasses
from uuid import UUID, uuid4

import pytest
from orchestrator.adapters.kubernetes.containers import KubernetesContainers

from orchestrator.ports import ContainerSpec
from tests.kubernetes.adapters import Adapters
from tests.kubernetes_double import ApiDouble, plans
from tests.kubernetes_double.fault_proxy import Fault, FaultProxy, faults_of

DEADLINE_SECONDS = 60.0
Right = tuple[str, str, str]  # group, resource, verb
PRINTING = "print('hello', flush=True); ready(); signal.pause()"
# The pod of every path begins late, so that the adapter looks for the reason among the events.
LATE = dataclasses.replace(plans.MOUNT_FAILS, event_seconds=1.5)


async def whole_life(containers: KubernetesContainers, spec: ContainerSpec) -> None:
    """Each operation once, and what it must give."""
    handle = await containers.create(spec)
    assert await containers.create(spec) == handle
    await containers.wait_ready(handle, DEADLINE_SECONDS)
    assert (await containers.evidence(handle)).running
    while "hello" not in await containers.logs(handle, 1000):
        await asyncio.sleep(0.05)
    await listed(containers, spec, [spec.container_id])
    await containers.remove(handle)
    await listed(containers, spec, [])


async def listed(containers: KubernetesContainers, spec: ContainerSpec, expected: list[UUID]) -> None:
    """Returns once these are listed: a server may lag behind what it has done itself."""
    while [each.container_id for each in await containers.list_owned(spec.installation_id)] != expected:
        await asyncio.sleep(0.05)


_rights: list[Right] = []


async def calls_of_a_life(double: ApiDouble, adapters: Adapters, spec: ContainerSpec) -> list[Right]:
    """What the adapter asks of the server in a whole life; found out once for all tests."""
    if not _rights:
        async with asyncio.timeout(DEADLINE_SECONDS):
            await whole_life(adapters.running(PRINTING), spec)
        _rights.extend(sorted({call.right for call in double.calls}))
    return _rights


@pytest.mark.parametrize("fault", Fault)
async def test_a_fault_of_any_call_changes_nothing(
    double: ApiDouble, adapters: Adapters, spec: ContainerSpec, fault: Fault
) -> None:
    double.node.plan_for = lambda pod: LATE
    rights = await calls_of_a_life(double, adapters, dataclasses.replace(spec, installation_id=uuid4()))
    spoiled = [right for right in rights if fault in faults_of(right[2])]

    async def with_fault_on(right: Right) -> None:
        async with FaultProxy(double.url, hang_seconds=DEADLINE_SECONDS) as proxy:
            containers = adapters.running(PRINTING, proxy.url)
            own = dataclasses.replace(spec, container_id=uuid4(), installation_id=uuid4())
            proxy.spoil(fault, times=2, when=lambda call: call.right == right)
            try:
                async with asyncio.timeout(DEADLINE_SECONDS):
                    await whole_life(containers, own)
            except Exception as error:
                error.add_note(f"{fault.name} on {right}")
                raise
            finally:
                await adapters.close(containers)
            assert proxy.fired, right

    async with asyncio.TaskGroup() as group:
        for right in spoiled:
            group.create_task(with_fault_on(right))

    assert spoiled
    assert (double.names("pods"), double.names("configmaps")) == ([], [])


async def test_an_outage_of_the_api_server_is_waited_out(
    double: ApiDouble, adapters: Adapters, spec: ContainerSpec
) -> None:
    async with FaultProxy(double.url) as proxy:
        containers = adapters.running(PRINTING, proxy.url)
        with proxy.outage():
            life = asyncio.create_task(whole_life(containers, spec))
            await asyncio.wait({life}, timeout=3)
            began_during_outage = life.done()

        async with asyncio.timeout(DEADLINE_SECONDS):
            await life
        await adapters.close(containers)

    assert not began_during_outage


async def test_a_token_that_expires_is_read_again_from_its_file(
    double: ApiDouble, adapters: Adapters, spec: ContainerSpec
) -> None:
    containers = adapters.running(PRINTING)
    handle = await containers.create(spec)
    await containers.wait_ready(handle, DEADLINE_SECONDS)

    double.expire_token("second-token")
    adapters.token_file.write_text("second-token")
    async with asyncio.timeout(DEADLINE_SECONDS):
        await containers.remove(handle)

    assert double.names("configmaps") == []


async def test_a_forgotten_history_is_listed_again(
    double: ApiDouble, adapters: Adapters, spec: ContainerSpec
) -> None:
    containers = adapters.running(PRINTING)
    first = await containers.create(spec)
    await containers.wait_ready(first, DEADLINE_SECONDS)

    for _ in range(3):
        double.store.compact()
        other = dataclasses.replace(spec, container_id=uuid4())
        async with asyncio.timeout(DEADLINE_SECONDS):
            handle = await containers.create(other)
            await containers.wait_ready(handle, DEADLINE_SECONDS)
            await containers.remove(handle)

    assert (await containers.evidence(first)).running
