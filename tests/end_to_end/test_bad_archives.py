"""Archives that cannot be evaluated: all of them at once on one control plane, good ones among them."""

from __future__ import annotations

import asyncio
import hashlib
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from orchestrator.adapters.postgres.pool import Database
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.messages import EvalJobMessage, EvalResultMessage
from tests.archive_server import ArchiveServer, make_certificate, serving
from tests.conftest import installed_database
from tests.end_to_end.conftest import EXAMPLES, Plane, running_plane
from tests.end_to_end.loopback_recipe import LoopbackRecipe
from tests.end_to_end.shown_results import shown
from tests.golden_texts import check_golden
from tests.hostile_archives import member, tar_gz, write_many_files, write_zeros

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

FETCH_SECONDS = 10.0

Prepare = Callable[["Ground"], dict[str, Any]]


@dataclass
class Ground:
    """Where the archives of these jobs lie: files, and a server that supervisors can reach."""

    plane: Plane
    directory: Path
    server: ArchiveServer

    def file(self, content: bytes | Callable[[Path], None]) -> dict[str, Any]:
        """The fields of a job whose archive is a local file."""
        path = self.directory / f"{uuid4().hex}.tar.gz"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content(path)
        return {"artifact_url": f"file://{path}", "artifact_size_bytes": path.stat().st_size}


def drip(server: ArchiveServer, path: str) -> str:
    """A byte now and then, for longer than anybody waits."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        while not server.stopping.wait(0.2):
            handler.wfile.write(b"x")

    server.answers[path] = answer
    return server.url(path)


def at(url: str) -> dict[str, Any]:
    return {"artifact_url": url}


def linked(kind: bytes) -> bytes:
    return tar_gz(member("weights.npz", type=kind, linkname="/etc/passwd"))


SOUND = tar_gz()

BAD: dict[str, Prepare] = {
    "wrong_sha256": lambda ground: ground.file(SOUND) | {"artifact_sha256": "0" * 64},
    "wrong_size": lambda ground: ground.file(bytes(10_240)) | {"artifact_size_bytes": 7},
    "truncated": lambda ground: ground.file(tar_gz(member("weights.npz", bytes(range(256)) * 40))[:-40]),
    "not_an_archive": lambda ground: ground.file(b"<html>Please log in</html>\n" * 40),
    "zip_slip": lambda ground: ground.file(tar_gz(member("../../.bashrc", b"x"))),
    "absolute_path": lambda ground: ground.file(tar_gz(member("/etc/cron.d/x", b"x"))),
    "symlink_out": lambda ground: ground.file(linked(tarfile.SYMTYPE)),
    "hardlink_out": lambda ground: ground.file(linked(tarfile.LNKTYPE)),
    "device_file": lambda ground: ground.file(tar_gz(member("disk", type=tarfile.BLKTYPE, devmajor=8))),
    "ten_gigabytes_of_zeros": lambda ground: ground.file(write_zeros),
    "a_million_files": lambda ground: ground.file(write_many_files),
    "expired_url": lambda ground: {
        "artifact_url": "https://archives.example/a.tar.gz",
        "artifact_expires_at": "2026-01-02T03:04:05Z",
    },
    "expired_signature": lambda ground: at(ground.server.answer("/a.tar.gz?Signature=secret", status=403)),
    "not_found": lambda ground: at(ground.server.answer("/b.tar.gz", status=404)),
    "redirect_to_a_private_address": lambda ground: at(
        ground.server.redirect("/c.tar.gz", "https://169.254.169.254/latest/meta-data/")
    ),
    "slow_server": lambda ground: at(drip(ground.server, "/d.tar.gz")),
    "no_url": lambda ground: {},
    "malformed_url": lambda ground: {"artifact_url": "https://[archives.example/a.tar.gz"},
    # Of jobs that did not come from the local command line:
    "file_of_a_stranger": lambda ground: ground.file(SOUND),
    "policy_server_of_a_stranger": lambda ground: {"artifact_url": "ws://10.0.0.1:8000"},
}
STRANGERS = ("file_of_a_stranger", "policy_server_of_a_stranger")
GOOD: dict[str, Prepare] = {
    "good_file": lambda ground: {},
    "good_url": lambda ground: at(ground.server.answer("/good.tar.gz", good_archive(ground.plane))),
}


def good_archive(plane: Plane) -> bytes:
    return Path(str(plane.job(EXAMPLES / "cartpole").artifact_url).removeprefix("file://")).read_bytes()


def make_job(ground: Ground, case: str) -> EvalJobMessage:
    job = ground.plane.job(EXAMPLES / "cartpole", config={"episodes_per_task": 1, "max_episode_steps": 5})
    fields = job.model_dump(mode="json", exclude_none=True)
    if case != "good_file":
        for name in ("artifact_url", "artifact_sha256", "artifact_size_bytes"):
            del fields[name]
    return EvalJobMessage.model_validate(fields | (BAD | GOOD)[case](ground))


async def evaluate_all(ground: Ground) -> dict[str, EvalResultMessage]:
    """All jobs at once, the good ones last; several of them run at a time."""
    plane = ground.plane
    jobs = {case: make_job(ground, case) for case in (*BAD, *GOOD)}
    for case, job in jobs.items():
        await plane.store.insert(job, enqueue=True, local=case not in STRANGERS)
    results = {case: await plane.result(job) for case, job in jobs.items()}
    assert await plane.pool.fetchval("SELECT count(*) FROM containers") == 0
    tried_again = await plane.pool.fetch("SELECT job_id, epoch, error FROM jobs WHERE epoch > 1")
    assert tried_again == []
    return results


@pytest.fixture(scope="module")
def results(
    ray_cluster: None,
    postgres_server: Database,
    migrated_template: Database,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, EvalResultMessage]]:
    """What came of each job, by its case."""
    directory = tmp_path_factory.mktemp("archives")
    certificate = make_certificate(directory)
    recipe = partial(LoopbackRecipe, ca_file=str(certificate.file))
    with (
        installed_database(postgres_server) as database,
        serving(certificate.context()) as server,
        asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner,
    ):

        async def run() -> dict[str, EvalResultMessage]:
            settings = {"max_concurrent_jobs": 3, "archive_fetch_timeout_seconds": FETCH_SECONDS}
            async with running_plane(database, directory, recipe, **settings) as plane:
                return await evaluate_all(Ground(plane, directory, server))

        yield runner.run(run())


@pytest.mark.parametrize("case", BAD)
def test_a_bad_archive_fails_its_job_with_a_message_that_helps(
    results: dict[str, EvalResultMessage], case: str
) -> None:
    result = results[case]

    assert result.status is JobStatus.FAILED
    text = shown(result)
    assert "secret" not in text
    digest = hashlib.sha256(SOUND).hexdigest()  # depends on the time
    text = re.sub(
        r"more than \d+ bytes", "more than N bytes", text.replace(digest, "<sha256 of the archive>")
    )
    check_golden("bad_archives", case, text)


@pytest.mark.parametrize("case", GOOD)
def test_good_ones_among_them_complete(results: dict[str, EvalResultMessage], case: str) -> None:
    assert (results[case].status, results[case].total_episodes) == (JobStatus.COMPLETED, 1)
