"""Names, references, rights, tokens and settings of the manifests fit together."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay import autoscaling_config
from ray.serve.config import ProxyLocation
from ray.serve.schema import ServeDeploySchema

from orchestrator.settings import Settings, settings_in_effect
from tests.kuberay.kustomize import Json, build, documents
from tests.kuberay.pods import CONTROL, KUBERAY, SUBMISSIONS, Pod, objects_of, pods_of
from tests.kuberay.test_schemas import BUILDS, PLAIN
from tests.kubernetes_double.admission import restricted_violations
from tests.kubernetes_double.quantities import quantity

ROOT = KUBERAY.parent
OVERLAYS = ["base", "overlays/dev", "overlays/production"]
SECRETS = {"orchestrator-database", "orchestrator-ray-token", "orchestrator-redis"}


@pytest.fixture(params=OVERLAYS)
def objects(request: pytest.FixtureRequest) -> list[Json]:
    return objects_of(request.param)


def named(objects: list[Json], kind: str) -> set[tuple[str, str]]:
    """Namespace and name of all of a kind."""
    return {
        (each["metadata"].get("namespace", ""), each["metadata"]["name"])
        for each in objects
        if each["kind"] == kind
    }


def one(objects: list[Json], kind: str) -> Json:
    [found] = [each for each in objects if each["kind"] == kind]
    return found


def references(part: Any) -> Iterator[tuple[str, str]]:
    """Secrets and ConfigMaps that are named anywhere below."""
    if isinstance(part, list):
        for each in part:
            yield from references(each)
    if isinstance(part, dict):
        for field, kind in (
            ("secretKeyRef", "Secret"),
            ("secretRef", "Secret"),
            ("configMapRef", "ConfigMap"),
        ):
            if field in part:
                yield kind, part[field]["name"]
        if "secretName" in part:
            yield "Secret", part["secretName"]
        for each in part.values():
            yield from references(each)


@pytest.mark.parametrize("directory", BUILDS)
@pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl to compare with")
def test_kubectl_builds_the_same(directory: str) -> None:
    built = subprocess.run(
        ["kubectl", "kustomize", str(KUBERAY / directory)], capture_output=True, check=True, timeout=60
    )

    def ordered(objects: list[Json]) -> list[str]:
        return sorted(json.dumps(each, sort_keys=True) for each in objects)

    theirs = [each for each in yaml.safe_load_all(built.stdout) if each]
    assert ordered(build(KUBERAY / directory)) == ordered(theirs)


def test_no_object_is_there_twice_and_each_has_a_namespace_that_is_there(objects: list[Json]) -> None:
    keys = [(each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"]) for each in objects]
    namespaces = {name for _, name in named(objects, "Namespace")}

    used = {namespace for _, namespace, _ in keys if namespace}

    assert len(keys) == len(set(keys))
    assert namespaces == {CONTROL, SUBMISSIONS}
    assert used == namespaces


def test_secrets_are_named_and_never_there(objects: list[Json]) -> None:
    found = set(references(objects))

    assert named(objects, "Secret") == set()
    assert {name for kind, name in found if kind == "Secret"} == SECRETS
    assert {(CONTROL, name) for kind, name in found if kind == "ConfigMap"} == named(objects, "ConfigMap")
    assert "postgresql://" not in json.dumps(objects)


def test_each_secret_is_made_in_the_operators_guide() -> None:
    guide = (ROOT / "docs" / "operate.md").read_text()

    assert {name for name in SECRETS if f"create secret generic {name}" in guide} == SECRETS


def test_every_pod_has_an_account_that_is_there_and_submissions_have_theirs(objects: list[Json]) -> None:
    accounts = named(objects, "ServiceAccount")
    pods = list(pods_of(objects))

    wanted = {(pod.namespace, pod.spec.get("serviceAccountName")) for pod in pods}

    assert {each for each in wanted if each[1] is not None} <= accounts
    assert (SUBMISSIONS, Settings.model_fields["kubernetes_service_account"].default) in accounts
    assert (SUBMISSIONS, PLAIN.service_account) in accounts


def test_only_the_control_group_has_a_token_in_its_ray_container(objects: list[Json]) -> None:
    pods = {pod.name: pod for pod in pods_of(objects)}
    service = one(objects, "RayService")["spec"]["rayClusterConfig"]

    mounted = {name for name, pod in pods.items() if pod.spec["automountServiceAccountToken"]}
    projected = {
        name
        for name, pod in pods.items()
        for volume in pod.spec.get("volumes", [])
        if "serviceAccountToken" in json.dumps(volume)
    }

    assert mounted == {"control"}
    assert pods["control"].spec["serviceAccountName"] == "orchestrator"
    # The operator puts these mounts into the autoscaler's container, and into no other.
    assert projected == {"head"}
    assert [each["name"] for each in service["autoscalerOptions"]["volumeMounts"]] == ["autoscaler-token"]
    assert "autoscaler-token" not in json.dumps(pods["head"].containers)


def test_the_accounts_mount_no_token_unasked(objects: list[Json]) -> None:
    accounts = [each for each in objects if each["kind"] == "ServiceAccount"]

    assert [each for each in accounts if each["automountServiceAccountToken"] is not False] == []


def test_one_account_alone_is_bound_and_to_the_one_role(objects: list[Json]) -> None:
    bindings = [each for each in objects if each["kind"].endswith("RoleBinding")]

    [binding] = bindings

    assert named(objects, "Role") == {(SUBMISSIONS, binding["roleRef"]["name"])}
    assert named(objects, "ClusterRole") == set()
    assert binding["metadata"]["namespace"] == SUBMISSIONS
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "orchestrator", "namespace": CONTROL}]


def test_every_pod_fits_the_pod_security_of_its_namespace(objects: list[Json]) -> None:
    labels = {
        each["metadata"]["name"]: each["metadata"]["labels"]
        for each in objects
        if each["kind"] == "Namespace"
    }
    autoscaler = one(objects, "RayService")["spec"]["rayClusterConfig"]["autoscalerOptions"]
    pods = list(pods_of(objects))
    head = next(pod for pod in pods if pod.name == "head")
    beside = {"containers": [{"name": "autoscaler", "securityContext": autoscaler["securityContext"]}]}

    found = {pod.name: list(restricted_violations({"spec": pod.spec})) for pod in pods}
    found["autoscaler"] = list(restricted_violations({"spec": head.spec | beside}))

    assert {name: why for name, why in found.items() if why} == {}
    for namespace in (CONTROL, SUBMISSIONS):
        assert labels[namespace]["pod-security.kubernetes.io/enforce"] == "restricted"
        assert labels[namespace]["pod-security.kubernetes.io/enforce-version"] == "v1.36"


def test_every_selector_selects_a_pod(objects: list[Json]) -> None:
    from tests.kuberay.pods import selects, submission

    pods = [*pods_of(objects), submission(), submission("canary")]

    def selected(each: Json) -> list[Pod]:
        match each["kind"]:
            case "NetworkPolicy":
                selector = each["spec"]["podSelector"]
            case "PodDisruptionBudget":
                selector = each["spec"]["selector"]
            case "Service":
                selector = {"matchLabels": each["spec"]["selector"]}
            case _:
                return pods
        inside = [pod for pod in pods if pod.namespace == each["metadata"]["namespace"]]
        return [pod for pod in inside if selects(selector, pod.labels)]

    assert [each["metadata"]["name"] for each in objects if not selected(each)] == []


def test_the_disruption_budget_is_of_the_head_alone(objects: list[Json]) -> None:
    budget = one(objects, "PodDisruptionBudget")["spec"]

    chosen = {pod.name for pod in pods_of(objects) if pod.labels.get("orchestrator.dev/role") == "head"}

    assert budget == {"minAvailable": 1, "selector": {"matchLabels": {"orchestrator.dev/role": "head"}}}
    assert chosen == {"head"}


def test_the_serve_config_is_ray_app_yaml() -> None:
    application = (ROOT / "ray_app.yaml").read_text()
    [service] = documents(KUBERAY / "base" / "ray_service.yaml")

    assert service["spec"]["serveConfigV2"].strip() == application.strip()
    assert yaml.safe_load(service["spec"]["serveConfigV2"]) == yaml.safe_load(application)


def test_the_generator_has_nothing_to_write() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "serve_config.py"), "--check"], check=False, timeout=60
    )

    assert done.returncode == 0


def test_the_service_leads_to_serves_proxy(objects: list[Json]) -> None:
    config = yaml.safe_load(one(objects, "RayService")["spec"]["serveConfigV2"])
    options = ServeDeploySchema.model_validate(config)
    api = next(each for each in objects if each["metadata"]["name"] == "orchestrator-api")
    head = next(pod for pod in pods_of(objects) if pod.name == "head")
    [port] = [each for each in head.containers[0]["ports"] if each["name"] == "serve"]

    # Where the proxy is, who leads there, and on which address it listens.
    assert options.proxy_location == ProxyLocation.HeadOnly
    assert api["spec"]["selector"] == {"orchestrator.dev/role": "head", "ray.io/serve": "true"}
    assert port["containerPort"] == api["spec"]["ports"][0]["targetPort"] == options.http_options.port
    assert one(objects, "ConfigMap")["data"]["RAY_SERVE_DEFAULT_HTTP_HOST"] == "0.0.0.0"


def settings_of(objects: list[Json], monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name in [each for each in os.environ if each.startswith("ORCHESTRATOR_")]:
        monkeypatch.delenv(name)
    for name, value in one(objects, "ConfigMap")["data"].items():
        monkeypatch.setenv(name, value)
    return settings_in_effect({}).settings


def test_the_settings_are_settings_and_fit_the_manifests(
    objects: list[Json], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(objects, monkeypatch)

    assert settings.containers == "kubernetes"
    assert settings.cluster_autoscales
    assert settings.control_resource in node_types(objects)["control"]["resources"]
    assert settings.kubernetes_namespace == SUBMISSIONS
    assert (SUBMISSIONS, settings.kubernetes_service_account) in named(objects, "ServiceAccount")


def test_quota_and_limits_have_room_for_what_settings_allow(
    objects: list[Json], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(objects, monkeypatch)
    hard = one(objects, "ResourceQuota")["spec"]["hard"]
    [limits] = one(objects, "LimitRange")["spec"]["limits"]
    most = {
        "cpu": settings.kubernetes_max_cpus,
        "memory": settings.kubernetes_max_memory_bytes,
        "ephemeral-storage": settings.kubernetes_max_disk_bytes,
    }
    usual = {
        "cpu": settings.kubernetes_default_cpus,
        "memory": settings.kubernetes_default_memory_bytes,
        "ephemeral-storage": settings.kubernetes_default_disk_bytes,
    }

    assert {name: quantity(limits["max"][name]) for name in most} == most
    assert {name: quantity(limits["default"][name]) for name in usual} == usual
    assert limits["default"] == limits["defaultRequest"]
    jobs = settings.max_concurrent_jobs
    for name in usual:
        assert quantity(hard[f"requests.{name}"]) >= max(usual[name] * jobs, most[name])
        assert hard[f"requests.{name}"] == hard[f"limits.{name}"]
    # Two canaries besides; and of each attempt a ConfigMap, also while the one before it goes.
    assert quantity(hard["pods"]) >= jobs + 2
    assert quantity(hard["configmaps"]) >= 2 * quantity(hard["pods"]) + 1


def node_types(objects: list[Json]) -> Json:
    """What Ray's own autoscaler makes of the groups."""
    cluster = one(objects, "RayService")["spec"]["rayClusterConfig"]
    resource = {"metadata": {"name": "orchestrator", "namespace": CONTROL}, "spec": cluster}
    config: Json = autoscaling_config._derive_autoscaling_config_from_ray_cr(resource)
    types: Json = config["available_node_types"]
    return types


