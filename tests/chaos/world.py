"""Everything that a chaos run works on: Postgres, Ray, the API server's double, and two installations."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import psutil
import yaml

from orchestrator.adapters.postgres.embedded import embedded_postgres
from orchestrator.adapters.postgres.migrate import migrate
from orchestrator.adapters.postgres.server_files import ServerFiles
from tests.archive_server import ArchiveServer, make_certificate, serving
from tests.chaos.audit import TRIGGERS
from tests.chaos.clients import Line, Validator
from tests.chaos.cluster import ChaosCluster
from tests.chaos.jobs import ChaosJob
from tests.kubernetes.adapters import variables_for
from tests.kubernetes_double import ApiDouble
from tests.kubernetes_double.fault_proxy import Chance, FaultProxy

ROOT = Path(__file__).resolve().parents[2]
READY_SECONDS = 180.0
COMMAND_PAUSE_SECONDS = 2.0
UNFINISHED_AT_MOST = 4  # jobs of an installation that wait or run, while faults go on

SETTINGS = {
    "LEASE_SECONDS": "9",
    "RECONCILE_INTERVAL_SECONDS": "1",
    "MAX_CONCURRENT_JOBS": "2",
    "CPUS_PER_WORKER": "0.3",
    "DRAIN_SECONDS": "1",
    "STEP_TIMEOUT_SECONDS": "20",
    # Far more is done to these jobs than a job must stand.
    "MAX_CLAIMS_WITHOUT_PROGRESS": "1000",
    "MAX_CONTAINERS_PER_JOB": "1000",
    "ARCHIVE_PRIVATE_HOSTS": "localhost",
}


@dataclass
class Installation:
    """A control plane on a database of its own, and its validator."""

    name: str
    dsn: str
    directory: Path
    first_job: int
    variables: Mapping[str, str]
    archives: ArchiveServer
    validator: Validator = field(init=False)
    line: Line = field(init=False)  # for whoever looks into the database from outside
    jobs: dict[int, ChaosJob] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.validator = Validator(self.name, self.dsn)
        self.line = Line(self.dsn)

    @property
    def unfinished(self) -> list[ChaosJob]:
        """Without a result so far, oldest first."""
        return [job for job in self.jobs.values() if job.job_id not in self.validator.results]

    async def add_job(self) -> None:
        job = await asyncio.to_thread(ChaosJob.make, self.first_job + len(self.jobs), self.directory / "jobs")
        url = self.archives.answer(f"/{job.job_id}.tar.gz", job.packed.path.read_bytes())
        self.jobs[job.job_id] = job
        await self.validator.enqueue(job.message(url))

    async def keep_busy(self, at_least: int, enough: asyncio.Event) -> None:
        """Enqueue so many jobs, and go on until `enough`; a few wait at any time."""
        while len(self.jobs) < at_least or not enough.is_set():
            if len(self.unfinished) < UNFINISHED_AT_MOST:
                await self.add_job()
            else:
                await asyncio.sleep(0.1)

    async def seen_at(self) -> float:
        """When its consumer last went over all jobs, in seconds since the epoch."""
        query = "SELECT coalesce(extract(epoch FROM consumer_seen_at), 0)::float8 FROM installation"
        return float(await self.line.ask(lambda connection: connection.fetchval(query)))

    async def committed_after(self, at: float, job_id: int | None = None) -> bool:
        """Whether an outcome, or an end, was written after this time (of the job, if one is named)."""
        query = """SELECT EXISTS (SELECT FROM chaos_writes
                   WHERE at > to_timestamp($1) AND ($2::bigint IS NULL OR job_id = $2))"""
        return bool(await self.line.ask(lambda connection: connection.fetchval(query, at, job_id)))


class KeptCommand:
    """`orchestrator up`, started again whenever it ends, as a service manager would."""

    def __init__(self, variables: Mapping[str, str], log: Path) -> None:
        self._variables = variables
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self.starts = 0

    @property
    def pid(self) -> int | None:
        running = self._process is not None and self._process.poll() is None
        return self._process.pid if running and self._process is not None else None

    async def keep(self) -> None:
        while True:
            if self.pid is None:
                self.starts += 1
                self._process = await asyncio.to_thread(self._start)
            await asyncio.sleep(COMMAND_PAUSE_SECONDS)

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "orchestrator.cli", "up"],
                stdout=log,
                stderr=log,
                env=dict(os.environ) | dict(self._variables),
                start_new_session=True,
            )

    async def stop(self) -> None:
        """Ask it to end, and wait for it."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.to_thread(self._process.wait, 60)
        except subprocess.TimeoutExpired:
            self._process.kill()


