"""Packs a submission's directory: the same content always gives the same archive."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.domain.errors import UsageError

LEFT_OUT = frozenset({"__pycache__", ".git", ".venv", "venv", ".mypy_cache", ".pytest_cache", ".ruff_cache"})
LEFT_OUT_SUFFIXES = (".pyc", ".pyo")
ENTRY_POINTS = ("agent.py", "main.py")


@dataclass(frozen=True, slots=True)
class PackedArchive:
    """An archive on disk."""

    path: Path
    sha256: str
    size_bytes: int


def pack_directory(source: Path, store: Path) -> PackedArchive:
    """A `.tar.gz` of `source` in the directory `store`, named by its sha256; written anew only if need be.

    Raises:
        UsageError: there is no agent.py in `source`, or something that cannot be packed.
    """
    if not any((source / name).is_file() for name in ENTRY_POINTS):
        raise UsageError(f"{source} is no submission: it has no agent.py")
    buffer = io.BytesIO()
    # No time and no name in the gzip header: they would change the digest.
    with (
        gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0, filename="") as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for path in sorted(_files(source)):
            member = tarfile.TarInfo(path.relative_to(source).as_posix())
            data = path.read_bytes()
            member.size = len(data)
            member.mode = 0o755 if os.access(path, os.X_OK) else 0o644
            archive.addfile(member, io.BytesIO(data))
    content = buffer.getvalue()
    digest = hashlib.sha256(content).hexdigest()
    target = store / f"{digest}.tar.gz"
    if not target.exists():
        store.mkdir(parents=True, exist_ok=True)
        temporary = store / f".{digest}.{os.getpid()}"
        temporary.write_bytes(content)
        temporary.replace(target)
    return PackedArchive(target, digest, len(content))


def existing_archive(path: Path) -> PackedArchive:
    """An archive that somebody packed already."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return PackedArchive(path.absolute(), digest, path.stat().st_size)


def _files(source: Path) -> Iterator[Path]:
    for directory, names, files in os.walk(source):
        names[:] = sorted(name for name in names if name not in LEFT_OUT)
        for name in files:
            path = Path(directory) / name
            if path.is_symlink() or not path.is_file():
                raise UsageError(f"{path} is no plain file: links and devices cannot be packed")
            if not name.endswith(LEFT_OUT_SUFFIXES):
                yield path
