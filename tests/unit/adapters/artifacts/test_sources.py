"""Archives in local files, and in places that fsspec reads."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem

from orchestrator.adapters.artifacts.fetch import FetchLimits, fetch_archive
from orchestrator.domain.errors import InfrastructureError, SubmissionError, UsageError
from orchestrator.domain.messages import EvalJobMessage

BODY = b"an archive" * 1000


def job(url: str) -> EvalJobMessage:
    return EvalJobMessage(
        job_id=1, submission_id="s", env_provider="gymnasium", benchmark_name="CartPole-v1", artifact_url=url
    )


def limits(*schemes: str, **changes: Any) -> FetchLimits:
    return replace(FetchLimits(100_000, 20.0, schemes), **changes)


class NotAnOSError(Exception):
    """Of the kind that botocore raises."""


class Places(AbstractFileSystem):
    """A backend whose paths say how it fails."""

    protocol = "places"
    closed = threading.Event()

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if path.endswith("botocore"):
            raise NotAnOSError("GET https://example.org/?token")
        if path.endswith("network"):
            raise ConnectionResetError("reset")
        if path.endswith("timeout"):
            raise TimeoutError
        if path.endswith("denied"):
            raise PermissionError("no")
        return Endless()


class Endless:
    """One byte at a time, for ever."""

    def read(self, count: int) -> bytes:
        return b"x"

    def __enter__(self) -> Endless:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        Places.closed.set()


@pytest.fixture
def places() -> None:
    Places.closed.clear()
    fsspec.register_implementation("places", Places, clobber=True)


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()


# ----------------------------------------------------------------------------------------------- files


async def test_a_local_file_is_read_where_the_scheme_is_allowed(tmp_path: Path) -> None:
    source = tmp_path / "ä b%41?.tar.gz"
    source.write_bytes(BODY)
    url = f"file://{quote(str(source))}"

    digest = await fetch_archive(job(url), tmp_path / "archive", limits("file"))
    with pytest.raises(SubmissionError, match="may not be fetched by file: allowed are https"):
        await fetch_archive(job(url), tmp_path / "other", limits("https"))

    assert (tmp_path / "archive").read_bytes() == BODY
    assert digest == hashlib.sha256(BODY).hexdigest()
    assert not (tmp_path / "other").exists()


async def test_a_file_that_is_missing_or_no_plain_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    for url, words in [
        (f"file://{tmp_path}/missing", "missing cannot be read: No such file"),
        (f"file://{tmp_path}", r"no plain file|Is a directory"),
        (f"file://{tmp_path}/pipe", "pipe is no plain file"),
        ("file:///dev/zero", "/dev/zero is no plain file"),
        ("file://elsewhere/a", "malformed: a file has no host"),
        ("file:///a%00b", "malformed: its path holds a null character"),
    ]:
        with pytest.raises(SubmissionError, match=words):
            await fetch_archive(job(url), tmp_path / "archive", limits("file"))


async def test_a_file_that_is_too_large_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(BODY)

    with pytest.raises(SubmissionError, match="larger than 100 bytes"):
        await fetch_archive(job(f"file://{tmp_path}/a"), tmp_path / "archive", limits("file", max_bytes=100))


# ---------------------------------------------------------------------------------------------- fsspec


async def test_a_backend_of_fsspec_is_read_where_its_scheme_is_allowed(
    tmp_path: Path, memory: MemoryFileSystem
) -> None:
    memory.pipe_file("/bucket/a", BODY)

    digest = await fetch_archive(job("memory://bucket/a"), tmp_path / "archive", limits("memory"))

    assert (tmp_path / "archive").read_bytes() == BODY
    assert digest == hashlib.sha256(BODY).hexdigest()


async def test_buckets_are_held_to_the_list_of_hosts(tmp_path: Path, memory: MemoryFileSystem) -> None:
    memory.pipe_file("/bucket/a", BODY)

    await fetch_archive(job("memory://bucket/a"), tmp_path / "archive", limits("memory", hosts=("bucket",)))
    with pytest.raises(SubmissionError, match="may not be fetched from bucket: allowed are other"):
        await fetch_archive(job("memory://bucket/a"), tmp_path / "b", limits("memory", hosts=("other",)))


async def test_a_missing_object_is_the_submissions_fault(tmp_path: Path, memory: MemoryFileSystem) -> None:
    with pytest.raises(SubmissionError, match=r"there is no archive at memory://bucket/a that may be read$"):
        await fetch_archive(job("memory://bucket/a?token"), tmp_path / "archive", limits("memory"))


@pytest.mark.parametrize("url", ["memory://bucket/a::file:///etc/passwd", "memory::file:///etc/passwd"])
async def test_chained_file_systems_are_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(SubmissionError, match=r"chains several places|malformed"):
        await fetch_archive(job(url), tmp_path / "archive", limits("memory", "file"))


@pytest.mark.skipif(importlib.util.find_spec("s3fs") is not None, reason="s3fs is installed")
async def test_a_backend_that_is_not_installed_is_named_and_not_tried_again(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="s3 archives need another package here: Install s3fs"):
        await fetch_archive(job("s3://bucket/a"), tmp_path / "archive", limits("s3"))


async def test_a_scheme_that_no_backend_knows_is_a_matter_of_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no installed package reads nowhere archives"):
        await fetch_archive(job("nowhere://bucket/a"), tmp_path / "archive", limits("nowhere"))


@pytest.mark.parametrize(
    ("path", "error", "words"),
    [
        ("botocore", InfrastructureError, "places://bucket/botocore could not be fetched: NotAnOSError"),
        ("network", InfrastructureError, "could not be fetched: ConnectionResetError"),
        ("timeout", InfrastructureError, "could not be fetched: TimeoutError"),
        ("denied", SubmissionError, "there is no archive at places://bucket/denied that may be read"),
    ],
)
@pytest.mark.usefixtures("places")
async def test_errors_of_a_backend_are_told_apart_and_show_no_secrets(
    tmp_path: Path, path: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as raised:
        await fetch_archive(job(f"places://bucket/{path}"), tmp_path / "archive", limits("places"))

    assert "token" not in str(raised.value)


@pytest.mark.usefixtures("places")
async def test_a_thread_that_reads_too_long_ends_with_its_deadline(tmp_path: Path) -> None:
    with pytest.raises(SubmissionError, match=r"not there within 0\.2 s"):
        await fetch_archive(
            job("places://bucket/endless"),
            tmp_path / "archive",
            limits("places", timeout_seconds=0.2, max_bytes=2**40),
        )

    assert await asyncio.to_thread(Places.closed.wait, 10)
    assert list(tmp_path.iterdir()) == []
