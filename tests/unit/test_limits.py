"""What a job may ask for the pod of its submission."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.cluster_containers import pod_template
from orchestrator.domain.errors import UsageError
from orchestrator.limits import container_limits
from orchestrator.ports import ContainerLimits
from orchestrator.settings import Settings
from tests.job_fixtures import a_job

DIGEST = f"@sha256:{'c' * 64}"
IMAGE = f"registry.example/base{DIGEST}"
CLUSTER = Settings(
    containers="kubernetes",
    kubernetes_image=IMAGE,
    kubernetes_allowed_images=("registry.example:5000/teams/own", "plain"),
    kubernetes_max_gpus=2,
    container_memory_bytes=2**30,
)


def test_a_job_gets_what_it_asks_for_within_what_is_allowed() -> None:
    asked = {"memory_bytes": 3 * 2**30, "disk_bytes": 2**30, "cpus": 2.5, "gpus": 2}

    limits = container_limits(a_job(1, resources=asked), CLUSTER)

    assert limits == ContainerLimits(3 * 2**30, 2**30, CLUSTER.container_log_bytes, 2.5, 2)


def test_what_a_job_does_not_ask_for_is_left_to_the_default() -> None:
    limits = container_limits(a_job(1), CLUSTER)

    assert (limits.memory_bytes, limits.disk_bytes, limits.cpus, limits.gpus) == (None, None, None, None)
    assert pod_template(CLUSTER).limits.memory_bytes == CLUSTER.kubernetes_default_memory_bytes


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"cpus": 4.5}, "resources.cpus = 4.5, and this installation allows 4 .kubernetes_max_cpus"),
        ({"memory_bytes": 2**40}, "kubernetes_max_memory_bytes"),
        ({"disk_bytes": 2**40}, "kubernetes_max_disk_bytes"),
        ({"gpus": 3}, "kubernetes_max_gpus"),
    ],
)
def test_a_job_that_asks_for_more_is_refused_with_the_setting_that_says_so(
    asked: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        container_limits(a_job(1, resources=asked), CLUSTER)


@pytest.mark.parametrize(
    "image",
    [
        IMAGE,
        f"registry.example:5000/teams/own{DIGEST}",
        f"registry.example:5000/teams/own:v1{DIGEST}",
        f"plain{DIGEST}",
    ],
)
def test_images_of_allowed_repositories_are_taken(image: str) -> None:
    assert container_limits(a_job(1, image=image), CLUSTER)


@pytest.mark.parametrize(
    "image",
    [
        f"registry.example/base@sha256:{'d' * 64}",  # the installation's, of another day
        f"registry.example:5000/teams/own/more{DIGEST}",
        f"registry.example:5000/teams{DIGEST}",
        f"evil.example/plain{DIGEST}",
        f"Registry.example:5000/teams/own{DIGEST}",
    ],
)
def test_images_of_other_repositories_are_refused(image: str) -> None:
    with pytest.raises(UsageError, match="kubernetes_allowed_images"):
        container_limits(a_job(1, image=image), CLUSTER)


def test_on_this_machine_an_image_and_a_gpu_say_nothing() -> None:
    job = a_job(1, image=f"evil.example/plain{DIGEST}", resources={"gpus": 3, "memory_bytes": 2**40})

    limits = container_limits(job, Settings(container_memory_bytes=2**30))

    assert (limits.memory_bytes, limits.gpus) == (2**30, None)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"kubernetes_image": "registry.example/base:latest"}, "pinned by its digest"),
        ({"kubernetes_image": "registry.example/base@sha256:12"}, "pinned by its digest"),
        ({"kubernetes_default_cpus": 5}, "kubernetes_default_cpus may not be above kubernetes_max_cpus"),
        ({"kubernetes_namespace": "Not_A_Name"}, "a name of Kubernetes"),
        ({"kubernetes_tolerations": "pool=a:Sometimes"}, "taints"),
        ({"kubernetes_node_selector": "pool"}, "labels"),
    ],
)
def test_settings_that_no_cluster_takes_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Settings(**wrong)


def test_a_tag_is_taken_where_a_setting_says_so_by_name() -> None:
    settings = Settings(kubernetes_image="local:dev", kubernetes_allow_tags=True)

    assert pod_template(settings).image == "local:dev"


def test_pods_without_an_image_are_refused_by_the_name_of_the_setting() -> None:
    with pytest.raises(UsageError, match="kubernetes_image"):
        pod_template(Settings(containers="kubernetes"))
