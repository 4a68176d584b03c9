"""`orchestrator eval` on a laptop, with the submission in a pod of the cluster that its kubeconfig names."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.archive_server import make_certificate
from tests.end_to_end.command_processes import orchestrator, start, wait_until
from tests.end_to_end.conftest import EXAMPLES
from tests.kubernetes.adapters import ADAPTER_IS_HERE, variables_for
from tests.kubernetes_double import ApiDouble, double_in_thread

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not ADAPTER_IS_HERE, reason="the adapter for Kubernetes is not part of this tree"),
]


@pytest.fixture
def data_dir(scratch: Path) -> Path:
    scratch.chmod(0o755)
    return scratch / "data"


def test_a_laptop_evaluates_in_a_pod_and_leaves_nothing_on_the_cluster(data_dir: Path, scratch: Path) -> None:
    options = ("--containers", "kubernetes", "-b", "gymnasium/CartPole-v1", "--episodes", "3", "--json")

    with double_in_thread(certificate=make_certificate(scratch)) as double:
        variables = variables_for(double.write_kubeconfig(scratch / "kubeconfig"))
        done = orchestrator("eval", EXAMPLES / "cartpole", *options, "--data-dir", data_dir, **variables)
        created = [call for call in double.calls if call.verb == "create" and not call.dry_run]
        left = double.names("pods"), double.names("configmaps")
        pods_of_submissions = len(
            {
                change.key.name
                for change in double.store.changes_after(1000)
                if change.key.plural == "pods" and change.key.name.startswith("submission-")
            }
        )

    assert done.returncode == 0, done.stderr
    [result] = json.loads(done.stdout)["results"]
    assert (result["score"], result["total_episodes"]) == (1.0, 3)
    assert {"pods", "configmaps"} <= {call.resource for call in created}
    assert pods_of_submissions == 1
    assert left == ([], [])
    assert double.token not in done.stdout + done.stderr


def submissions(double: ApiDouble) -> list[str]:
    """The pods that run submissions: preflight's canaries come and go before."""
    return [name for name in double.names("pods") if name.startswith("submission-")]


def test_an_interrupted_evaluation_leaves_no_pod(data_dir: Path, scratch: Path) -> None:
    options = ("--containers", "kubernetes", "-b", "gymnasium/CartPole-v1", "--episodes", "100000")

    with double_in_thread() as double:
        variables = variables_for(double.write_kubeconfig(scratch / "kubeconfig"))
        log = scratch / "log"
        command = start("eval", EXAMPLES / "cartpole", *options, "--data-dir", data_dir, log=log, **variables)
        try:
            wait_until(lambda: bool(submissions(double)), "a submission's pod")
            command.send_signal(signal.SIGINT)
            code = command.wait(120)
        finally:
            command.kill()
        left = double.names("pods"), double.names("configmaps")

    assert code != 0, log.read_text()
    assert left == ([], [])
