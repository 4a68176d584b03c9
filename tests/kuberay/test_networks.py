"""Who may connect to whom, as the NetworkPolicies have it."""

from __future__ import annotations

import pytest

from tests.kuberay.kustomize import Json
from tests.kuberay.pods import CONTROL, SUBMISSIONS, Pod, connects, objects_of, pods_of, stranger, submission

OUTSIDE, METADATA = "203.0.113.7", "169.254.169.254"
DNS = stranger("kube-system", **{"k8s-app": "kube-dns"})
OPERATOR = stranger("kuberay-system", **{"app.kubernetes.io/component": "kuberay-operator"})
# The ports of Ray: GCS, dashboard, client, dashboard agent, metrics, and some of its workers'.
RAY_PORTS = (6379, 8265, 10001, 52365, 8080, 10002, 19999)


@pytest.fixture(scope="module", params=["base", "overlays/dev", "overlays/production"])
def overlay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def objects(overlay: str) -> list[Json]:
    return objects_of(overlay)


@pytest.fixture(scope="module")
def pods(objects: list[Json]) -> dict[str, Pod]:
    return {pod.name: pod for pod in pods_of(objects)}


@pytest.mark.parametrize("component", ["submission", "canary"])
def test_only_control_and_rollout_pods_connect_to_a_submission_and_to_its_rpc_port_alone(
    objects: list[Json], pods: dict[str, Pod], component: str
) -> None:
    target = submission(component)
    everybody = [*pods.values(), submission(), stranger(SUBMISSIONS), stranger("default"), DNS]
    everybody += [stranger("default", **{"orchestrator.dev/role": "control"})]

    let_in = {pod.name for pod in everybody if connects(objects, pod, target, 8000)}

    assert let_in == {"control", "rollout-cpu", "rollout-gpu"}
    assert [
        port for port in (22, 80, 8001, *RAY_PORTS) if connects(objects, pods["control"], target, port)
    ] == []
    assert not connects(objects, OUTSIDE, target, 8000)


@pytest.mark.parametrize("port", [53, 80, 443, 5432, 6443, 8000, 8265])
def test_a_submission_connects_to_nobody(objects: list[Json], pods: dict[str, Pod], port: int) -> None:
    source = submission()
    targets: list[Pod | str] = [*pods.values(), DNS, submission(), stranger("default"), OUTSIDE, METADATA]

    assert [target for target in targets if connects(objects, source, target, port)] == []


def test_a_pod_of_submissions_namespace_that_is_nobodys_is_closed_both_ways(
    objects: list[Json], pods: dict[str, Pod]
) -> None:
    unknown = stranger(SUBMISSIONS)

    assert not connects(objects, pods["control"], unknown, 8000)
    assert not connects(objects, unknown, OUTSIDE, 443)


@pytest.mark.parametrize("port", RAY_PORTS)
def test_rays_ports_are_open_to_rays_pods_alone(objects: list[Json], pods: dict[str, Pod], port: int) -> None:
    ray = [pod for pod in pods.values() if "ray.io/cluster" in pod.labels]
    others = [stranger("default"), stranger(CONTROL), submission(), OUTSIDE, pods["migrate"]]
    others += [] if port == 8265 else [OPERATOR]

    for target in ray:
        assert [source.name for source in ray if not connects(objects, source, target, port)] == []
        assert [source for source in others if connects(objects, source, target, port)] == []


def test_everybody_reaches_serve_and_on_the_head_alone(objects: list[Json], pods: dict[str, Pod]) -> None:
    for source in (OUTSIDE, stranger("default")):
        reached = {pod.name for pod in pods.values() if connects(objects, source, pod, 8000)}

        assert reached == {"head"}


def test_kuberays_operator_reaches_the_dashboard_and_the_proxy_of_the_head(
    objects: list[Json], pods: dict[str, Pod]
) -> None:
    reached = {
        (name, port)
        for name, pod in pods.items()
        for port in (*RAY_PORTS, 8000)
        if connects(objects, OPERATOR, pod, port)
    }

    assert reached == {("head", 8265), ("head", 8000)}
    elsewhere = stranger("default", **OPERATOR.labels)
    assert not connects(objects, elsewhere, pods["head"], 8265)


def addresses(overlay: str) -> dict[int, str]:
    """Of the database, the API server, the archives and Redis, by port."""
    if overlay == "overlays/production":
        return {5432: "192.0.2.10", 6443: "192.0.2.20", 443: "198.51.100.9", 6379: "192.0.2.30"}
    return dict.fromkeys((5432, 6443, 443, 6379), "10.9.8.7")


def test_each_pod_reaches_what_it_needs_and_nothing_more(
    overlay: str, objects: list[Json], pods: dict[str, Pod]
) -> None:
    places = addresses(overlay)
    ours = {name: pod for name, pod in pods.items() if "orchestrator.dev/role" in pod.labels}

    reached = {
        name: {port for port, place in places.items() if connects(objects, pod, place, port)}
        for name, pod in ours.items()
    }

    head = {6443, 6379} | ({443} if overlay != "overlays/production" else set())
    assert reached == {
        "head": head,
        "control": {5432, 6443, 443},
        "rollout-cpu": set(),
        "rollout-gpu": set(),
        "migrate": {5432},
    }


@pytest.mark.parametrize("port", [80, 443, 5432, 6379, 6443])
def test_nobody_reaches_the_metadata_address(objects: list[Json], pods: dict[str, Pod], port: int) -> None:
    assert [name for name, pod in pods.items() if connects(objects, pod, METADATA, port)] == []


def test_every_pod_of_ours_looks_names_up(objects: list[Json], pods: dict[str, Pod]) -> None:
    assert [name for name, pod in pods.items() if not connects(objects, pod, DNS, 53)] == []


def test_the_stores_of_dev_take_connections_of_ours_alone() -> None:
    objects = objects_of("overlays/dev")
    pods = {pod.name: pod for pod in pods_of(objects)}

    assert connects(objects, pods["control"], pods["postgres"], 5432)
    assert not connects(objects, pods["rollout-cpu"], pods["postgres"], 5432)
    assert connects(objects, pods["migrate"], pods["postgres"], 5432)
    assert connects(objects, pods["head"], pods["redis"], 6379)
    assert not connects(objects, stranger("default"), pods["postgres"], 5432)
    assert not connects(objects, stranger(CONTROL), pods["redis"], 6379)
    assert not connects(objects, submission(), pods["postgres"], 5432)


def test_the_range_of_a_laptop_is_let_in_by_dev_alone() -> None:
    laptop = "192.0.2.77"

    assert connects(objects_of("overlays/dev"), laptop, submission(), 8000)
    assert not connects(objects_of("base"), laptop, submission(), 8000)
    assert not connects(objects_of("overlays/production"), laptop, submission(), 8000)