def test_rays_autoscaler_sees_control_and_rollouts_apart(objects: list[Json]) -> None:
    types = node_types(objects)

    has = {name: each["resources"] for name, each in types.items()}

    assert has["headgroup"]["CPU"] == has["control"]["CPU"] == 0
    assert {name for name in has if "orchestrator_control" in has[name]} == {"control"}
    assert has["rollout-cpu"]["CPU"] >= 1
    assert "GPU" not in has["rollout-cpu"]
    assert has["rollout-gpu"]["GPU"] == 1
    assert {types[name]["min_workers"] for name in ("rollout-cpu", "rollout-gpu")} == {0}
    assert (types["control"]["min_workers"], types["control"]["max_workers"]) == (1, 1)


def test_supervisors_have_a_custom_resource_and_the_ray_job_asks_for_it() -> None:
    [job] = documents(KUBERAY / "samples" / "ray_job.yaml")

    asked = json.loads(job["spec"]["entrypointResources"])

    assert list(asked) == ["orchestrator_control"]
    assert (
        0
        < asked["orchestrator_control"]
        < node_types(objects_of("base"))["control"]["resources"]["orchestrator_control"]
    )


def test_the_ray_version_is_that_of_the_lock(objects: list[Json]) -> None:
    lock = (ROOT / "requirements.lock").read_text()

    assert f"\nray=={one(objects, 'RayService')['spec']['rayClusterConfig']['rayVersion']} " in lock


def test_no_image_is_left_without_a_place(objects: list[Json], request: pytest.FixtureRequest) -> None:
    images = {container["image"] for pod in pods_of(objects) for container in pod.containers}

    if "base" in request.node.name:
        assert images == {"orchestrator"}
    else:
        assert {image.split("/")[0] for image in images} == {"registry.example.com"}


def test_every_ray_container_is_probed(objects: list[Json]) -> None:
    ray = [pod for pod in pods_of(objects) if "ray.io/cluster" in pod.labels]

    probes = {
        (pod.name, kind): container.get(f"{kind}Probe", {}).get("httpGet", {}).get("path")
        for pod in ray
        for container in pod.spec["containers"]
        for kind in ("startup", "liveness", "readiness")
    }

    assert len(probes) == 12
    assert set(probes.values()) == {"/api/healthz"}


def test_what_is_registered_in_an_example_is_a_placeholder() -> None:
    texts = {path: path.read_text() for path in Path(KUBERAY).rglob("*.yaml")}

    for path, text in texts.items():
        assert "ghcr.io" not in text, path
        assert "docker.io" not in text, path
