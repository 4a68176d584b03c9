"""Pods of the double run, end and go as those of a real node do."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable

import aiohttp
import psutil
import pytest

from tests.kubernetes_double import ApiDouble, Plan, PodControl, plans
from tests.kubernetes_double.objects import KINDS
from tests.kubernetes_double.processes import marked
from tests.kubernetes_double.refusals import Json
from tests.kubernetes_double.strict import unknown_fields
from tests.unit.kubernetes_double.double_client import OBEDIENT, Client, a_config_map, a_pod, owned_by

DEADLINE_SECONDS = 20


async def until(double: ApiDouble, holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not holds():
            await double.store.next_change.wait()


def state(pod: Json) -> Json:
    found: Json = pod["status"]["containerStatuses"][0]["state"]
    return found


def condition(pod: Json, kind: str) -> Json:
    [found] = [each for each in pod["status"].get("conditions", []) if each["type"] == kind] or [{}]
    return found


async def running(client: Client, pod: Json) -> PodControl:
    assert (answer := await client.create(pod)).status == 201, answer.body
    control = client.double.pod(pod["metadata"]["name"])
    await control.reaches("Running")
    return control


async def history(client: Client, name: str, version: str) -> list[Json]:
    """Every state of a pod that a watch shows, until the pod is gone."""
    seen: list[Json] = []
    selected = f"metadata.name={name}"
    async for event in client.watch("pods", resourceVersion=version, fieldSelector=selected):
        if event["type"] == "DELETED":
            break
        seen.append(event["object"])
    return seen


async def test_a_pod_is_a_process_with_an_address_where_its_port_is_free(
    double: ApiDouble, client: Client
) -> None:
    serve = "import socket, signal; s = socket.create_server(('0.0.0.0', 8000)); signal.pause()"
    script = serve.replace("'0.0.0.0'", "__import__('os').environ['ADDRESS']")
    pods = []
    for name in ("one", "two"):
        pod = a_pod(name, script)
        field = {"fieldRef": {"fieldPath": "status.podIP"}}
        pod["spec"]["containers"][0]["env"] = [{"name": "ADDRESS", "valueFrom": field}]
        pods.append(await running(client, pod))
    addresses = [pod.object["status"]["podIP"] for pod in pods]

    async def connected(address: str) -> bool:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while True:
                try:
                    _, writer = await asyncio.open_connection(address, 8000)
                except OSError:
                    await asyncio.sleep(0.01)
                    continue
                writer.close()
                return True

    assert len(set(addresses)) == 2
    assert all([await connected(address) for address in addresses])


async def test_a_containers_environment_comes_from_the_config_map_that_it_names(client: Client) -> None:
    await client.create(a_config_map("anchor", key="c2VjcmV0"))
    pod = a_pod("one", "import os; print(os.environ['KEY'], os.getcwd(), os.environ['HOME'])")
    reference = {"configMapKeyRef": {"name": "anchor", "key": "key"}}
    pod["spec"]["containers"][0]["env"] = [
        {"name": "KEY", "valueFrom": reference},
        {"name": "HOME", "value": "/work/home"},
    ]

    await client.create(pod)
    await client.double.pod("one").reaches("Succeeded")
    printed = (await client.call("GET", "pods/one/log")).body.decode()

    key, directory, home = printed.split()
    assert key == "c2VjcmV0"
    assert home == directory + "/home"


async def test_a_container_waits_for_a_config_map_that_is_not_there(
    double: ApiDouble, client: Client
) -> None:
    pod = a_pod("one")
    reference = {"configMapKeyRef": {"name": "anchor", "key": "key"}}
    pod["spec"]["containers"][0]["env"] = [{"name": "KEY", "valueFrom": reference}]

    await client.create(pod)
    control = double.pod("one")
    await until(
        double,
        lambda: (
            (control.object["status"].get("containerStatuses") or [{}])[0]
            .get("state", {})
            .get("waiting", {})
            .get("reason")
            == "CreateContainerConfigError"
        ),
    )
    log = await client.call("GET", "pods/one/log")
    await client.create(a_config_map("anchor", key="value"))
    await control.reaches("Running")

    assert log.status == 400
    assert "is waiting to start: CreateContainerConfigError" in log.json["message"]


@pytest.mark.parametrize(
    ("script", "code", "reason", "phase"),
    [
        ("print('done')", 0, "Completed", "Succeeded"),
        ("raise SystemExit(3)", 3, "Error", "Failed"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", 139, "Error", "Failed"),
        ("hoard = b'x' * (400 << 20); import signal; signal.pause()", 137, "OOMKilled", "Failed"),
    ],
)
async def test_an_end_is_reported_first_of_the_container_and_then_of_the_pod(
    client: Client, script: str, code: int, reason: str, phase: str
) -> None:
    version = (await client.call("GET", "pods")).json["metadata"]["resourceVersion"]
    watching = asyncio.create_task(history(client, "one", version))
    await client.create(a_pod("one", script))
    await client.double.pod("one").reaches(phase)
    await client.call("DELETE", "pods/one")

    seen = [pod for pod in await watching if "terminated" in str(pod["status"])]

    assert [pod["status"]["phase"] for pod in seen] == ["Running", phase]
    assert (state(seen[0])["terminated"]["exitCode"], state(seen[0])["terminated"]["reason"]) == (
        code,
        reason,
    )


async def test_too_many_bytes_in_a_volume_evict_a_pod_without_any_disruption(client: Client) -> None:
    script = "open('big', 'wb').write(bytes(40 << 20)); import signal; signal.pause()"

    await client.create(a_pod("one", script))
    ended = await client.double.pod("one").reaches("Failed")

    assert ended["status"]["reason"] == "Evicted"
    assert 'EmptyDir volume "work" exceeds the limit' in ended["status"]["message"]
    assert condition(ended, "DisruptionTarget") == {}
    assert (await client.call("GET", "pods/one/log")).body == b""


async def test_a_deletion_takes_the_grace_period_of_a_process_that_ignores_it(
    double: ApiDouble, client: Client
) -> None:
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up'); signal.pause()"
    pods = [await running(client, a_pod("one", stubborn)), await running(client, a_pod("two", OBEDIENT))]
    for pod in pods:
        while b"up" not in (await client.call("GET", f"pods/{pod.name}/log")).body:
            await asyncio.sleep(0.01)
    version = (await client.call("GET", "pods")).json["metadata"]["resourceVersion"]
    watching = [asyncio.create_task(history(client, pod.name, version)) for pod in pods]

    answers = [await client.call("DELETE", f"pods/{pod.name}") for pod in pods]
    again = await client.create(a_pod("one"))
    last = [(await seen)[-1] for seen in watching]

    assert answers[0].json["metadata"]["deletionTimestamp"]
    assert again.json["message"] == 'object is being deleted: pods "one" already exists'
    assert [state(pod)["terminated"]["exitCode"] for pod in last] == [137, 0]
    assert double.names("pods") == []


async def test_a_deletion_without_grace_removes_the_object_at_once_and_then_the_process(
    double: ApiDouble, client: Client
) -> None:
    pod = await running(client, a_pod("one"))
    process = psutil.Process(pod.pid)

    await client.call("DELETE", "pods/one", gracePeriodSeconds="0")

    assert double.names("pods") == []
    assert await asyncio.to_thread(psutil.wait_procs, [process], 10)


async def test_with_its_owner_a_pod_goes_and_with_a_wrong_owner_it_is_gone_at_once(
    double: ApiDouble, client: Client
) -> None:
    anchor = (await client.create(a_config_map("anchor"))).json
    stale = {**anchor, "metadata": {**anchor["metadata"], "uid": "of-an-earlier-one"}}
    await client.create(owned_by(a_pod("stale"), stale))
    await running(client, owned_by(a_pod("owned"), anchor))
    await until(double, lambda: double.names("pods") == ["owned"])

    answer = await client.call("DELETE", "configmaps/anchor", {"propagationPolicy": "Background"})
    at_once = double.names("pods"), double.names("configmaps")
    await until(double, lambda: double.names("pods") == [])

    assert answer.json["status"] == "Success"
    assert at_once == (["owned"], [])


async def test_an_owner_that_is_deleted_in_the_foreground_goes_after_what_it_owns(
    double: ApiDouble, client: Client
) -> None:
    anchor = (await client.create(a_config_map("anchor"))).json
    await running(client, owned_by(a_pod("owned"), anchor))

    answer = await client.call("DELETE", "configmaps/anchor", {"propagationPolicy": "Foreground"})
    await until(double, lambda: double.names("pods") == [])
    await until(double, lambda: double.names("configmaps") == [])

    assert answer.json["metadata"]["deletionTimestamp"]


async def test_an_orphan_stays(double: ApiDouble, client: Client) -> None:
    anchor = (await client.create(a_config_map("anchor"))).json
    pod = await running(client, owned_by(a_pod("owned"), anchor))

    await client.call("DELETE", "configmaps/anchor", {"propagationPolicy": "Orphan"})

    assert double.names("configmaps") == []
    assert "ownerReferences" not in pod.object["metadata"]


@pytest.mark.parametrize(
    ("disturb", "reason", "ends"),
    [
        (PodControl.evict_by_kubelet, "TerminationByKubelet", "Evicted"),
        (PodControl.evict_by_api, "EvictionByEvictionAPI", None),
        (PodControl.preempt, "PreemptionByScheduler", None),
        (PodControl.delete_by_taint_manager, "DeletionByTaintManager", None),
    ],
)
async def test_who_disturbs_a_pod_says_so_before_it_ends(
    client: Client, disturb: Callable[[PodControl], None], reason: str, ends: str | None
) -> None:
    version = (await client.call("GET", "pods")).json["metadata"]["resourceVersion"]
    watching = asyncio.create_task(history(client, "one", version))
    pod = await running(client, a_pod("one"))

    disturb(pod)
    if ends is not None:
        await pod.reaches("Failed")
        await client.call("DELETE", "pods/one")
    seen = await watching

    first_disturbed = next(each for each in seen if condition(each, "DisruptionTarget"))
    assert condition(first_disturbed, "DisruptionTarget")["reason"] == reason
    assert "running" in state(first_disturbed)
    assert "terminated" in state(seen[-1])
    assert seen[-1]["status"].get("reason") == ends


async def test_the_deadline_of_a_pod_is_told_apart_by_whether_it_ran(
    double: ApiDouble, client: Client
) -> None:
    double.next_pod(Plan(), plans.MOUNT_FAILS)

    for name in ("ran", "never-ran"):
        await client.create(a_pod(name, activeDeadlineSeconds=1))
    ended = [await double.pod(name).reaches("Failed") for name in ("ran", "never-ran")]
    events = (await client.call("GET", "events", fieldSelector="involvedObject.name=never-ran")).json["items"]

    assert [pod["status"]["reason"] for pod in ended] == ["DeadlineExceeded"] * 2
    assert [state(pod)["terminated"]["reason"] for pod in ended] == ["Error", "ContainerStatusUnknown"]
    assert [event["reason"] for event in events] == ["FailedMount"]


async def test_a_dead_node_shows_only_in_a_condition_and_keeps_its_pods_for_ever(
    double: ApiDouble, client: Client
) -> None:
    pod = await running(client, a_pod("one"))
    process = psutil.Process(pod.pid)

    pod.kill_node()
    await until(double, lambda: condition(pod.object, "Ready")["status"] == "False")
    lost = pod.object
    await until(double, lambda: "deletionTimestamp" in pod.object["metadata"])
    await asyncio.to_thread(psutil.wait_procs, [process], 10)
    still_there = double.names("pods")
    await client.call("DELETE", "pods/one", gracePeriodSeconds="0")

    assert lost["status"]["phase"] == "Running"
    assert still_there == ["one"]
    assert double.names("pods") == []


@pytest.mark.parametrize(
    ("plan", "reasons"),
    [
        (plans.IMAGE_CANNOT_BE_PULLED, ["ErrImagePull", "ImagePullBackOff"]),
        (plans.IMAGE_NAME_IS_INVALID, ["InvalidImageName"]),
        (plans.CONFIG_IS_WRONG, ["CreateContainerConfigError"]),
    ],
)
async def test_a_container_that_cannot_start_waits_with_its_reason(
    double: ApiDouble, client: Client, plan: Plan, reasons: list[str]
) -> None:
    version = (await client.call("GET", "pods")).json["metadata"]["resourceVersion"]
    watching = asyncio.create_task(history(client, "one", version))
    double.next_pod(plan)

    await client.create(a_pod("one"))
    await until(double, lambda: reasons[-1] in str(double.pod("one").object["status"]))
    await client.call("DELETE", "pods/one")
    states = [state(pod) for pod in await watching if "containerStatuses" in pod["status"]]

    waited_for = dict.fromkeys(each["waiting"]["reason"] for each in states if "waiting" in each)
    assert list(waited_for) == ["ContainerCreating", *reasons]


async def test_a_pod_without_a_node_says_why_and_is_deleted_at_once(
    double: ApiDouble, client: Client
) -> None:
    double.next_pod(plans.NO_NODE)

    await client.create(a_pod("one"))
    pod = double.pod("one")
    await until(double, lambda: condition(pod.object, "PodScheduled").get("status") == "False")
    scheduled = condition(pod.object, "PodScheduled")
    await client.call("DELETE", "pods/one")

    assert (scheduled["reason"], scheduled["message"]) == ("Unschedulable", plans.NO_NODE.unschedulable)
    assert double.names("pods") == []


@pytest.mark.parametrize(
    ("plan", "shown"),
    [(plans.OUT_OF_MEMORY_ON_NODE, "OutOfmemory"), (plans.CANNOT_START, "StartError")],
)
async def test_a_pod_that_the_node_cannot_take_has_failed(
    double: ApiDouble, client: Client, plan: Plan, shown: str
) -> None:
    double.next_pod(plan)

    await client.create(a_pod("one"))
    ended = await double.pod("one").reaches("Failed")

    assert shown in str(ended["status"])


@pytest.mark.parametrize("stays_open", [False, True])
async def test_the_egress_of_a_pod_closes_soon_where_the_policy_is_enforced(
    double: ApiDouble, client: Client, stays_open: bool
) -> None:
    script = """
