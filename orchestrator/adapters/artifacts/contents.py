"""What of a submission's directory goes into its archive, and what is left out and why."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import NoReturn

from orchestrator.domain.errors import UsageError
from orchestrator.submission.archive import ENTRY_POINTS, ArchiveLimits
from orchestrator.submission.requirements import WHEELS_DIRECTORY

_VENV = "a virtual environment: name its packages in requirements.txt"
_NAMES = {
    **dict.fromkeys((".git", ".hg", ".svn"), "version control"),
    "__pycache__": "compiled Python",
    **dict.fromkeys(
        (".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", ".ipynb_checkpoints", ".tox", ".nox"),
        "a tool's cache",
    ),
    **dict.fromkeys((".venv", "venv"), _VENV),
    **dict.fromkeys((".idea", ".vscode", ".DS_Store", "Thumbs.db"), "an editor's or a desktop's"),
}
_PATTERNS = {
    **dict.fromkeys(("*.pyc", "*.pyo"), "compiled Python"),
    **dict.fromkeys(("*.swp", "*.swo", "*~", ".#*", "#*#"), "an editor's or a desktop's"),
}
_LINK = "a symbolic link: put a copy in its place if the submission needs it"
_EMPTY = "an empty directory: let the code make it if the submission needs it"
_SPECIAL = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"), (lambda mode: True, "a device"))


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Something of the directory that is not in the archive; `path` is relative to the directory."""

    path: str
    reason: str
    surprising: bool = False  # nothing that a submission is expected to do without


@dataclass(frozen=True, slots=True)
class Contents:
    """The files of an archive by their names in it, in order, and what was left out."""

    files: dict[str, Path]
    left_out: tuple[LeftOut, ...]

    @property
    def entry_point(self) -> str:
        """The file that will be started; of two, `agent.py`."""
        return next(name for name in ENTRY_POINTS if name in self.files)


def survey(source: Path, *, without: Path | None = None, wheels: Path | None = None) -> Contents:
    """What the archive of `source` holds.

    `without` is a file that may lie in `source` and is not part of it, such as the archive itself. The files
    of `wheels`, where given, take the place of the directory's own `wheels`.

    Raises:
        UsageError: no submission, or one that cannot be packed or read, or that would be refused where it is
            unpacked; the text says what.
    """
    files: dict[str, Path] = {}
    collected = (
        {} if wheels is None else {f"{WHEELS_DIRECTORY}/{path.name}": path for path in wheels.iterdir()}
    )
    left_out: list[LeftOut] = []
    if not source.is_dir():
        raise UsageError(f"{source} is no directory")
    for path, reason in _entries(source, without):
        name = path.relative_to(source).as_posix()
        if reason is not None:
            left_out.append(LeftOut(name, reason, surprising=reason in _SURPRISING))
        elif wheels is None or not name.startswith(f"{WHEELS_DIRECTORY}/"):
            files[name] = path
        elif name not in collected:
            left_out.append(LeftOut(name, "not among the collected wheels"))
    contents = Contents(
        dict(sorted((files | collected).items())), tuple(sorted(left_out, key=lambda each: each.path))
    )
    _check_entry_point(source, contents)
    _check_limits(source, contents)
    return contents


_SURPRISING = frozenset({_LINK, _EMPTY, *(words for _, words in _SPECIAL)})


def _entries(source: Path, without: Path | None) -> Iterator[tuple[Path, str | None]]:
    """Each file, and each thing that is left out with the reason."""

    def refuse_directory(error: OSError) -> NoReturn:
        raise unreadable(error, Path(error.filename or source)) from error

    # Without `onerror` a directory that cannot be listed would be left out in silence.
    for directory, names, files in os.walk(source, onerror=refuse_directory):
        if not names and not files and Path(directory) != source:
            yield Path(directory), _EMPTY
        for name in sorted(names):
            path = Path(directory, name)
            # Links to directories are among these, and are not followed.
            reason = _reason(path) or (_VENV if os.path.isfile(path / "pyvenv.cfg") else None)
            if reason is not None:
                names.remove(name)
                yield path, reason
            else:
                _check_name(path)
        for name in files:  # links that lead nowhere are among these; and in worktrees .git is a file
            path = Path(directory, name)
            if without is not None and _is_same(path, without):
                yield path, "the archive itself"
                continue
            reason = _reason(path)
            if reason is None:
                _check_name(path)
            yield path, reason


def _reason(path: Path) -> str | None:
    """Why this is left out, by its name or its kind; None where it is not."""
    if path.name in _NAMES:
        return _NAMES[path.name]
    for pattern, reason in _PATTERNS.items():
        if fnmatch(path.name, pattern):
            return reason
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        raise unreadable(error, path) from error
    if stat.S_ISLNK(mode):
        return _LINK
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return None
    return next(words for is_kind, words in _SPECIAL if is_kind(mode))


def _check_name(path: Path) -> None:
    if not path.name.isprintable() or "\\" in path.name:
        raise UsageError(
            f"{str(path)!r} cannot be packed: its name has a backslash, a control character or is not UTF-8"
        )


def _is_same(path: Path, other: Path) -> bool:
    return path.name == other.name and path.resolve() == other.resolve()


def _check_entry_point(source: Path, contents: Contents) -> None:
    if any(name in contents.files for name in ENTRY_POINTS):
        return
    for each in contents.left_out:
        if each.path in ENTRY_POINTS:
            raise UsageError(f"{source / each.path} cannot be packed: it is {each.reason}")
    raise UsageError(
        f"{source} is no submission: it has neither agent.py (with a class Agent) nor main.py (a server)"
    )


def _check_limits(source: Path, contents: Contents) -> None:
    """Refuse here what the submission's container would refuse: its author is nearer."""
    limits = ArchiveLimits()
    if len(contents.files) > limits.files:
        raise UsageError(f"{source} has {len(contents.files)} files, above the limit of {limits.files}")
    total = unpacked_bytes(contents)
    if total > limits.unpacked_bytes:
        raise UsageError(f"{source} has {total} bytes, above the limit of {limits.unpacked_bytes}")
    for name in contents.files:
        if len(name.encode()) > limits.path_bytes or name.count("/") >= limits.depth:
            raise UsageError(f"{source / name} cannot be packed: its path is too long or too deep")


def unpacked_bytes(contents: Contents) -> int:
    """The size of all files together.

    Raises:
        UsageError: one of them is gone.
    """
    total = 0
    for path in contents.files.values():
        try:
            total += path.stat().st_size
        except OSError as error:
            raise unreadable(error, path) from error
    return total


def unreadable(error: OSError, path: Path) -> UsageError:
    """The error in words that name the file."""
    return UsageError(f"{path} cannot be read: {error.strerror or error}")
