"""Names that are taken, half-made containers, and what belongs to others."""

from __future__ import annotations

import asyncio
import dataclasses
from uuid import uuid4

from orchestrator.adapters.kubernetes.containers import KubernetesContainers
from orchestrator.adapters.kubernetes.manifests import EXPIRES_AT
from orchestrator.cluster_containers import CanaryMaker, pod_template
from orchestrator.ports import ContainerSpec, Verdict
from tests.kubernetes.adapters import Adapters, end_of, pod_of
from tests.kubernetes_double import ApiDouble
from tests.kubernetes_double.objects import Key

DEADLINE_SECONDS = 30.0


async def begin(containers: KubernetesContainers, spec: ContainerSpec) -> str:
    async with asyncio.timeout(DEADLINE_SECONDS):
        handle = await containers.create(spec)
        await containers.wait_ready(handle, DEADLINE_SECONDS)
    return handle


async def test_a_later_control_plane_adopts_what_is_as_it_should_be(
    double: ApiDouble, adapters: Adapters, spec: ContainerSpec
) -> None:
    first = await begin(adapters.waiting(), spec)
    uid = pod_of(double, spec).uid

    second = await begin(adapters.waiting(), spec)

    assert (second, pod_of(double, spec).uid) == (first, uid)


async def test_what_has_the_name_but_is_otherwise_is_replaced(
    double: ApiDouble, adapters: Adapters, spec: ContainerSpec
) -> None:
    await begin(adapters.running("ready(); print('old', flush=True); signal.pause()"), spec)
    uid = pod_of(double, spec).uid
    containers = adapters.running("ready(); print('new', flush=True); signal.pause()")

    handle = await begin(containers, spec)

    assert pod_of(double, spec).uid != uid
    async with asyncio.timeout(DEADLINE_SECONDS):
        while "new" not in await containers.logs(handle, 1000):
            await asyncio.sleep(0.05)


async def test_a_name_that_is_still_being_deleted_is_waited_for(
    double: ApiDouble, adapters: Adapters, spec: ContainerSpec
) -> None:
    stubborn = "signal.signal(signal.SIGTERM, signal.SIG_IGN); ready(); signal.pause()"
    await begin(adapters.running(stubborn), spec)
    old = pod_of(double, spec)
    double.remove("configmaps", old.name)
    old.delete_by_another()

    await begin(adapters.running(stubborn), spec)

    new = pod_of(double, spec)
    assert new.uid != old.uid
    [owner] = new.object["metadata"]["ownerReferences"]
    assert owner["uid"] in double.store.uids(double.namespace)


async def test_a_pod_whose_anchor_is_taken_away_ends_and_not_by_its_own_fault(
    double: ApiDouble, adapters: Adapters, spec: ContainerSpec
) -> None:
    containers = adapters.waiting()
    handle = await begin(containers, spec)

    double.remove("configmaps", pod_of(double, spec).name)
    double.node.collect_garbage()

    assert (await end_of(containers, handle)).verdict is Verdict.INFRASTRUCTURE


async def test_an_anchor_without_a_pod_is_listed_and_removed(
    double: ApiDouble, adapters: Adapters, spec: ContainerSpec
) -> None:
    containers = adapters.waiting()
    await begin(containers, spec)
    anchor = double.store.get(Key("configmaps", double.namespace, pod_of(double, spec).name))
    await containers.remove(containers.handle_of(spec.container_id))
    double.add("configmaps", double.namespace, anchor)  # as if we had died before the pod was created
    successor = adapters.waiting()

    for owned in await successor.list_owned(spec.installation_id):
        await successor.remove(owned.handle)

    assert (double.names("pods"), double.names("configmaps")) == ([], [])


async def test_canaries_are_left_alone_until_they_have_expired(
    double: ApiDouble, adapters: Adapters, spec: ContainerSpec
) -> None:
    maker = CanaryMaker(pod_template(adapters.settings()), spec.installation_id)
    fresh, expired = (maker.anchor(uuid4(), canary=True) for _ in range(2))
    expired["metadata"]["annotations"][EXPIRES_AT] = "2026-01-01T00:00:00Z"
    for each in (fresh, expired):
        double.add("configmaps", double.namespace, each)
    containers = adapters.waiting()

    owned = await containers.list_owned(spec.installation_id)
    for each in owned:
        await containers.remove(each.handle)

    assert [(each.job_id, each.expired) for each in owned] == [(None, True)]
    assert double.names("configmaps") == [fresh["metadata"]["name"]]


async def test_a_container_that_was_looked_for_before_it_was_made_is_found_when_it_is(
    adapters: Adapters, spec: ContainerSpec
) -> None:
    containers = adapters.waiting()
    before = await containers.evidence(containers.handle_of(spec.container_id))

    handle = await begin(containers, spec)

    assert not before.running
    assert (await containers.evidence(handle)).running


async def test_what_belongs_to_others_is_neither_listed_nor_touched(
    double: ApiDouble, adapters: Adapters, spec: ContainerSpec
) -> None:
    theirs = dataclasses.replace(spec, container_id=uuid4(), installation_id=uuid4())
    await begin(adapters.waiting(), theirs)
    config_map = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kube-root-ca.crt"}}
    double.add("configmaps", double.namespace, config_map)
    containers = adapters.waiting()
    handle = await begin(containers, spec)

    owned = await containers.list_owned(spec.installation_id)
    await containers.remove(handle)

    assert [each.container_id for each in owned] == [spec.container_id]
    assert double.names("pods") == [pod_of(double, theirs).name]
    assert "kube-root-ca.crt" in double.names("configmaps")