import os, socket, time
address = os.environ["KUBERNETES_SERVICE_HOST"], int(os.environ["KUBERNETES_SERVICE_PORT"])
kept = socket.create_connection(address)
for _ in range(60):
    time.sleep(0.02)
    try:
        socket.create_connection(address).close()
    except OSError:
        kept.send(b"what was connected stays so")
        raise SystemExit(0)
raise SystemExit(1)
"""
    double.next_pod(Plan(egress_stays_open=stays_open))

    await client.create(a_pod("one", script))
    await double.pod("one").reaches("Failed" if stays_open else "Succeeded")


async def test_whatever_the_double_says_of_a_pod_is_in_the_published_schema(
    double: ApiDouble, client: Client
) -> None:
    before = double.store.version
    double.next_pod(plans.NO_NODE, plans.MOUNT_FAILS, plans.OUT_OF_MEMORY_ON_NODE, plans.CANNOT_START)
    for number in range(4):
        await client.create(a_pod(f"unlucky-{number}", activeDeadlineSeconds=1))
    evicted = await running(client, a_pod("evicted"))
    evicted.evict_by_kubelet()
    preempted = await running(client, a_pod("preempted"))
    preempted.preempt()
    for name in ("unlucky-1", "unlucky-2", "unlucky-3", "evicted"):
        await double.pod(name).reaches("Failed")
    await until(double, lambda: "preempted" not in double.names("pods"))

    told = [change for change in double.store.changes_after(before) if change.after is not None]

    assert len(told) > 20
    for change in told:
        assert unknown_fields(KINDS[change.key.plural], change.after) == [], change.after


async def test_nothing_is_left_when_the_double_closes() -> None:
    forks = "import os, signal; os.setsid() if os.fork() == 0 else None; signal.pause()"
    async with ApiDouble() as double, aiohttp.ClientSession() as session:
        client = Client(double, session)
        pods = [await running(client, a_pod(name, forks)) for name in ("one", "two")]
        uids = [pod.uid for pod in pods]
        address = pods[0].object["status"]["podIP"]
        directory = double.node.directory

    assert list(marked(uids)) == []
    assert not os.path.exists(directory)
    with socket.socket() as probe:
        probe.bind((address, 8000))
