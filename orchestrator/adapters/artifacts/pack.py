"""Packs a submission's directory: the same content always gives the same archive."""

from __future__ import annotations

import hashlib
import os
import tarfile
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from orchestrator.adapters.artifacts.contents import Contents, survey, unreadable
from orchestrator.domain.errors import InfrastructureError, UsageError

_GZIP_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"  # no name, no time, no system
_BLOCK_BYTES = 0xFFFF


@dataclass(frozen=True, slots=True)
class PackedArchive:
    """An archive on disk."""

    path: Path
    sha256: str
    size_bytes: int


def pack_directory(source: Path, store: Path, contents: Contents | None = None) -> PackedArchive:
    """A `.tar.gz` of `source` in the directory `store`, named by its sha256; written anew only if need be.

    One that is there already looks new afterwards: its age says how long nobody has asked for it.

    Of the files their names, their content and whether they may be executed is kept; `contents` is what
    `survey` said of it, if it was asked already.

    Raises:
        UsageError: `source` is no submission, or cannot be packed or read; the text says what.
        InfrastructureError: the archive cannot be stored.
    """
    # All of it is looked through first: a directory that cannot be packed leaves nothing behind.
    contents = contents or survey(source)
    if store.resolve().is_relative_to(source.resolve()):
        raise UsageError(f"{source} holds the data directory, too: keep it outside of the submission")
    try:
        store.mkdir(parents=True, exist_ok=True)
        return _pack_into(store, contents)
    except OSError as error:
        reason = error.strerror or error
        raise InfrastructureError(
            f"the archive of {source} cannot be written to {store}: {reason}"
        ) from error


def write_archive(contents: Contents, target: Path) -> PackedArchive:
    """The archive at `target`, which is replaced at one stroke if it is there.

    Raises:
        UsageError: a file cannot be read, or the archive cannot be written.
    """
    temporary = target.with_name(f".{target.name}.{uuid4().hex}")
    try:
        packed = _write(contents, temporary)
        temporary.replace(target)
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return replace(packed, path=target)


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
        raise unreadable(error, path) from error


def _pack_into(store: Path, contents: Contents) -> PackedArchive:
    temporary = store / f".{uuid4().hex}"
    try:
        packed = _write(contents, temporary)
        target = store / f"{packed.sha256}.tar.gz"
        if target.exists():
            os.utime(target)
        else:
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return replace(packed, path=target)


def _write(contents: Contents, path: Path) -> PackedArchive:
    with path.open("xb") as file:
        zipped = _StoredGzip(file)
        # No owners and no times: they would change the digest.
        with tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as archive:  # type: ignore[call-overload]
            for name, source in contents.files.items():
                _add(archive, source, name)
        zipped.finish()
    return _measured(path)


class _StoredGzip:
    """Writes gzip without compression (RFC 1951, 3.2.4; RFC 1952).

    What a compressor makes of the same bytes depends on the library and its version. Stored blocks are the
    same everywhere, and weights and wheels would hardly shrink.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._pending = bytearray()
        self._size = 0
        self._checksum = 0
        file.write(_GZIP_HEADER)

    def tell(self) -> int:
        return self._size

    def write(self, data: bytes) -> int:
        self._size += len(data)
        self._checksum = zlib.crc32(data, self._checksum)
        self._pending += data
        whole = len(self._pending) - len(self._pending) % _BLOCK_BYTES
        for start in range(0, whole, _BLOCK_BYTES):
            self._write_block(self._pending[start : start + _BLOCK_BYTES], last=False)
        del self._pending[:whole]
        return len(data)

    def finish(self) -> None:
        """Write what is left, the checksum and the size; the file stays open."""
        self._write_block(self._pending, last=True)
        self._file.write(self._checksum.to_bytes(4, "little"))
        self._file.write((self._size & 0xFFFFFFFF).to_bytes(4, "little"))

    def _write_block(self, block: bytes | bytearray, *, last: bool) -> None:
        size = len(block)
        self._file.write(bytes([last]) + size.to_bytes(2, "little") + (size ^ 0xFFFF).to_bytes(2, "little"))
        self._file.write(block)


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
        raise unreadable(error, path) from error


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
