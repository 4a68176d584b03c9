"""Unpacks a stranger's archive: .tar.gz, .tar or .zip, links and tricks refused, every size capped."""

from __future__ import annotations

import gzip
import os
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

CHUNK_BYTES = 256 * 1024
MAX_HEADER_BYTES = 2**20  # of one tar member; tarfile reads long headers into memory whole
# zipfile reads the whole table of contents of an archive at once, and makes objects of it: half a GB for a
# million files. An entry has 46 bytes and its path.
ZIP_ENTRY_BYTES = 320
MIN_ZIP_READ_BYTES = 2 * 2**20
TAR_BLOCK = 512
IGNORED_AT_TOP = ("__MACOSX", ".DS_Store", "pax_global_header")
AGENT_FILE = "agent.py"  # defines a class Agent
SERVER_FILE = "main.py"  # serves the policy protocol itself
ENTRY_POINTS = (AGENT_FILE, SERVER_FILE)  # of both, the first counts


class ArchiveRefused(Exception):
    """The archive will not be unpacked, for the reason in the text."""


@dataclass(frozen=True, slots=True)
class ArchiveLimits:
    """What an archive may become. The ratio counts only above `ratio_free_bytes`: text packs well."""

    unpacked_bytes: int = 8 * 2**30
    files: int = 20_000
    ratio: int = 100
    ratio_free_bytes: int = 64 * 2**20
    path_bytes: int = 1024
    depth: int = 32


def unpack(archive: Path, destination: Path, limits: ArchiveLimits | None = None) -> Path:
    """The directory with `agent.py` or `main.py`: `destination`, or the only directory at its top.

    `destination` must not exist; on a refusal it is gone again. Owners, times and special bits of the
    archive are not kept, only whether a file is executable.

    Raises:
        ArchiveRefused: damaged, of another format, above a limit, or with a member that is no plain file or
            directory inside it.
    """
    limits = limits or ArchiveLimits()
    os.mkdir(destination, 0o755)
    try:
        writer = _Writer(destination, archive.stat().st_size, limits)
        with archive.open("rb") as stream:
            _unpack_stream(stream, writer)
        return _submission_directory(destination)
    except ArchiveRefused:
        shutil.rmtree(destination, ignore_errors=True)
        raise
    except EOFError:
        shutil.rmtree(destination, ignore_errors=True)
        raise ArchiveRefused("it is cut short: upload it again") from None
    except OSError as error:  # a full disk; gzip's own errors, too
        shutil.rmtree(destination, ignore_errors=True)
        raise ArchiveRefused(f"it cannot be unpacked: {error.strerror or error}") from None
    except Exception as error:  # noqa: BLE001 - what the readers raise on hostile bytes has no common base
        shutil.rmtree(destination, ignore_errors=True)
        raise ArchiveRefused(f"it is damaged ({type(error).__name__}: {error})") from None


def _unpack_stream(stream: IO[bytes], writer: _Writer) -> None:
    start = stream.read(4)
    stream.seek(0)
    if start[:2] == b"\x1f\x8b":
        with gzip.GzipFile(fileobj=stream, mode="rb") as unzipped:
            _unpack_tar(unzipped, writer)
    elif start in (b"PK\x03\x04", b"PK\x05\x06"):
        _unpack_zip(stream, writer)
    else:
        _unpack_tar(stream, writer)


def _a_link(name: str) -> str:
    return f"it holds a link, {name[:80]!r}: put a copy of what it leads to in its place"


# ------------------------------------------------------------------------------------------- writing


