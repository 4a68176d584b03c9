"""The whole path of a step (Ray worker, wire, policy, telemetry, database) against a loop without any."""

from __future__ import annotations

import asyncio
import importlib.util
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import asyncpg
import gymnasium
import numpy as np

from bench.floor import floor
from bench.rounds import Case, Target
from orchestrator.adapters.artifacts.pack import pack_directory
from orchestrator.adapters.benchmarks.registry import load_benchmark
from orchestrator.adapters.postgres.embedded import embedded_postgres
from orchestrator.adapters.postgres.migrate import migrate
from orchestrator.adapters.postgres.pool import open_pool
from orchestrator.domain.messages import EvalJobMessage
from orchestrator.runtime import control_plane
from orchestrator.settings import Settings
from orchestrator.stores import job_store

Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
JOB_SECONDS = 300.0
FLOOR_TRIPS = 3000


@dataclass(frozen=True, slots=True)
class Benchmark:
    name: str
    task: str
    submission: str
    episodes: int
    config: dict[str, Any]
    request_bytes: int  # about those of an observation on the wire
    reply_bytes: int = 64


CARTPOLE = Benchmark("gymnasium/CartPole-v1", "CartPole-v1", "cartpole", 20, {}, 96)
REACH = Benchmark("metaworld/reach-v3", "reach-v3", "metaworld_experts", 40, {}, 400)


def _agent(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"agent_of_{file.parent.name}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Agent()


def measure(rounds: int) -> list[Case]:
    return asyncio.run(_measure(rounds))


async def _measure(rounds: int) -> list[Case]:
    cases = []
    with tempfile.TemporaryDirectory(prefix="orc-bench-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        settings = Settings(data_dir=directory / "data")
        async with embedded_postgres(directory / "data") as database:
            await migrate(database.dsn)
            async with (
                open_pool(database, application_name="bench", max_size=2) as pool,
                control_plane(settings, database, cpus=2),
            ):
                for benchmark in (CARTPOLE, REACH):
                    bench = PathBench(pool, settings, directory, benchmark)
                    cases += await bench.measure(rounds)
    return cases


class PathBench:
    """Jobs of one benchmark with one worker, one after the other."""

    _jobs = 0

    def __init__(self, pool: Pool, settings: Settings, directory: Path, benchmark: Benchmark) -> None:
        self._pool = pool
        self._store = job_store(pool, settings)
        self._packed = pack_directory(EXAMPLES / benchmark.submission, directory / "archives")
        self._benchmark = benchmark
        provider, _, name = benchmark.name.partition("/")
        self._environment = load_benchmark(provider, name, benchmark.config, None).make(benchmark.task)
        self._agent = _agent(EXAMPLES / benchmark.submission / "agent.py")

    async def measure(self, rounds: int) -> list[Case]:
        task = self._benchmark.task
        beyond = Case(f"{task}: a step beyond direct, telemetry of each", "µs", "floor", Target(at_most=4))
        rate = Case(f"{task}: steps of one worker", "steps/s", "direct", Target(at_least=0.95))
        with floor(self._benchmark.request_bytes, self._benchmark.reply_bytes) as reference:
            await self._step_microseconds()  # warm
            for _ in range(rounds):
                trip = reference.round_trips(FLOOR_TRIPS)
                ours, seeds = await self._step_microseconds()
                direct = await asyncio.to_thread(self._direct_microseconds, seeds)
                beyond.add(ours - direct, trip)
                rate.add(1e6 / ours, 1e6 / direct)
        # CartPole's own step takes a few microseconds: any wire is many times that.
        return [beyond] if self._benchmark is CARTPOLE else [beyond, rate]

    async def _step_microseconds(self) -> tuple[float, list[int]]:
        """Of a job, from its first episode's beginning to its last one's end; and the seeds it played."""
        PathBench._jobs += 1
        provider, _, name = self._benchmark.name.partition("/")
        job = EvalJobMessage.model_validate(
            {
                "job_id": PathBench._jobs,
                "env_provider": provider,
                "benchmark_name": name,
                "artifact_url": f"file://{self._packed.path}",
                "artifact_sha256": self._packed.sha256,
                "artifact_size_bytes": self._packed.size_bytes,
                "resources": {"workers": 1},
                "config": {
                    "seed": 7,
                    "episodes_per_task": self._benchmark.episodes,
                    "step_log_interval": 1,
                    **self._benchmark.config,
                },
            }
        )
        await self._store.insert(job, enqueue=True, local=True)
        async with asyncio.timeout(JOB_SECONDS):
            while (result := await self._store.result(job.job_id)) is None:
                await asyncio.sleep(0.1)
        if result.status != "COMPLETED":
            raise RuntimeError(f"job {job.job_id} ended {result.status}: {result.error}")
        rows = await self._pool.fetch(
            """SELECT seed, steps, started_at, ended_at FROM episodes
               WHERE job_id = $1 ORDER BY started_at""",
            job.job_id,
        )
        seconds = (rows[-1]["ended_at"] - rows[0]["started_at"]).total_seconds()
        return seconds / sum(row["steps"] for row in rows) * 1e6, [row["seed"] for row in rows]

    def _direct_microseconds(self, seeds: list[int]) -> float:
        """The same environment and the same policy in this process, nothing between them."""
        environment, act = self._environment, self._agent.act
        space, steps, began = environment.action_space, 0, time.perf_counter()
        for seed in seeds:
            observation, over = environment.reset(seed), False
            while not over:
                seen = observation["observation"] if observation.keys() == {"observation"} else observation
                action = act(seen)
                if isinstance(space, gymnasium.spaces.Box):
                    action = np.clip(np.asarray(action, space.dtype), space.low, space.high)
                result = environment.step(action)
                observation, over = result.observation, result.terminated or result.truncated
                steps += 1
        return (time.perf_counter() - began) / steps * 1e6
