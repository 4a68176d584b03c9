"""Packing a submission: the same content gives the same archive, and what cannot be packed is named."""

from __future__ import annotations

import bz2
import gzip
import io
import os
import shutil
import socket
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest

from orchestrator.adapters.artifacts.contents import survey
from orchestrator.adapters.artifacts.pack import existing_archive, pack_directory
from orchestrator.domain.errors import InfrastructureError, UsageError
from orchestrator.submission.archive import unpack

NOBODY = 65534


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_submission(tmp_path / "submission")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def make_submission(directory: Path) -> Path:
    (directory / "weights").mkdir(parents=True)
    (directory / "agent.py").write_text("class Agent: ...\n")
    (directory / "weights" / "large.bin").write_bytes(bytes(range(256)) * 8192)
    (directory / "weights-of-old").write_text("")
    (directory / "run.sh").write_text("#!/bin/sh\n")
    (directory / "run.sh").chmod(0o755)
    return directory


def members(archive: Path) -> dict[str, int]:
    with tarfile.open(archive) as opened:
        return {member.name: member.mode for member in opened.getmembers()}


@contextmanager
def as_nobody() -> Iterator[Path]:
    """A directory of an ordinary user, and the rights of one: root may read everything."""
    directory = Path(tempfile.mkdtemp())
    try:
        if os.geteuid() == 0:
            os.chown(directory, NOBODY, NOBODY)
            os.seteuid(NOBODY)
            try:
                yield directory
            finally:
                os.seteuid(0)
        else:
            yield directory
    finally:
        for path in directory.rglob("*"):
            path.chmod(0o700)
        shutil.rmtree(directory)


def test_a_packed_submission_unpacks_to_the_same_files(source: Path, store: Path, tmp_path: Path) -> None:
    packed = pack_directory(source, store)

    root = unpack(packed.path, tmp_path / "unpacked")

    for path in source.rglob("*"):
        if path.is_file():
            assert (root / path.relative_to(source)).read_bytes() == path.read_bytes()
    assert members(packed.path)["run.sh"] == 0o755
    assert members(packed.path)["agent.py"] == 0o644


def test_the_digest_and_size_are_those_of_the_file(source: Path, store: Path) -> None:
    packed = pack_directory(source, store)

    content = packed.path.read_bytes()
    assert (packed.sha256, packed.size_bytes) == (sha256(content).hexdigest(), len(content))
    assert list(store.iterdir()) == [store / f"{packed.sha256}.tar.gz"]


def test_the_same_content_gives_the_same_archive(source: Path, store: Path, tmp_path: Path) -> None:
    first = pack_directory(source, store)
    copy = make_submission(tmp_path / "elsewhere" / "under another name")
    os.utime(copy / "agent.py", (1, 1))
    (copy / "agent.py").chmod(0o600)
    (copy / "weights" / "__pycache__").mkdir()
    (copy / "weights" / "__pycache__" / "x.cpython-311.pyc").write_bytes(b"x")
    (copy / "old.pyc").write_bytes(b"x")
    (copy / ".git").mkdir()

    second = pack_directory(copy, store)

    assert second == first
    assert len(list(store.iterdir())) == 1


def test_other_content_gives_another_archive(source: Path, store: Path) -> None:
    first = pack_directory(source, store)
    (source / "agent.py").write_text("class Agent: pass\n")

    assert pack_directory(source, store).sha256 != first.sha256


def test_an_archive_that_is_there_already_is_not_written_again(source: Path, store: Path) -> None:
    first = pack_directory(source, store)
    os.utime(first.path, (1, 1))
    before = first.path.stat()

    again = pack_directory(source, store).path.stat()

    assert again.st_ino == before.st_ino
    assert again.st_mtime > 1  # who clears up old archives sees that it is in use


def test_a_directory_without_an_agent_is_refused(tmp_path: Path, store: Path) -> None:
    (tmp_path / "empty").mkdir()

    with pytest.raises(UsageError, match=r"empty is no submission: it has neither agent\.py .* nor main\.py"):
        pack_directory(tmp_path / "empty", store)

    assert not store.exists()


@pytest.mark.parametrize("target", ["agent.py", "weights", "nowhere", "/etc/passwd"])
def test_links_are_left_out_and_named(source: Path, target: str) -> None:
    (source / "weights" / "link").symlink_to(target)

    contents = survey(source)

    assert "weights/link" not in contents.files
    (left_out,) = contents.left_out
    assert left_out.path == "weights/link"
    assert left_out.surprising
    assert "a symbolic link" in left_out.reason


def test_a_link_in_the_place_of_the_entry_point_is_refused(source: Path, store: Path) -> None:
    (source / "agent.py").rename(source / "real.py")
    (source / "agent.py").symlink_to("real.py")

    with pytest.raises(UsageError, match=r"agent\.py cannot be packed: it is a symbolic link"):
        pack_directory(source, store)

    assert not store.exists()


