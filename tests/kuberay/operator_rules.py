"""What KubeRay's CRDs let through and its operator does not: the rules of its validation, in our words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

import yaml
from packaging.version import Version
from ray.serve.schema import ServeDeploySchema

from tests.kuberay.kustomize import Json

# A RayCluster's name is the RayService's with 6 characters more, and names of its Services add to that.
LONGEST_NAME = 47
_UPGRADES = ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")
_DNS_LABEL = re.compile(r"^[a-z]([-a-z0-9]*[a-z0-9])?$")
_RESOURCE_PARAMS = {"num-cpus", "num-gpus", "memory", "resources"}


def operator_faults(given: Json) -> list[str]:
    """Why the operator would not act on this RayService or RayJob."""
    rules = {"RayService": _service_faults, "RayJob": _job_faults}
    return list(rules[given["kind"]](given))


def _service_faults(given: Json) -> Iterator[str]:
    name, spec = given["metadata"]["name"], given["spec"]
    if len(name) > LONGEST_NAME or not _DNS_LABEL.match(name):
        yield f"name {name!r}"
    strategy = spec.get("upgradeStrategy", {}).get("type", "NewCluster")
    if strategy not in _UPGRADES:
        yield f"upgradeStrategy.type {strategy!r}"
    yield from _serve_faults(spec.get("serveConfigV2", ""))
    yield from cluster_faults(spec["rayClusterConfig"])


def _serve_faults(text: str) -> Iterator[str]:
    """Serve's own schema decides, as it does when the operator hands the text on."""
    try:
        ServeDeploySchema.model_validate(yaml.safe_load(text))
    except (yaml.YAMLError, ValueError) as error:
        yield f"serveConfigV2: {str(error).splitlines()[0]}"


def cluster_faults(cluster: Json) -> Iterator[str]:
    """Of a RayCluster's spec."""
    groups = cluster.get("workerGroupSpecs", [])
    names = sorted(group["groupName"] for group in groups)
    yield from (f"two groups are named {one!r}" for one, other in pairwise(names) if one == other)
    for group in groups:
        low, high = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
        if not low <= group.get("replicas", 0) <= high:
            yield f"{group['groupName']}: replicas out of {low} to {high}"
    yield from _template_faults(cluster)
    if cluster.get("authOptions", {}).get("mode") == "token" and (
        Version(cluster.get("rayVersion", "0")) < Version("2.52.0")
    ):
        yield "a token takes rayVersion 2.52.0 at least"


def _template_faults(cluster: Json) -> Iterator[str]:
    redis = "gcsFaultToleranceOptions" in cluster
    autoscaler_v2 = cluster.get("autoscalerOptions", {}).get("version") == "v2"
    for group in (cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])):
        name, spec = group.get("groupName", "head"), group["template"]["spec"]
        if not spec.get("containers"):
            yield f"{name}: no container"
            continue
        if group.get("resources") and _RESOURCE_PARAMS & set(group.get("rayStartParams", {})):
            yield f"{name}: resources, and rayStartParams of the same"
        if "labels" in group.get("rayStartParams", {}):
            yield f"{name}: labels in rayStartParams"
        if autoscaler_v2 and spec.get("restartPolicy", "Never") != "Never":
            yield f"{name}: autoscaler v2 takes restartPolicy Never, or none"
        own = {variable["name"] for variable in spec["containers"][0].get("env", [])}
        if redis and own & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"}:
            yield f"{name}: Redis in env, and in gcsFaultToleranceOptions"


def _job_faults(given: Json) -> Iterator[str]:
    spec = given["spec"]
    selector = spec.get("clusterSelector", {})
    if ("rayClusterSpec" in spec) == bool(selector):
        yield "neither or both of rayClusterSpec and clusterSelector"
    if selector and (set(selector) != {"ray.io/cluster"} or not selector["ray.io/cluster"]):
        yield "clusterSelector takes ray.io/cluster alone"
    if selector and spec.get("backoffLimit", 0) != 0:
        yield "backoffLimit has to be 0 with clusterSelector"
    if selector and (spec.get("shutdownAfterJobFinishes") or spec.get("suspend")):
        yield "a cluster that was selected is neither shut down nor suspended"
    if spec.get("submissionMode") == "SidecarMode" and selector:
        yield "clusterSelector is not for SidecarMode"
    if spec.get("ttlSecondsAfterFinished", 0) and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished takes shutdownAfterJobFinishes"