class _Writer:
    """Writes checked members below one directory, and counts."""

    def __init__(self, root: Path, archive_bytes: int, limits: ArchiveLimits) -> None:
        self._root = root
        self._limits = limits
        by_ratio = max(archive_bytes * limits.ratio, limits.ratio_free_bytes)
        self.total_limit_bytes = min(limits.unpacked_bytes, by_ratio)
        self.table_limit_bytes = max(limits.files * ZIP_ENTRY_BYTES, MIN_ZIP_READ_BYTES)
        self._bytes = 0
        self._members = 0
        self._files: set[tuple[str, ...]] = set()

    def count_member(self) -> None:
        self._members += 1
        if self._members > self._limits.files:
            raise ArchiveRefused(f"it holds more than {self._limits.files} files and directories")

    def count_bytes(self, count: int) -> None:
        self._bytes += count
        if self._bytes > self.total_limit_bytes:
            raise self.too_large()

    def too_large(self) -> ArchiveRefused:
        by_ratio = self.total_limit_bytes < self._limits.unpacked_bytes
        why = f", {self._limits.ratio} times its own size" if by_ratio else ""
        return ArchiveRefused(f"it unpacks to more than {self.total_limit_bytes} bytes{why}")

    def directory(self, name: str) -> None:
        parts = self._checked(name)
        self._check_parents((*parts, ""))
        os.makedirs(self._root.joinpath(*parts), 0o755, exist_ok=True)

    def file(self, name: str, source: IO[bytes], size: int, executable: bool) -> None:
        parts = self._checked(name)
        if not parts:
            raise ArchiveRefused(f"it holds a file without a name, {name[:80]!r}")
        self._check_parents(parts)
        path = self._root.joinpath(*parts)
        if parts in self._files or path.exists():
            raise ArchiveRefused(f"it holds {name[:80]!r} twice")
        self._files.add(parts)
        os.makedirs(path.parent, 0o755, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with os.fdopen(os.open(path, flags, 0o755 if executable else 0o644), "wb") as target:
            self._copy(source, target, size, name)

    def _copy(self, source: IO[bytes], target: IO[bytes], size: int, name: str) -> None:
        left = size
        while chunk := source.read(min(CHUNK_BYTES, left + 1)):
            left -= len(chunk)
            self.count_bytes(len(chunk))
            if left < 0:
                raise ArchiveRefused(f"{name[:80]!r} in it is longer than it says")
            target.write(chunk)
        if left:
            raise ArchiveRefused(f"it is cut short in {name[:80]!r}")

    def _checked(self, name: str) -> tuple[str, ...]:
        shown = repr(name[:80])
        try:
            encoded = name.encode()
        except UnicodeEncodeError:
            raise ArchiveRefused(f"it holds a path that is not UTF-8, {shown}") from None
        if name.startswith("/"):
            raise ArchiveRefused(f"it holds an absolute path, {shown}")
        if "\\" in name or not name.isprintable():
            raise ArchiveRefused(f"it holds a path with a backslash or control characters, {shown}")
        parts = tuple(part for part in name.split("/") if part not in ("", "."))
        if ".." in parts:
            raise ArchiveRefused(f"it holds a path that leads out of it, {shown}")
        if len(encoded) > self._limits.path_bytes or any(len(part.encode()) > 255 for part in parts):
            raise ArchiveRefused(f"it holds a path that is too long, {shown}")
        if len(parts) > self._limits.depth:
            raise ArchiveRefused(f"it holds a path that is too deep, {shown}")
        return parts

    def _check_parents(self, parts: tuple[str, ...]) -> None:
        for count in range(1, len(parts)):
            if parts[:count] in self._files:
                raise ArchiveRefused(f"{'/'.join(parts[:count])[:80]!r} in it is a file and a directory")


# ----------------------------------------------------------------------------------------------- tar


class _TarBytes:
    """The tar stream below the tar reader: read once, forwards, within an allowance."""

    def __init__(self, source: IO[bytes] | gzip.GzipFile, total_limit_bytes: int) -> None:
        self._source = source
        # Headers and padding come on top of the files: of at least as many bytes again for tiny files.
        self._left = 2 * total_limit_bytes + 64 * 2**20
        self._allowed = 0
        self._tail = b""

    def allow(self, count: int) -> None:
        self._allowed = count + 2 * tarfile.RECORDSIZE

    def read(self, count: int) -> bytes:
        chunk = self._source.read(count)
        self._left -= len(chunk)
        self._allowed -= len(chunk)
        if self._allowed < 0:
            raise ArchiveRefused("a header in it is too long")
        if self._left < 0:
            raise ArchiveRefused("it unpacks to too many bytes")
        self._tail = (self._tail + chunk[-TAR_BLOCK:])[-TAR_BLOCK:]
        return chunk

    def drain(self) -> None:
        """Read to the end, where gzip checks its sum; a tar ends with blocks of zeros."""
        while self._allow_chunk() and self.read(CHUNK_BYTES):
            pass
        if self._tail.strip(b"\0"):
            raise ArchiveRefused("it is cut short, or bytes follow its end")

    def _allow_chunk(self) -> bool:
        self.allow(CHUNK_BYTES)
        return True


def _unpack_tar(source: IO[bytes] | gzip.GzipFile, writer: _Writer) -> None:
    stream = _TarBytes(source, writer.total_limit_bytes)
    stream.allow(MAX_HEADER_BYTES)
    # Any: the stub wants a whole file, the stream mode only ever calls read().
    file_object: Any = stream
    try:
        archive = tarfile.open(  # noqa: SIM115 - closed below
            fileobj=file_object, mode="r|", errors="surrogateescape"
        )
    except tarfile.ReadError as error:
        raise ArchiveRefused(f"it is neither a .tar.gz nor a .tar nor a .zip ({error})") from None
    with closing(archive):
        for member in _members(archive, stream):
            writer.count_member()
            _unpack_tar_member(archive, member, stream, writer)
    stream.drain()


def _members(archive: tarfile.TarFile, stream: _TarBytes) -> Iterator[tarfile.TarInfo]:
    while True:
        stream.allow(MAX_HEADER_BYTES)
        member = archive.next()
        if member is None:
            return
        yield member


def _unpack_tar_member(
    archive: tarfile.TarFile, member: tarfile.TarInfo, stream: _TarBytes, writer: _Writer
) -> None:
    if member.isdir():
        writer.directory(member.name)
        return
    if member.issym() or member.islnk():
        raise ArchiveRefused(_a_link(member.name))
    if not member.isreg() or member.issparse():
        raise ArchiveRefused(f"it holds {member.name[:80]!r}, which is neither a plain file nor a directory")
    if member.size < 0 or member.size > writer.total_limit_bytes:
        raise writer.too_large()
    source = archive.extractfile(member)
    assert source is not None
    stream.allow(member.size)
    with source:
        writer.file(member.name, source, member.size, bool(member.mode & 0o100))


# ----------------------------------------------------------------------------------------------- zip


class _ZipBytes:
    """The file below the zip reader, which asks for everything at once when an archive says so."""

    def __init__(self, source: IO[bytes], max_read_bytes: int) -> None:
        self._source = source
        self._max_read_bytes = max_read_bytes
        self.seek = source.seek
        self.tell = source.tell
        self.seekable = source.seekable

    def read(self, count: int = -1) -> bytes:
        if count < 0 or count > self._max_read_bytes:
            data = self._source.read(self._max_read_bytes + 1)
            if len(data) > self._max_read_bytes:
                raise ArchiveRefused("its table of contents is too long: it holds too many files")
            return data
        return self._source.read(count)


def _unpack_zip(source: IO[bytes], writer: _Writer) -> None:
    file_object: Any = _ZipBytes(source, writer.table_limit_bytes)
    with zipfile.ZipFile(file_object) as archive:
        for member in archive.infolist():
            writer.count_member()
            _unpack_zip_member(archive, member, writer)


def _unpack_zip_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, writer: _Writer) -> None:
    mode = member.external_attr >> 16
    shown = repr(member.filename[:80])
    if stat.S_ISLNK(mode):
        raise ArchiveRefused(_a_link(member.filename))
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise ArchiveRefused(f"it holds {shown}, which is neither a plain file nor a directory")
    if member.flag_bits & 0x1:
        raise ArchiveRefused(f"it holds an encrypted file, {shown}")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ArchiveRefused(f"{shown} in it has a compression that is not read here")
    if member.is_dir():
        writer.directory(member.filename)
        return
    with archive.open(member) as stream:
        writer.file(member.filename, stream, member.file_size, bool(mode & 0o100))


# ------------------------------------------------------------------------------------ the submission


def _submission_directory(root: Path) -> Path:
    if _is_submission(root):
        return root
    top = [path for path in root.iterdir() if path.name not in IGNORED_AT_TOP and path.name[:2] != "._"]
    if len(top) == 1 and _is_submission(top[0]):
        return top[0]
    raise ArchiveRefused("no agent.py or main.py at the top of the archive or in its only directory")


def _is_submission(directory: Path) -> bool:
    return any((directory / name).is_file() for name in ENTRY_POINTS)