def test_pipes_sockets_and_empty_directories_are_left_out_and_named(source: Path) -> None:
    os.mkfifo(source / "pipe")
    (source / "out").mkdir()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(source / "socket"))

        left_out = {each.path: each.reason.partition(":")[0] for each in survey(source).left_out}

    assert left_out == {"out": "an empty directory", "pipe": "a pipe", "socket": "a socket"}


def test_what_tools_leave_behind_is_left_out_without_surprise(source: Path) -> None:
    for name in (".venv", "venv", ".git", ".idea"):
        (source / name).mkdir()
    (source / "mine" / "bin").mkdir(parents=True)
    (source / "mine" / "pyvenv.cfg").write_text("")
    for name in ("agent.py~", ".agent.py.swp", ".DS_Store", "old.pyc"):
        (source / name).write_text("x")
    (source / ".#agent.py").symlink_to("somebody@somewhere")

    contents = survey(source)

    assert sorted(contents.files) == ["agent.py", "run.sh", "weights-of-old", "weights/large.bin"]
    assert len(contents.left_out) == 10
    assert not any(each.surprising for each in contents.left_out)


def test_what_a_container_would_refuse_is_refused_here(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source / "/".join(["deep"] * 40)).mkdir(parents=True)
    (source / "/".join(["deep"] * 40) / "file").write_text("")
    with pytest.raises(UsageError, match="its path is too long or too deep"):
        survey(source)
    shutil.rmtree(source / "deep")

    with (source / "weights" / "large.bin").open("r+b") as file:
        file.truncate(9 * 2**30)  # a hole: it takes no disk
    with pytest.raises(UsageError, match=r"966\d+ bytes, above the limit of 8589934592"):
        survey(source)


def test_either_entry_point_makes_a_submission_and_of_both_agent_py_counts(source: Path) -> None:
    (source / "main.py").write_text("")
    assert survey(source).entry_point == "agent.py"

    (source / "agent.py").unlink()

    assert survey(source).entry_point == "main.py"


@pytest.mark.parametrize("name", ["a\\b", "a\nb", os.fsdecode(b"\xff")])
def test_names_that_the_other_side_would_refuse_are_refused(source: Path, store: Path, name: str) -> None:
    (source / name).write_text("")

    with pytest.raises(UsageError, match="cannot be packed: its name has") as refused:
        pack_directory(source, store)

    assert str(refused.value).isprintable()


def test_a_file_that_cannot_be_read_is_named_and_nothing_is_left() -> None:
    with as_nobody() as directory:
        source = make_submission(directory / "submission")
        (source / "weights" / "large.bin").chmod(0)

        with pytest.raises(UsageError, match=r"weights/large\.bin cannot be read: Permission denied"):
            pack_directory(source, directory / "store")

        assert list((directory / "store").iterdir()) == []


def test_a_directory_that_cannot_be_listed_is_named_and_not_left_out() -> None:
    with as_nobody() as directory:
        source = make_submission(directory / "submission")
        (source / "weights").chmod(0)

        with pytest.raises(UsageError, match="weights cannot be read: Permission denied"):
            pack_directory(source, directory / "store")


def test_a_store_inside_the_submission_is_refused(source: Path) -> None:
    with pytest.raises(UsageError, match="keep it outside of the submission"):
        pack_directory(source, source / "data" / "artifacts")


def test_a_store_that_cannot_be_written_is_our_fault(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(InfrastructureError, match="cannot be written to"):
        pack_directory(source, tmp_path / "file" / "store")


# ------------------------------------------------------------------------------ archives of somebody else


def tar_bytes() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("agent.py"))
    return buffer.getvalue()


def zip_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("agent.py", "")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content", [tar_bytes(), gzip.compress(tar_bytes()), zip_bytes()], ids=["tar", "tar.gz", "zip"]
)
def test_an_archive_of_somebody_else_is_taken_as_it_is(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "given.tar.gz").write_bytes(content)
    monkeypatch.chdir(tmp_path)

    found = existing_archive(Path("given.tar.gz"))

    assert found.path == tmp_path / "given.tar.gz"
    assert (found.sha256, found.size_bytes) == (sha256(content).hexdigest(), len(content))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no archive",
        b"x" * 5000,
        gzip.compress(b"no archive"),
        gzip.compress(tar_bytes())[:20],
        b"\x1f\x8b\x08\x00" + b"\xff" * 100,
        bz2.compress(tar_bytes()),
    ],
)
def test_a_file_that_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "given.tar.gz").write_bytes(content)

    with pytest.raises(UsageError, match=r"given\.tar\.gz is no archive: neither"):
        existing_archive(tmp_path / "given.tar.gz")


def test_an_archive_that_is_missing_or_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"missing\.tar\.gz cannot be read: No such file"):
        existing_archive(tmp_path / "missing.tar.gz")
    with as_nobody() as directory:
        (directory / "given.tar.gz").write_bytes(gzip.compress(tar_bytes()))
        (directory / "given.tar.gz").chmod(0)

        with pytest.raises(UsageError, match=r"given\.tar\.gz cannot be read: Permission denied"):
            existing_archive(directory / "given.tar.gz")
