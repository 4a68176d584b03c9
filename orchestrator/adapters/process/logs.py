"""What a submission prints: kept within a bound on disk, and shown with nothing that a terminal obeys."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_MAX_READS = 5


class BoundedLog:
    """A log of at most `limit_bytes` on disk, in two halves, that keeps the newest.

    The full half becomes `<path>.old`, so between half of the limit and all of it is there to read.
    """

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self._path = path
        self._half_bytes = max(1, limit_bytes // 2)
        self._file = self._open()
        self._written_bytes = 0

    def write(self, data: bytes) -> None:
        """Append; what cannot be written (the disk is full) is dropped, for the writer must never block."""
        with contextlib.suppress(OSError):
            rest = memoryview(data)
            while rest:
                if self._written_bytes >= self._half_bytes:
                    self._rotate()
                written = os.write(self._file, rest[: self._half_bytes - self._written_bytes])
                self._written_bytes += written
                rest = rest[written:]

    def close(self) -> None:
        os.close(self._file)

    def _rotate(self) -> None:
        self._path.replace(_older(self._path))
        fresh = self._open()
        os.close(self._file)
        self._file = fresh
        self._written_bytes = 0

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)


def read_tail(path: Path, tail_bytes: int) -> bytes:
    """The last bytes of a bounded log, at most `tail_bytes`; b"" where there is none."""
    data = b""
    for _ in range(_MAX_READS):  # again when the halves changed places while they were read
        before = _inode(path)
        newer = _end_of(path, tail_bytes)
        older = _end_of(_older(path), tail_bytes - len(newer))
        data = older + newer
        if before == _inode(path):
            break
    return data


def _older(path: Path) -> Path:
    return path.with_name(path.name + ".old")


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None


def _end_of(path: Path, tail_bytes: int) -> bytes:
    if tail_bytes <= 0:
        return b""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - tail_bytes))
            return file.read(tail_bytes)
    except OSError:
        return b""
