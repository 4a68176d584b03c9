"""Packs a submission's directory: the same content always gives the same archive."""

from __future__ import annotations

import gzip
import hashlib
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NoReturn
from uuid import uuid4

from orchestrator.domain.errors import InfrastructureError, UsageError

LEFT_OUT = frozenset({"__pycache__", ".git", ".venv", "venv", ".mypy_cache", ".pytest_cache", ".ruff_cache"})
LEFT_OUT_SUFFIXES = (".pyc", ".pyo")
ENTRY_POINT = "agent.py"


@dataclass(frozen=True, slots=True)
class PackedArchive:
    """An archive on disk."""

    path: Path
    sha256: str
    size_bytes: int


def pack_directory(source: Path, store: Path) -> PackedArchive:
    """A `.tar.gz` of `source` in the directory `store`, named by its sha256; written anew only if need be.

    One that is there already looks new afterwards: its age says how long nobody has asked for it.

    Of the files their names, their content and whether they may be executed is kept; caches, `.git` and
    virtual environments are left out, and so are empty directories.

    Raises:
        UsageError: `source` has no agent.py, or holds something that cannot be packed or read; the text names
            it.
        InfrastructureError: the archive cannot be stored.
    """
    if not (source / ENTRY_POINT).is_file():
        raise UsageError(f"{source} is no submission: it has no {ENTRY_POINT}")
    if store.resolve().is_relative_to(source.resolve()):
        raise UsageError(f"{source} holds the data directory, too: keep it outside of the submission")
    # All of it is looked through first: a directory with a link in it leaves nothing behind.
    files = sorted(_files(source), key=lambda path: path.relative_to(source).as_posix())
    try:
        store.mkdir(parents=True, exist_ok=True)
        return _pack_into(store, source, files)
    except OSError as error:
        reason = error.strerror or error
        raise InfrastructureError(
            f"the archive of {source} cannot be written to {store}: {reason}"
        ) from error


def existing_archive(path: Path) -> PackedArchive:
    """An archive that somebody packed already, with its absolute path.

    Only its format is looked at; its members are judged where it is unpacked.

    Raises:
        UsageError: it cannot be read, or is neither a .tar.gz nor a .tar nor a .zip.
    """
    try:
        if not (_is_tar(path) or zipfile.is_zipfile(path)):
            raise UsageError(f"{path} is no archive: neither a .tar.gz nor a .tar nor a .zip")
        return _measured(path.absolute())
    except OSError as error:
        raise _unreadable(error, path) from error


def _pack_into(store: Path, source: Path, files: list[Path]) -> PackedArchive:
    temporary = store / f".{uuid4().hex}"
    try:
        with temporary.open("xb") as file:
            _write_archive(file, source, files)
        packed = _measured(temporary)
        target = store / f"{packed.sha256}.tar.gz"
        if target.exists():
            os.utime(target)
        else:
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return replace(packed, path=target)


def _write_archive(file: BinaryIO, source: Path, files: list[Path]) -> None:
    # No time and no name in the gzip header, no owners and times in the tar: they would change the digest.
    with (
        gzip.GzipFile(fileobj=file, mode="wb", mtime=0, filename="") as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for path in files:
            _add(archive, path, path.relative_to(source).as_posix())


def _add(archive: tarfile.TarFile, path: Path, name: str) -> None:
    member = tarfile.TarInfo(name)
    with _opened(path) as content:
        status = os.fstat(content.fileno())
        member.size = status.st_size
        member.mode = 0o755 if status.st_mode & 0o111 else 0o644
        archive.addfile(member, content)


def _opened(path: Path) -> BinaryIO:
    try:
        # O_NOFOLLOW, O_NONBLOCK: it may have become a link or a pipe since it was looked at.
        return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except OSError as error:
        raise _unreadable(error, path) from error


def _files(source: Path) -> Iterator[Path]:
    def refuse_directory(error: OSError) -> NoReturn:
        raise _unreadable(error, Path(error.filename or source)) from error

    # Without `onerror` a directory that cannot be listed would be left out in silence.
    for directory, names, files in os.walk(source, onerror=refuse_directory):
        names[:] = [name for name in names if name not in LEFT_OUT]
        for name in names:  # links to directories are among them, and are not followed
            _check_entry(Path(directory, name))
        for name in files:  # links that lead nowhere are among these; and in worktrees .git is a file
            if name not in LEFT_OUT and not name.endswith(LEFT_OUT_SUFFIXES):
                path = Path(directory, name)
                _check_entry(path)
                if not path.is_file():
                    raise UsageError(f"{path} is no plain file: devices, pipes and sockets cannot be packed")
                yield path


def _check_entry(path: Path) -> None:
    if path.is_symlink():
        raise UsageError(f"{path} is a symbolic link, which cannot be packed: put a copy in its place")
    if not path.name.isprintable() or "\\" in path.name:
        raise UsageError(
            f"{str(path)!r} cannot be packed: its name has a backslash, a control character or is not UTF-8"
        )


def _unreadable(error: OSError, path: Path) -> UsageError:
    return UsageError(f"{path} cannot be read: {error.strerror or error}")


def _is_tar(path: Path) -> bool:
    """Whether it starts like a tar, gzipped or not; tarfile itself would take other compressions besides."""
    for open_tar in (tarfile.TarFile.gzopen, tarfile.TarFile.taropen):
        try:
            with open_tar(str(path), "r"):
                return True
        except (tarfile.TarError, EOFError, zlib.error, ValueError):
            continue
    return False


def _measured(path: Path) -> PackedArchive:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return PackedArchive(path, digest, file.tell())