@dataclass
class World:
    """What a run works on, ready for jobs."""

    directory: Path
    postgres: ServerFiles
    cluster: ChaosCluster
    double: ApiDouble
    api: FaultProxy
    installations: tuple[Installation, Installation]
    command: KeptCommand
    http_url: str

    @property
    def logs(self) -> Path:
        return self.directory / "logs"

    def http_status(self, path: str) -> int:
        """The code of the answer to a GET of the served installation; 0 where there is none."""
        try:
            with urllib.request.urlopen(self.http_url + path, timeout=2) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def postgres_processes(self) -> list[psutil.Process]:
        """The server, and its sessions."""
        state = self.postgres.read_state()
        if state is None:
            return []
        with suppress(psutil.Error):
            server = psutil.Process(state.pid)
            return [server, *server.children(recursive=True)]
        return []


@asynccontextmanager
async def open_world(seed: int, failpoints: str) -> AsyncIterator[World]:
    """Everything started, and gone after the block."""
    directory = Path(tempfile.mkdtemp(prefix="orc-chaos-", dir="/tmp"))
    directory.chmod(0o755)
    (directory / "logs").mkdir()
    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        certificate = make_certificate(directory)
        archives = stack.enter_context(serving(certificate.context()))
        data = directory / "postgres"
        server = await stack.enter_async_context(embedded_postgres(data))
        double = await stack.enter_async_context(ApiDouble())
        api = await stack.enter_async_context(FaultProxy(double.url, Chance(seed, 0.01), hang_seconds=10))
        common = {f"ORCHESTRATOR_{name}": value for name, value in SETTINGS.items()} | {
            "ORCHESTRATOR_ARCHIVE_CA_FILE": str(certificate.file)
        }
        if failpoints:
            common["ORCHESTRATOR_FAILPOINTS"] = failpoints
        cluster = await asyncio.to_thread(ChaosCluster)
        stack.push_async_callback(asyncio.to_thread, cluster.close)
        kubeconfig = double.write_kubeconfig(directory / "kubeconfig", api.url)
        in_pods = variables_for(kubeconfig) | {
            "ORCHESTRATOR_KUBERNETES_CONFIG_FILE": str(kubeconfig),  # also for the nodes
            "ORCHESTRATOR_CONTAINERS": "kubernetes",
        }
        installations = (
            await _install(server.dsn, directory, "served", 1, common, archives),
            await _install(
                server.dsn,
                directory,
                "commanded",
                100_001,
                common | in_pods,
                archives,
            ),
        )
        for installation in installations:
            stack.push_async_callback(installation.validator.close)
            stack.push_async_callback(installation.line.close)
        command = KeptCommand(
            {**installations[1].variables, "RAY_ADDRESS": cluster.address}, directory / "logs" / "up"
        )
        stack.push_async_callback(command.stop)
        keeping = asyncio.create_task(command.keep())
        stack.push_async_callback(_end, keeping)
        url = await asyncio.to_thread(_serve, cluster, installations[0], directory)
        world = World(directory, ServerFiles(data), cluster, double, api, installations, command, url)
        await _until_both_consume(world)
        yield world


async def _install(
    server: str,
    directory: Path,
    name: str,
    first_job: int,
    variables: Mapping[str, str],
    archives: ArchiveServer,
) -> Installation:
    dsn = urlsplit(server)._replace(path=f"/{name}").geturl()
    connection = await asyncpg.connect(server)
    await connection.execute(f"CREATE DATABASE {name}")
    await connection.close()
    await migrate(dsn)
    connection = await asyncpg.connect(dsn)
    await connection.execute(TRIGGERS)
    await connection.close()
    data = directory / name
    own = {"ORCHESTRATOR_DATABASE_URL": dsn, "ORCHESTRATOR_DATA_DIR": str(data / "data")}
    return Installation(name, dsn, data, first_job, {**variables, **own}, archives)


def _serve(cluster: ChaosCluster, installation: Installation, directory: Path) -> str:
    """`serve deploy` of the file as it is shipped, with variables of its own; the API's URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = yaml.safe_load((ROOT / "ray_app.yaml").read_text())
    config["http_options"] = {"port": port, "host": "127.0.0.1"}
    config["applications"][0]["runtime_env"] = {"env_vars": dict(installation.variables)}
    file = directory / "ray_app.yaml"
    file.write_text(yaml.safe_dump(config))
    until = time.monotonic() + READY_SECONDS
    command = [sys.executable, "-m", "ray.serve.scripts", "deploy", str(file), "-a", cluster.dashboard]
    while True:  # the dashboard may not listen yet
        done = subprocess.run(command, capture_output=True, text=True, timeout=READY_SECONDS, check=False)
        if done.returncode == 0:
            return f"http://127.0.0.1:{port}"
        if time.monotonic() > until:
            raise RuntimeError(done.stderr)
        time.sleep(1)


async def _until_both_consume(world: World) -> None:
    async with asyncio.timeout(READY_SECONDS):
        for installation in world.installations:
            while await installation.seen_at() == 0:
                await asyncio.sleep(0.5)
        while world.http_status("/healthz") != 200:
            await asyncio.sleep(0.5)


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
