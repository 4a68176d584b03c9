"""`python -m tests.soak --minutes 20`: small jobs without a pause, and what that does to each process."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from orchestrator.adapters.artifacts.pack import PackedArchive, pack_directory
from orchestrator.adapters.postgres.embedded import embedded_postgres
from orchestrator.adapters.postgres.migrate import migrate
from tests.archive_server import make_certificate, serving
from tests.chaos.clients import Line, Validator
from tests.soak.growth import Sample, growths, table
from tests.soak.processes import OURS, sampled
from tests.soak.remains import Remains, remains

CARTPOLE = Path(__file__).resolve().parents[2] / "examples" / "cartpole"
SAMPLE_SECONDS = 3.0
WAITING_JOBS = 6
READY_SECONDS = 180.0
ENDING_SECONDS = 120.0


class Soak:
    """Jobs that flow, and samples of who serves them."""

    def __init__(
        self, validator: Validator, packed: PackedArchive, url: str, command: psutil.Process, directory: Path
    ) -> None:
        self.samples: list[Sample] = []
        self._validator = validator
        self._packed = packed
        self._url = url
        self._command = command
        self._directory = directory
        self._submitted = 0

    async def feed(self) -> None:
        """Some jobs wait at any time."""
        while True:
            if self._submitted - len(self._validator.results) < WAITING_JOBS:
                self._submitted += 1
                await self._validator.enqueue(self._job(self._submitted))
                self._validator.received.clear()  # who holds what is looked at elsewhere
            else:
                await asyncio.sleep(0.05)

    def _job(self, job_id: int) -> dict[str, object]:
        return {
            "job_id": job_id,
            "env_provider": "gymnasium",
            "benchmark_name": "CartPole-v1",
            "artifact_url": self._url,
            "artifact_sha256": self._packed.sha256,
            "artifact_size_bytes": self._packed.size_bytes,
            "config": {"episodes_per_task": 2, "max_episode_steps": 50, "step_log_interval": 1},
        }

    async def watch(self) -> None:
        while True:
            await asyncio.to_thread(self._sample)
            await asyncio.sleep(SAMPLE_SECONDS)

    def _sample(self) -> None:
        self.samples += sampled(self._command, self._directory, len(self._validator.results))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0, help="how long; default: %(default)s")
    return asyncio.run(_soak(parser.parse_args(arguments).minutes))


async def _soak(minutes: float) -> int:
    directory = Path(tempfile.mkdtemp(prefix="orc-soak-", dir="/tmp"))
    directory.chmod(0o755)
    certificate = make_certificate(directory)
    try:
        with serving(certificate.context()) as archives:
            packed = pack_directory(CARTPOLE, directory / "archives")
            url = archives.answer("/submission.tar.gz", packed.path.read_bytes())
            async with embedded_postgres(directory / "data") as database:
                await migrate(database.dsn)
                command = _start(database.dsn, directory, certificate.file)
                try:
                    await _until_ready(command, directory / "log")
                    return await _run(minutes, database.dsn, packed, url, command, directory)
                finally:
                    await asyncio.to_thread(_stop, command)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


async def _run(
    minutes: float,
    dsn: str,
    packed: PackedArchive,
    url: str,
    command: subprocess.Popen[bytes],
    directory: Path,
) -> int:
    validator, line = Validator("soak", dsn), Line(dsn)
    soak = Soak(validator, packed, url, psutil.Process(command.pid), directory)
    feeding = asyncio.create_task(soak.feed())
    others = [asyncio.create_task(task) for task in (validator.consume(), soak.watch())]
    began = time.monotonic()
    try:
        while (left := began + 60 * minutes - time.monotonic()) > 0:
            await asyncio.sleep(min(60.0, left))
            print(f"{(time.monotonic() - began) / 60:.0f} min: {len(validator.results)} jobs", flush=True)
            for task in (feeding, *others):
                if task.done():
                    task.result()
        feeding.cancel()
        missing = await _missing_results(validator)
        left_over = await remains(line, directory / "containers", len(validator.results))
    finally:
        for task in (feeding, *others):
            task.cancel()
        await asyncio.gather(feeding, *others, return_exceptions=True)
        await validator.close()
        await line.close()
    return _report(soak.samples, len(validator.results), missing, left_over)


async def _missing_results(validator: Validator) -> int:
    """How many jobs have no result, after a time in which all should."""
    until = time.monotonic() + ENDING_SECONDS
    while (missing := len(validator.acknowledged - validator.results)) and time.monotonic() < until:
        await asyncio.sleep(0.5)
    return missing


def _report(samples: Sequence[Sample], jobs: int, missing: int, left_over: Remains) -> int:
    found = growths(samples)
    print("\n".join([*table(found, OURS.__contains__), *left_over.lines]))
    faults = [f"{missing} results missing"] if missing else []
    faults += left_over.faults
    faults += [str(each) for each in found if each.role in OURS and not each.is_flat]
    faults += [f"{role}: too few samples" for role in sorted(OURS - {each.role for each in found})]
    for fault in faults:
        print(f"FAULT: {fault}")
    print(f"{jobs} jobs; {'flat' if not faults else 'not flat'}", flush=True)
    return 1 if faults else 0


def _start(dsn: str, directory: Path, authority: Path) -> subprocess.Popen[bytes]:
    own = {
        "ORCHESTRATOR_DATABASE_URL": dsn,
        "ORCHESTRATOR_DATA_DIR": str(directory / "containers"),
        "ORCHESTRATOR_ARCHIVE_CA_FILE": str(authority),
        "ORCHESTRATOR_ARCHIVE_PRIVATE_HOSTS": "localhost",
        "ORCHESTRATOR_CPUS_PER_WORKER": "0.5",
        "ORCHESTRATOR_MAX_CONCURRENT_JOBS": "3",
    }
    with (directory / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "orchestrator.cli", "up"],
            stdout=log,
            stderr=log,
            env=dict(os.environ) | own,
            start_new_session=True,
        )


async def _until_ready(command: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + READY_SECONDS
    while not re.search("ready:", log.read_text()):
        if command.poll() is not None or time.monotonic() > until:
            raise RuntimeError(log.read_text())
        await asyncio.sleep(0.2)


def _stop(command: subprocess.Popen[bytes]) -> None:
    command.send_signal(signal.SIGTERM)
    try:
        command.wait(90)
    except subprocess.TimeoutExpired:
        command.kill()


if __name__ == "__main__":
    sys.exit(main())
