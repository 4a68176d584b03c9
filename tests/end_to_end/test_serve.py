"""`serve deploy ray_app.yaml` on a cluster that an operator has started."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import psutil
import pytest
import yaml
from pgqueuer.adapters.drivers.asyncpg import AsyncpgDriver
from pgqueuer.adapters.persistence.queries import Queries

from orchestrator.adapters.artifacts.pack import pack_directory
from orchestrator.adapters.postgres.embedded import embedded_postgres
from tests.end_to_end.command_processes import processes_naming, wait_until
from tests.end_to_end.conftest import EXAMPLES, ROOT
from tests.ray_head import RayHead, ray_head

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

PATIENCE_SECONDS = 120.0
CONTROL = "orchestrator_control"


@pytest.fixture
def data_dir(scratch: Path) -> Path:
    scratch.chmod(0o755)  # the server runs under an account of its own
    return scratch / "data"


@pytest.fixture
def head(data_dir: Path) -> Iterator[RayHead]:
    variables = {"ORCHESTRATOR_DATA_DIR": str(data_dir), "ORCHESTRATOR_CONTROL_RESOURCE": CONTROL}
    with ray_head(resources=json.dumps({CONTROL: 1}), **variables) as head:
        yield head


class Served:
    """The application on the cluster, as its operator and its clients see it."""

    def __init__(self, head: RayHead, scratch: Path) -> None:
        self.head = head
        self.scratch = scratch
        self.url = f"http://127.0.0.1:{head.http_port}"
        self.shown: dict[str, str] = {}

    def deploy(self, **user_config: Any) -> None:
        """`serve deploy` of the file as it is shipped, on a port of the test and with these settings."""
        config = yaml.safe_load((ROOT / "ray_app.yaml").read_text())
        config["http_options"] = {"port": self.head.http_port}
        config["applications"][0]["deployments"][0]["user_config"] = user_config
        file = self.scratch / "ray_app.yaml"
        file.write_text(yaml.safe_dump(config))
        deployed = self.head.serve("deploy", file)
        assert deployed.returncode == 0, deployed.stderr

    def status(self) -> dict[str, Any]:
        """What `serve status` says of the application."""
        shown = self.head.serve("status")
        assert shown.returncode == 0, shown.stderr
        status: dict[str, Any] = yaml.safe_load(shown.stdout)["applications"].get("orchestrator", {})
        return status

    def until_ready(self) -> None:
        wait_until(self._is_ready, f"readiness; {self.status()}", PATIENCE_SECONDS)

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=10).status_code == 200
        except httpx.HTTPError:
            return False

    def replica(self) -> psutil.Process:
        (replica,) = [
            process
            for process in processes_naming("ServeReplica:orchestrator:ControlPlane")
            if self.head.address.rpartition(":")[2] in " ".join(process.parent().cmdline())  # type: ignore[union-attr]
        ]
        return replica

    async def resources_of_actors(self) -> dict[str, dict[str, float]]:
        """What each class of actors, also those that have ended, asked Ray for."""
        async with httpx.AsyncClient(timeout=30) as http:
            answer = await http.get(f"{self.head.dashboard}/api/v0/actors?detail=true&limit=1000")
        actors = answer.json()["data"]["result"]["result"]
        self.shown = {actor["class_name"]: actor["repr_name"] for actor in actors}
        return {actor["class_name"]: actor["required_resources"] for actor in actors}

    async def metrics(self) -> dict[str, dict[str, float]]:
        """Our metrics as the node exports them: by name, and by their own labels."""
        found: dict[str, dict[str, float]] = defaultdict(dict)
        async with httpx.AsyncClient(timeout=30) as http:
            answer = await http.get(f"http://127.0.0.1:{self.head.metrics_port}/metrics")
        for line in answer.text.splitlines():
            if line.startswith("ray_orchestrator_"):
                name, labels, value = re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line).groups()  # type: ignore[union-attr]
                ours = re.findall(r'(?:status|queue|outcome|fault|action)="([^"]*)"', labels)
                found[name]["/".join(ours)] = float(value)
        return found

    async def until_exported(self, name: str, label: str, value: float) -> dict[str, dict[str, float]]:
        """All of our metrics, once this one stands at the value: Ray passes them on every ten seconds."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (found := await self.metrics())[name].get(label) != value:
                await asyncio.sleep(0.5)
        return found

    async def submit(self, job: dict[str, Any], token: str, key: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {token}", "Idempotency-Key": key}
        async with httpx.AsyncClient(timeout=30) as http:
            return await http.post(f"{self.url}/v1/jobs", json=job, headers=headers)

    def token(self) -> str:
        made = self.head.orchestrator("token", "create", "test")
        assert made.returncode == 0, made.stderr
        return made.stdout.strip()


def job_fields(scratch: Path, **more: Any) -> dict[str, Any]:
    packed = pack_directory(EXAMPLES / "cartpole", scratch / "artifacts")
    return {
        "submission_id": "cartpole",
        "env_provider": "gymnasium",
        "benchmark_name": "CartPole-v1",
        "config": {"seed": 7},
        "episodes_per_task": 3,
        "artifact_url": f"file://{packed.path}",
        "artifact_sha256": packed.sha256,
        "artifact_size_bytes": packed.size_bytes,
    } | more


@asynccontextmanager
async def connected(data_dir: Path) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """A validator's connection: it knows the database, and nothing else of ours."""
    async with embedded_postgres(data_dir) as database:
        connection = await asyncpg.connect(database.dsn)
        try:
            yield connection
        finally:
            await connection.close()


async def results(connection: asyncpg.Connection[asyncpg.Record], count: int) -> list[dict[str, Any]]:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            rows = await connection.fetch("SELECT message FROM results ORDER BY job_id")
            if len(rows) >= count:
                return [json.loads(row["message"]) for row in rows]
            await asyncio.sleep(0.2)


async def generation(connection: asyncpg.Connection[asyncpg.Record]) -> int:
    return int(await connection.fetchval("SELECT generation FROM installation"))


async def test_jobs_by_http_by_command_line_and_by_queue_outlive_the_replica_and_another_deployment(
    head: RayHead, scratch: Path, data_dir: Path
) -> None:
    served = Served(head, scratch)
    settings = {"archive_allowed_schemes": ["file"], "max_concurrent_jobs": 2}
    served.deploy(**settings)
    served.until_ready()
    assert served.status()["status"] == "RUNNING"

    async with connected(data_dir) as connection:
        fields = job_fields(scratch)
        token = served.token()
        answer = await served.submit(fields, token, key="one")
        assert answer.status_code == 201, answer.text
        by_command = head.orchestrator("submit", "-", stdin=json.dumps(fields | {"job_id": 2}))
        assert by_command.returncode == 0, by_command.stderr
        payload = json.dumps(fields | {"job_id": 3}).encode()
        await Queries(AsyncpgDriver(connection)).enqueue(["add_job"], [payload], [0])

        killed = served.replica()
        os.kill(killed.pid, signal.SIGKILL)
        served.deploy(**settings)
        found = await results(connection, 3)
        served.until_ready()
        again = await served.submit(fields, token, key="one")

        assert (again.status_code, again.json()["job_id"]) == (200, answer.json()["job_id"])
        assert [result["job_id"] for result in found] == [2, 3, answer.json()["job_id"]]
        assert [result["status"] for result in found] == ["COMPLETED"] * 3, found
        assert len({json.dumps(result["score"]) for result in found}) == 1
        assert await connection.fetchval("SELECT count(*) FROM results") == 3
        queued = await connection.fetchval("SELECT count(*) FROM pgqueuer WHERE entrypoint = 'eval_result'")
        assert queued == 3
        assert await generation(connection) == 1

    exported = await served.until_exported("ray_orchestrator_jobs_ended_total", "COMPLETED", 3.0)
    assert (
        exported["ray_orchestrator_episodes_total"]["success"]
        + exported["ray_orchestrator_episodes_total"].get("failure", 0)
        == 9
    )
    assert exported["ray_orchestrator_steps_total"][""] > 9
    assert exported["ray_orchestrator_queue_rows"]["eval_result"] == 3
    assert exported["ray_orchestrator_policy_latency_seconds_count"][""] == 9
    assert exported["ray_orchestrator_claim_to_first_step_seconds_count"][""] == 3
    assert exported["ray_orchestrator_jobs"] == {"QUEUED": 0, "STARTING": 0, "RUNNING": 0}

    asked = await served.resources_of_actors()
    control = (
        "QueueConsumerActor",
        "ResultSinkActor",
        "JobSupervisorActor",
        "ServeReplica:orchestrator:ControlPlane",
    )
    assert {name: asked[name] for name in control} == {key: {CONTROL: 0.001} for key in control}
    assert CONTROL not in asked["RolloutWorkerProcess"]
    assert asked["RolloutWorkerProcess"]
    assert re.match(r"JobSupervisor\(job \d+, gymnasium/CartPole-v1: ", served.shown["JobSupervisorActor"])
    assert re.match(
        r"RolloutWorker\(job \d+, gymnasium/CartPole-v1, worker 0", served.shown["RolloutWorkerProcess"]
    )


async def test_a_changed_setting_is_applied_and_a_shutdown_leaves_nothing(
    head: RayHead, scratch: Path, data_dir: Path
) -> None:
    served = Served(head, scratch)
    served.deploy(max_concurrent_jobs=2)
    served.until_ready()
    replica = served.replica()

    async with connected(data_dir) as connection:
        served.deploy(max_concurrent_jobs=3)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while await generation(connection) != 2:
                await asyncio.sleep(0.2)
        wait_until(lambda: served.status()["deployments"]["ControlPlane"]["status"] == "HEALTHY", "health")
        assert served.replica() == replica
        served.until_ready()

    assert head.serve("shutdown", "-y").returncode == 0
    wait_until(
        lambda: not processes_naming(str(data_dir)), "the end of actors and database", PATIENCE_SECONDS
    )


async def test_settings_that_cannot_be_fail_the_deployment_with_the_reason(
    head: RayHead, scratch: Path
) -> None:
    served = Served(head, scratch)

    served.deploy(max_concurrent_jobs=0, database_url="postgresql://user:hush@host/name")
    wait_until(lambda: served.status().get("status") == "DEPLOY_FAILED", "the failure", PATIENCE_SECONDS)
    secret = json.dumps(served.status())
    served.deploy(max_concurrent_jobs=0)
    wait_until(lambda: "expected a whole number" in json.dumps(served.status()), "the reason")

    assert "database_url is a secret, and Serve shows user_config to everybody" in secret
    assert "max_concurrent_jobs=0: expected a whole number from 1" in json.dumps(served.status())


def evaluation(episodes: int) -> list[str]:
    """The command of an ad-hoc evaluation, as it is given to `ray job submit`."""
    command = [sys.executable, "-m", "orchestrator.cli", "eval", str(EXAMPLES / "cartpole")]
    return [*command, "--benchmark", "gymnasium/CartPole-v1", "--episodes", str(episodes)]


def test_an_ad_hoc_evaluation_is_a_ray_job_with_its_log_and_its_exit_code(head: RayHead) -> None:
    submit = ("job", "submit", "--address", head.dashboard, "--")

    done = head.ray(*submit, *evaluation(2))
    refused = head.ray(*submit, *evaluation(2), "--set", "max_concurrent_jobs=0")

    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"CartPole-v1\s+2\s", done.stdout)
    assert refused.returncode != 0
    assert "max_concurrent_jobs='0': expected a whole number" in refused.stdout + refused.stderr


