"""Environments of submissions, each made once per content, kept on disk, and shared by who asks for the same.

`<root>/<key>` is an environment once it has its record, which is moved in when all else is done. It is made
where it stays, because a virtual environment knows its own path. `<root>/<key>.lock` is held exclusively by
who makes or removes it, and shared by every process that uses it: a kernel's lock ends with its process.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

RECORD_FILE = "environment.json"
KEY_CHARACTERS = 32
_POLL_SECONDS = 0.1
_BLOCK_BYTES = 512  # the unit of st_blocks, whatever the file system's blocks are


class EnvironmentTooLarge(Exception):
    """An environment takes more disk than all of them together may."""


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of an environment. `trouble` is why no agent can be served in it, "" where it can."""

    packages: dict[str, str]
    trouble: str = ""
    disk_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Environment:
    """An environment that stays as it is for as long as the descriptor `lock` is open, also in another
    program of this process."""

    root: Path
    record: Record
    lock: int
    made: bool  # now, and not before

    @property
    def python(self) -> Path:
        return self.root / "bin" / "python"


class EnvironmentStore:
    """The environments below `root`, at most `keep` and `max_bytes` of them besides those in use."""

    def __init__(self, root: Path, keep: int, max_bytes: int) -> None:
        self._root = root
        self._keep = keep
        self._max_bytes = max_bytes

    def obtain(
        self, key: str, make: Callable[[Path], Record], deadline: float, on_wait: Callable[[], None]
    ) -> Environment:
        """The environment of this key, made by `make` in the directory that it is given unless it exists.

        `on_wait` is called while somebody else makes it.

        Raises:
            EnvironmentTooLarge: nothing of it is left.
            TimeoutError: somebody else was at it until the deadline.
            OSError: the directory cannot be used.
            Whatever `make` raises; nothing of it is left then, either.
        """
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        made = False
        while True:
            lock = self._lock(key, fcntl.LOCK_SH)
            if lock is not None:
                record = self._read(key)
                if record is not None:
                    os.utime(self._root / key / RECORD_FILE)  # the last use
                    return Environment(self._root / key, record, lock, made)
                os.close(lock)
            lock = self._lock(key, fcntl.LOCK_EX)
            if lock is not None:
                try:
                    if self._read(key) is None:
                        self._make(key, make)
                        made = True
                finally:
                    os.close(lock)
                continue
            on_wait()
            if time.monotonic() >= deadline:
                raise TimeoutError("another process makes the same environment")
            time.sleep(_POLL_SECONDS)

    def _make(self, key: str, make: Callable[[Path], Record]) -> None:
        home = self._root / key
        remove_tree(home)  # of somebody who was killed while at it
        try:
            home.mkdir(mode=0o700)
            record = make(home)
            size = _disk_bytes(home)
            if size > self._max_bytes:
                raise EnvironmentTooLarge(f"{size} bytes, above the limit of {self._max_bytes}")
            self._write(home, Record(record.packages, record.trouble, size))
        except BaseException:
            remove_tree(home)
            raise
        self._prune(key)

    def _prune(self, spared: str) -> None:
        """Remove what was never finished, and what was not used for longest until the rest is in bounds."""
        used: list[tuple[float, str, int]] = []
        for home in self._root.iterdir():
            if home.name == spared or len(home.name) != KEY_CHARACTERS or not home.is_dir():
                continue
            record = self._read(home.name)
            if record is None:
                self._remove(home.name)
            else:
                used.append((_modified_at(home / RECORD_FILE), home.name, record.disk_bytes))
        kept, total = 1, _read_size(self._read(spared))
        for _, key, size in sorted(used, reverse=True):
            if kept + 1 > self._keep or total + size > self._max_bytes:
                self._remove(key)
            else:
                kept, total = kept + 1, total + size

    def _remove(self, key: str) -> None:
        lock = self._lock(key, fcntl.LOCK_EX)
        if lock is None:
            return  # in use
        try:
            (self._root / key / RECORD_FILE).unlink(missing_ok=True)
            remove_tree(self._root / key)
            self._lock_file(key).unlink(missing_ok=True)
        finally:
            os.close(lock)

    def _lock(self, key: str, mode: int) -> int | None:
        """A descriptor that holds the lock; None where somebody else does."""
        file = os.open(self._lock_file(key), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(file, mode | fcntl.LOCK_NB)
            # A removal unlinks the file that it holds: a lock on a file without a name locks nobody out.
            if os.fstat(file).st_ino == self._lock_file(key).stat().st_ino:
                return file
        os.close(file)
        return None

    def _lock_file(self, key: str) -> Path:
        return self._root / f"{key}.lock"

    def _read(self, key: str) -> Record | None:
        try:
            return Record(**json.loads((self._root / key / RECORD_FILE).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def _write(self, home: Path, record: Record) -> None:
        draft = home / f"{RECORD_FILE}.new"
        draft.write_text(json.dumps(asdict(record)))
        draft.replace(home / RECORD_FILE)


def remove_tree(directory: Path) -> None:
    """Remove a directory, also where a stranger's package made it hard to."""
    shutil.rmtree(directory, ignore_errors=True)
    if not directory.exists():
        return
    with suppress(OSError):
        directory.chmod(0o700)
    for parent, names, _ in os.walk(directory):  # lists a directory after its parent gave it these rights
        for path in (Path(parent, name) for name in names):
            if not path.is_symlink():
                with suppress(OSError):
                    path.chmod(0o700)
    shutil.rmtree(directory)


def _modified_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _read_size(record: Record | None) -> int:
    return 0 if record is None else record.disk_bytes


def _disk_bytes(directory: Path) -> int:
    total = 0
    for parent, names, files in os.walk(directory):
        for name in (*names, *files):
            with suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_blocks * _BLOCK_BYTES
    return total
