"""The objects of a container attempt, whole, and valid in the eyes of a strict API server."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from orchestrator.adapters.kubernetes import manifests
from orchestrator.cluster_containers import CanaryMaker, pod_template
from orchestrator.ports import ContainerLimits, ContainerSpec
from orchestrator.settings import Settings
from tests.golden_texts import check_golden
from tests.kubernetes_double.admission import restricted_violations, weaknesses_of
from tests.kubernetes_double.objects import KINDS
from tests.kubernetes_double.strict import unknown_fields

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
OWNER = UUID("11111111-2222-4333-8444-555555555555")
ANCHOR_UID = "99999999-8888-4777-8666-555555555555"
IMAGE = f"registry.example/submission@sha256:{'a' * 64}"
SPEC = ContainerSpec(
    container_id=UUID("aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee"),
    installation_id=OWNER,
    job_id=7,
    attempt=2,
    expires_at=NOW + timedelta(seconds=90.5),
    session_key=bytes(range(32)),
)
PLAIN: dict[str, Any] = {"containers": "kubernetes", "kubernetes_image": IMAGE}
FULL: dict[str, Any] = PLAIN | {
    "kubernetes_namespace": "submissions",
    "kubernetes_service_account": "nobody",
    "kubernetes_runtime_class": "gvisor",
    "kubernetes_user_namespaces": True,
    "kubernetes_node_selector": "pool=submissions,example.org/Zone=A",
    "kubernetes_tolerations": "pool=submissions:NoSchedule,burst:NoExecute,any",
    "kubernetes_priority_class": "low",
    "kubernetes_pull_secrets": "first,second",
    "kubernetes_gpu_resource": "example.org/gpu",
    "kubernetes_default_cpus": 2.5,
}
ASKED = ContainerLimits(memory_bytes=3 * 2**30, disk_bytes=5 * 2**30, cpus=1.5, gpus=2)


def pod_of(settings: dict[str, Any], spec: ContainerSpec = SPEC) -> dict[str, Any]:
    return manifests.pod(pod_template(Settings(**settings)), spec, ANCHOR_UID, NOW)


def anchor_of(settings: dict[str, Any], spec: ContainerSpec = SPEC) -> dict[str, Any]:
    return manifests.anchor(pod_template(Settings(**settings)), spec)


def hash_of(manifest: dict[str, Any]) -> str:
    found: str = manifest["metadata"]["annotations"][manifests.SPEC_HASH]
    return found


def shown(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=2)


def test_the_anchor_is_this_and_nothing_else() -> None:
    check_golden("kubernetes", "anchor", shown(anchor_of(PLAIN)))


def test_the_pod_by_default_is_this_and_nothing_else() -> None:
    check_golden("kubernetes", "pod", shown(pod_of(PLAIN)))


def test_the_pod_with_all_that_can_be_set_is_this_and_nothing_else() -> None:
    spec = dataclasses.replace(SPEC, limits=ASKED, image=f"other.example/own@sha256:{'b' * 64}")

    check_golden("kubernetes", "pod_with_all_settings", shown(pod_of(FULL, spec)))


def test_a_canary_differs_by_its_labels_and_its_command_alone() -> None:
    template = pod_template(Settings(**PLAIN))
    maker = CanaryMaker(template, OWNER)

    canary = maker.pod(SPEC.container_id, ANCHOR_UID, canary=True, command=("python", "-c", "pass"))

    ours = pod_of(PLAIN)
    name = f"canary-{SPEC.container_id.hex}"
    assert canary["metadata"]["name"] == name
    labels = ours["metadata"]["labels"] | {manifests.COMPONENT: manifests.CANARY}
    assert canary["metadata"]["labels"] == {
        key: value for key, value in labels.items() if key not in (manifests.JOB, manifests.ATTEMPT)
    }
    for each in (canary, ours):
        each["spec"].pop("activeDeadlineSeconds")
        each["spec"]["containers"][0].pop("command")
    assert json.dumps(canary["spec"]) == json.dumps(ours["spec"]).replace(ours["metadata"]["name"], name)


@pytest.mark.parametrize("settings", [PLAIN, FULL])
@pytest.mark.parametrize("limits", [ContainerLimits(), ASKED])
def test_every_object_is_valid_in_a_strict_check(settings: dict[str, Any], limits: ContainerLimits) -> None:
    spec = dataclasses.replace(SPEC, limits=limits)
    maker = CanaryMaker(pod_template(Settings(**settings)), OWNER)

    pods = [pod_of(settings, spec), maker.pod(SPEC.container_id, ANCHOR_UID, canary=True)]
    anchors = [anchor_of(settings, spec), maker.anchor(SPEC.container_id, canary=True)]

    assert [unknown_fields(KINDS["pods"], pod) for pod in pods] == [[], []]
    assert [unknown_fields(KINDS["configmaps"], anchor) for anchor in anchors] == [[], []]


@pytest.mark.parametrize("settings", [PLAIN, FULL | {"kubernetes_service_account": "submission"}])
def test_no_setting_weakens_the_pod(settings: dict[str, Any]) -> None:
    pod = pod_of(settings)

    assert list(restricted_violations(pod)) == []
    assert list(weaknesses_of(pod)) == []


def test_the_session_key_stands_in_the_anchor_alone() -> None:
    key = SPEC.session_key.hex()

    assert anchor_of(PLAIN)["data"] == {"session-key": key}
    assert key not in json.dumps(pod_of(PLAIN))


@pytest.mark.parametrize(
    "change",
    [
        {"job_id": 8},
        {"attempt": 3},
        {"expires_at": NOW + timedelta(seconds=95)},
        {"session_key": bytes(32)},
        {"limits": ASKED},
        {"image": f"other.example/own@sha256:{'b' * 64}"},
        {"installation_id": UUID(int=1)},
    ],
)
def test_what_is_otherwise_has_another_hash(change: dict[str, Any]) -> None:
    other = dataclasses.replace(SPEC, **change)

    assert hash_of(pod_of(PLAIN, other)) != hash_of(pod_of(PLAIN))
    assert hash_of(anchor_of(PLAIN, other)) == hash_of(pod_of(PLAIN, other))


def test_the_hash_is_the_same_a_moment_later_and_under_another_anchor() -> None:
    template = pod_template(Settings(**PLAIN))

    later = manifests.pod(template, SPEC, "another uid", NOW + timedelta(seconds=30))

    assert hash_of(later) == hash_of(pod_of(PLAIN))
    assert later["spec"]["activeDeadlineSeconds"] == 61


def test_a_pod_that_has_expired_already_ends_at_once() -> None:
    template = pod_template(Settings(**PLAIN))

    late = manifests.pod(template, SPEC, ANCHOR_UID, NOW + timedelta(hours=1))

    assert late["spec"]["activeDeadlineSeconds"] == 1