def test_stopping_the_ray_job_cancels_its_evaluation(head: RayHead) -> None:
    submit = ("job", "submit", "--address", head.dashboard, "--no-wait", "--submission-id", "adhoc", "--")
    assert head.ray(*submit, *evaluation(100_000)).returncode == 0
    wait_until(lambda: job_statuses(head) == ["RUNNING"], "a running job", PATIENCE_SECONDS)

    stopped = head.ray("job", "stop", "--address", head.dashboard, "adhoc")

    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    wait_until(lambda: job_statuses(head) == ["CANCELLED"], "its cancellation", PATIENCE_SECONDS)


def job_statuses(head: RayHead) -> list[str]:
    """As the command line lists them; nothing while there is no database yet."""
    listed = head.orchestrator("jobs", "--json")
    return [job["status"] for job in json.loads(listed.stdout)["jobs"]] if listed.stdout else []


async def test_a_cluster_without_nodes_of_the_control_plane_is_refused_in_place_of_waiting(
    head: RayHead, scratch: Path
) -> None:
    refused = head.orchestrator(
        *("eval", EXAMPLES / "cartpole", "--benchmark", "gymnasium/CartPole-v1"),
        *("--set", "control_resource=nowhere"),
    )

    assert refused.returncode == 2
    assert "no node of the Ray cluster has the resource 'nowhere'" in refused.stderr


async def test_down_stops_a_control_plane_that_nobody_looks_after(
    head: RayHead, scratch: Path, data_dir: Path
) -> None:
    served = Served(head, scratch)
    served.deploy()
    served.until_ready()
    os.kill(served.replica().pid, signal.SIGKILL)
    for process in processes_naming("SERVE_CONTROLLER_ACTOR"):
        os.kill(process.pid, signal.SIGKILL)

    down = head.orchestrator("down")

    assert down.returncode == 0, down.stderr
    assert "stops the control plane of 127.0.0.1" in down.stderr
