"""Manifests, and what the adapter builds, are valid for Kubernetes 1.36 and for KubeRay 1.7."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest

from orchestrator.adapters.kubernetes.manifests import CANARY, CONTAINER, PodTemplate, anchor, pod, toleration
from orchestrator.ports import ContainerLimits, ContainerSpec
from tests.kuberay.kustomize import Json, build, documents
from tests.kuberay.operator_rules import operator_faults
from tests.kuberay.schemas import schema_faults

KUBERAY = Path(__file__).resolve().parents[2] / "kuberay"
BUILDS = sorted(
    path.parent.relative_to(KUBERAY).as_posix()
    for path in KUBERAY.rglob("kustomization.yaml")
    if "kind: Component" not in path.read_text()
)
SAMPLES = sorted((KUBERAY / "samples").glob("*.yaml"))
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
SPEC = ContainerSpec(
    job_id=7,
    attempt=2,
    container_id=UUID("aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee"),
    installation_id=UUID("11111111-2222-4333-8444-555555555555"),
    expires_at=NOW + timedelta(hours=1),
    session_key=b"k" * 32,
    limits=ContainerLimits(),
)
PLAIN = PodTemplate(
    "orchestrator-submissions",
    "registry.example/submission@sha256:" + "a" * 64,
    ContainerLimits(cpus=1.0, memory_bytes=2**31, disk_bytes=2**32),
)
FULL = dataclasses.replace(
    PLAIN,
    limits=dataclasses.replace(PLAIN.limits, gpus=1),
    runtime_class="gvisor",
    user_namespaces=True,
    node_selector=(("pool", "submissions"),),
    tolerations=(toleration("submissions=only:NoSchedule"), toleration("gpu:NoSchedule")),
    priority_class="low",
    pull_secrets=("pull",),
)


def test_every_directory_and_sample_is_looked_at() -> None:
    assert {"base", "migration", "overlays/dev", "overlays/production"} <= set(BUILDS)
    assert [path.name for path in SAMPLES] == ["ray_job.yaml"]


@pytest.mark.parametrize("directory", BUILDS)
def test_manifests_are_valid(directory: str) -> None:
    objects = build(KUBERAY / directory)

    faults = {each["metadata"]["name"]: schema_faults(each) for each in objects}

    assert objects
    assert {name: found for name, found in faults.items() if found} == {}


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda path: path.name)
def test_samples_are_valid(sample: Path) -> None:
    for each in documents(sample):
        assert schema_faults(each) == []
        assert operator_faults(each) == []


@pytest.mark.parametrize("component", [CONTAINER, CANARY])
@pytest.mark.parametrize("template", [PLAIN, FULL], ids=["plain", "all settings"])
def test_what_the_adapter_builds_is_valid(template: PodTemplate, component: str) -> None:
    spec = dataclasses.replace(SPEC, limits=template.limits)

    built = [
        anchor(template, spec, component),
        pod(template, spec, "99999999-8888-4777-8666-555555555555", NOW, component),
    ]

    assert [schema_faults(each) for each in built] == [[], []]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda given: given["spec"].update(autoMountServiceAccountToken=False),
        lambda given: given["spec"].update(restartPolicy=3),
        lambda given: given["spec"]["containers"][0].pop("name"),
        lambda given: given["spec"]["containers"][0]["securityContext"].update(runAsUser="65532"),
    ],
    ids=["unknown field", "wrong type", "missing field", "text for a number"],
)
def test_the_check_finds_what_is_wrong(spoil: Callable[[Json], object]) -> None:
    given = pod(PLAIN, SPEC, "99999999-8888-4777-8666-555555555555", NOW)

    spoil(given)

    assert schema_faults(given) != []


def _service(directory: str = "base") -> Json:
    [found] = [each for each in build(KUBERAY / directory) if each["kind"] == "RayService"]
    return found


def _groups(given: Json) -> list[Json]:
    groups: list[Json] = given["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    return groups


@pytest.mark.parametrize("directory", ["base", "overlays/dev", "overlays/production"])
def test_the_operator_acts_on_the_ray_service(directory: str) -> None:
    assert operator_faults(_service(directory)) == []


BROKEN: dict[str, Callable[[Json], object]] = {
    "upgradeStrategy": lambda given: given["spec"]["upgradeStrategy"].update(type="Bogus"),
    "serveConfigV2: ": lambda given: given["spec"].update(serveConfigV2="applications: [: {"),
    "serveConfigV2: 1 validation error": lambda given: given["spec"].update(serveConfigV2="application: []"),
    "replicas out of": lambda given: _groups(given)[1].update(minReplicas=5, maxReplicas=2),
    "two groups are named": lambda given: _groups(given)[1].update(groupName="control"),
    "rayStartParams of the same": lambda given: _groups(given)[0].update(rayStartParams={"num-cpus": "0"}),
    "restartPolicy": lambda given: _groups(given)[0]["template"]["spec"].update(restartPolicy="Always"),
    "rayVersion": lambda given: given["spec"]["rayClusterConfig"].update(rayVersion="2.51.0"),
    "Redis in env": lambda given: given["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"][
        "containers"
    ][0].update(env=[{"name": "REDIS_PASSWORD", "value": "no"}]),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_the_crd_lets_through_and_the_operator_does_not_is_found(fault: str) -> None:
    given = copy.deepcopy(_service())

    BROKEN[fault](given)

    assert schema_faults(given) == []
    assert [found for found in operator_faults(given) if fault in found] != []


JOB_BROKEN: dict[str, dict[str, object]] = {
    "alone": {"clusterSelector": {"ray.io/cluster": "one", "pool": "two"}},
    "neither": {"clusterSelector": {}},
    "backoffLimit": {"backoffLimit": 2},
    "shut down": {"shutdownAfterJobFinishes": True},
    "SidecarMode": {"submissionMode": "SidecarMode"},
    "ttlSeconds": {"ttlSecondsAfterFinished": 60},
}


@pytest.mark.parametrize("fault", JOB_BROKEN)
def test_a_ray_job_that_the_operator_would_refuse_is_found(fault: str) -> None:
    [given] = documents(KUBERAY / "samples" / "ray_job.yaml")

    given["spec"] |= JOB_BROKEN[fault]

    assert schema_faults(given) == []
    assert [found for found in operator_faults(given) if fault in found] != []
