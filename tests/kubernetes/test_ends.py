"""Every way in which a pod can end or not begin, as the double brings it about, and what the adapter says."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest

from orchestrator.adapters.kubernetes.containers import KubernetesContainers
from orchestrator.domain.episodes import FaultClass
from orchestrator.domain.errors import InfrastructureError, OrchestratorError, SubmissionError, UsageError
from orchestrator.ports import ContainerSpec, Evidence, Verdict
from tests.kubernetes.adapters import Adapters, end_of, pod_of
from tests.kubernetes_double import ApiDouble, Plan, PodControl, plans

DEADLINE_SECONDS = 30.0
OURS, THEIRS = Verdict.INFRASTRUCTURE, Verdict.SUBMISSION


async def running(containers: KubernetesContainers, spec: ContainerSpec) -> str:
    handle = await containers.create(spec)
    await containers.wait_ready(handle, DEADLINE_SECONDS)
    return handle


@pytest.mark.parametrize(
    ("end", "verdict", "fault"),
    [
        (PodControl.evict_for_its_storage, THEIRS, FaultClass.OUT_OF_DISK),
        (PodControl.evict_by_kubelet, OURS, None),
        (PodControl.evict_by_api, OURS, None),
        (PodControl.preempt, OURS, None),
        (PodControl.delete_by_taint_manager, OURS, None),
        (PodControl.delete_by_another, OURS, None),
        (PodControl.exceed_deadline, THEIRS, None),
        (PodControl.kill_for_memory, THEIRS, FaultClass.OUT_OF_MEMORY),
        (PodControl.kill_node, OURS, None),
    ],
)
async def test_who_is_to_blame_for_an_end(
    double: ApiDouble,
    adapters: Adapters,
    spec: ContainerSpec,
    end: Callable[[PodControl], None],
    verdict: Verdict,
    fault: FaultClass | None,
) -> None:
    containers = adapters.waiting()
    handle = await running(containers, spec)

    end(pod_of(double, spec))
    evidence = await end_of(containers, handle)

    assert evidence.verdict is verdict, evidence
    if fault is not None:
        assert evidence.fault is fault
    assert evidence.reason not in ("", "running")


async def test_the_first_end_counts_whatever_is_added_to_the_pod_later(
    double: ApiDouble, adapters: Adapters, spec: ContainerSpec
) -> None:
    containers = adapters.running("ready(); sys.exit(3)")
    handle = await containers.create(spec)
    before = await end_of(containers, handle)
    await pod_of(double, spec).reaches("Failed")

    pod_of(double, spec).add_condition_afterwards()
    # What is watched in order has been seen once a later pod was.
    await containers.create(later := dataclasses.replace(spec, container_id=uuid4()))
    await end_of(containers, containers.handle_of(later.container_id))

    assert await containers.evidence(handle) == before
    assert (before.verdict, before.exit_code) == (THEIRS, 3)


@pytest.mark.parametrize("plan", [plans.MOUNT_FAILS, plans.SANDBOX_FAILS])
async def test_a_deadline_of_a_pod_that_never_ran_is_ours(
    double: ApiDouble, adapters: Adapters, spec: ContainerSpec, plan: Plan
) -> None:
    double.next_pod(plan)
    containers = adapters.waiting()

    soon = datetime.now(UTC) + timedelta(seconds=1)
    handle = await containers.create(dataclasses.replace(spec, expires_at=soon))
    evidence = await end_of(containers, handle)

    assert evidence.verdict is OURS


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (plans.IMAGE_CANNOT_BE_PULLED, "ErrImagePull|ImagePullBackOff"),
        (plans.IMAGE_NAME_IS_INVALID, "InvalidImageName"),
        (plans.CONFIG_IS_WRONG, "CreateContainerConfigError"),
        (plans.OUT_OF_MEMORY_ON_NODE, "OutOfmemory"),
        (plans.CANNOT_START, "StartError"),
    ],
)
async def test_what_can_never_begin_fails_fast_and_is_not_the_submissions_fault(
    double: ApiDouble, adapters: Adapters, spec: ContainerSpec, plan: Plan, words: str
) -> None:
    double.next_pod(plan)
    containers = adapters.waiting()
    handle = await containers.create(spec)

    async with asyncio.timeout(DEADLINE_SECONDS):
        with pytest.raises(OrchestratorError, match=words) as caught:
            await containers.wait_ready(handle, timeout_seconds=3600)

    assert not isinstance(caught.value, SubmissionError)


async def test_an_image_of_the_jobs_own_that_is_not_there_is_the_jobs_affair(
    double: ApiDouble, adapters: Adapters, spec: ContainerSpec
) -> None:
    double.next_pod(plans.IMAGE_CANNOT_BE_PULLED)
    containers = adapters.waiting()
    image = f"example.org/none@sha256:{'1' * 64}"
    handle = await containers.create(dataclasses.replace(spec, image=image))

    async with asyncio.timeout(DEADLINE_SECONDS):
        with pytest.raises(UsageError, match=r"not found; the job asks for image example\.org/none"):
            await containers.wait_ready(handle, timeout_seconds=3600)


async def test_the_log_is_that_of_the_last_200_lines(
    double: ApiDouble, adapters: Adapters, spec: ContainerSpec
) -> None:
    containers = adapters.running("print('\\n'.join(map(str, range(1000)))); sys.exit(3)")
    handle = await containers.create(spec)
    await end_of(containers, handle)

    assert (await containers.logs(handle, 100_000)).split() == [str(number) for number in range(800, 1000)]
    assert (await containers.logs(handle, 8)) == "998\n999\n"


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (
            Plan(unschedulable="0/3 nodes are available: 3 Insufficient cpu.", unschedulable_seconds=1),
            "0/3 nodes",
        ),
        (dataclasses.replace(plans.MOUNT_FAILS, event_seconds=2), "FailedMount"),
        (dataclasses.replace(plans.SANDBOX_FAILS, event_seconds=2), "FailedCreatePodSandBox"),
    ],
)
async def test_waiting_says_what_it_waits_for_and_goes_on_when_that_is_over(
    double: ApiDouble, adapters: Adapters, spec: ContainerSpec, plan: Plan, words: str
) -> None:
    double.next_pod(plan)
    containers = adapters.waiting()
    handle = await containers.create(spec)
    told: list[str] = []

    async def tell(why: str) -> None:
        told.append(why)

    endpoint = await containers.wait_ready(handle, DEADLINE_SECONDS, tell)

    assert endpoint.host == pod_of(double, spec).object["status"]["podIP"]
    assert any(words in why for why in told), told
    assert len(told) == len(set(told))


async def test_a_pod_that_no_node_can_take_is_given_up_after_the_time_that_is_set(
    double: ApiDouble, adapters: Adapters, spec: ContainerSpec
) -> None:
    double.next_pod(plans.NO_NODE)
    containers = adapters.waiting(kubernetes_unschedulable_seconds=0.5)
    handle = await containers.create(spec)

    async with asyncio.timeout(DEADLINE_SECONDS):
        with pytest.raises(InfrastructureError, match="Insufficient memory"):
            await containers.wait_ready(handle, timeout_seconds=3600)


async def test_a_quota_that_is_used_up_is_named(
    double: ApiDouble, adapters: Adapters, spec: ContainerSpec
) -> None:
    double.set_quota("submissions", {"pods": "0"})
    containers = adapters.waiting(kubernetes_unschedulable_seconds=2)
    told: list[str] = []

    async def tell(why: str) -> None:
        told.append(why)

    async def begin() -> None:
        handle = await containers.create(spec)
        await containers.wait_ready(handle, 2, tell)

    async with asyncio.timeout(DEADLINE_SECONDS):
        with pytest.raises(InfrastructureError, match="submissions"):
            await begin()
        await containers.remove(containers.handle_of(spec.container_id))

    assert double.names("configmaps") == []
    assert any("quota submissions" in why for why in told), told


async def test_a_container_begins_once_a_quota_has_room(
    double: ApiDouble, adapters: Adapters, spec: ContainerSpec
) -> None:
    double.set_quota("submissions", {"pods": "0"})
    containers = adapters.waiting()
    handle = await containers.create(spec)
    made_without_room = double.names("pods")

    async def make_room(why: str) -> None:
        double.remove("resourcequotas", "submissions")

    await containers.wait_ready(handle, DEADLINE_SECONDS, make_room)

    assert made_without_room == []
    assert (await containers.evidence(handle)).running


async def test_a_pod_of_a_dead_node_can_be_removed(
    double: ApiDouble, adapters: Adapters, spec: ContainerSpec
) -> None:
    containers = adapters.waiting()
    handle = await running(containers, spec)
    pod_of(double, spec).kill_node()
    await end_of(containers, handle)

    async with asyncio.timeout(DEADLINE_SECONDS):
        await containers.remove(handle)

    assert (double.names("pods"), double.names("configmaps")) == ([], [])


async def test_a_pod_that_another_deleted_is_gone_for_an_adapter_that_comes_later(
    double: ApiDouble, adapters: Adapters, spec: ContainerSpec
) -> None:
    handle = await running(adapters.waiting(), spec)
    double.remove("pods", pod_of(double, spec).name)

    evidence = await end_of(adapters.waiting(), handle)

    assert evidence == Evidence(False, "gone", Verdict.INFRASTRUCTURE)
