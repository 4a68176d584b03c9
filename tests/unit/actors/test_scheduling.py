from __future__ import annotations

from dataclasses import replace

from orchestrator.actors.control_actors import control_options
from orchestrator.actors.rollout_cluster import ClusterPlan
from tests.job_fixtures import a_job


def test_the_control_plane_asks_for_no_cpu_and_for_its_nodes_where_they_are_known() -> None:
    assert control_options(None) == {"num_cpus": 0, "resources": {}}
    assert control_options("orchestrator_control") == {
        "num_cpus": 0,
        "resources": {"orchestrator_control": 0.001},
    }


def test_workers_ask_for_their_cpus_alone_and_for_a_node_only_where_the_submission_is_bound_to_one() -> None:
    job = a_job(resources={"workers": 2, "cpus_per_worker": 0.5})
    plan = ClusterPlan(job=job, workers=2, cpus_per_worker=0.5, node_resource=None, cluster_grows=True)

    anywhere = plan.bundles
    pinned = replace(plan, node_resource="node:10.0.0.1").bundles

    assert [dict(bundle) for bundle in anywhere] == [{"CPU": 0.5}] * 2
    assert [dict(bundle) for bundle in pinned] == [{"CPU": 0.5, "node:10.0.0.1": 0.001}] * 2
