"""What packages a submission asks for: its `requirements.txt`, and the wheels that it brings."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

REQUIREMENTS_FILE = "requirements.txt"
WHEELS_DIRECTORY = "wheels"

_STAMP = "# requirements.txt sha256: "
_INDEX_REQUIREMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\s*(\[[^\]]*\])?\s*([<>=!~;(#].*)?")
_READ_BYTES = 2**20


class Uninstallable(Exception):
    """The submission's requirements cannot be met, for the reason in the text."""


@dataclass(frozen=True, slots=True)
class CollectedWheel:
    """A wheel that was collected for a submission."""

    name: str
    version: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Requirements:
    """What to install for a submission.

    `file` is what pip is given: `requirements.txt`, or the list that was made with the wheels. With `wheels`,
    nothing is taken from anywhere else.
    """

    directory: Path
    file: Path
    wheels: Path | None

    def digest(self, archive_sha256: str) -> str:
        """Equal for equal content; `archive_sha256` counts where other files of the archive may count."""
        digest = hashlib.sha256()
        text = (self.directory / REQUIREMENTS_FILE).read_bytes()
        parts = [_sha256(self.directory / REQUIREMENTS_FILE), self.file.name, _sha256(self.file)]
        if self.wheels is not None:
            parts += [f"{path.name} {_sha256(path)}" for path in wheel_files(self.wheels)]
        if _names_files(text):
            parts.append(archive_sha256)
        digest.update("\n".join(parts).encode())
        return digest.hexdigest()


def read_requirements(directory: Path) -> Requirements | None:
    """What the submission in `directory` asks for; None where it has no `requirements.txt`.

    Raises:
        Uninstallable: its wheels were collected for another `requirements.txt`.
    """
    file = directory / REQUIREMENTS_FILE
    if not file.is_file():
        return None
    wheels = directory / WHEELS_DIRECTORY
    if not wheels.is_dir():
        return Requirements(directory, file, None)
    collected = wheels / REQUIREMENTS_FILE
    if not collected.is_file():
        return Requirements(directory, file, wheels)
    stamp = next((line for line in collected.read_text("utf-8", "replace").splitlines() if line), "")
    if stamp != _STAMP + _sha256(file):
        raise Uninstallable(
            "wheels/ was collected for another requirements.txt: collect it again "
            "(orchestrator submission pack --vendor), or remove wheels/"
        )
    return Requirements(directory, collected, wheels)


def collected_list(requirements: Path, wheels: Iterable[CollectedWheel]) -> str:
    """The text of `wheels/requirements.txt`: exactly these wheels, by their digests."""
    lines = [f"{each.name}=={each.version} --hash=sha256:{each.sha256}" for each in wheels]
    return "\n".join([_STAMP + _sha256(requirements), *sorted(lines, key=str.lower)]) + "\n"


def wheel_files(directory: Path) -> list[Path]:
    """The wheels of a directory, by name."""
    return sorted(directory.glob("*.whl"))


def _names_files(requirements: bytes) -> bool:
    """Whether the content of other files may count: whether it has lines that name no package of an index."""
    joined = requirements.decode("utf-8", "replace").replace("\\\n", " ").replace("\\\r\n", " ")
    lines = (line.strip() for line in joined.splitlines())
    return any(line and line[0] != "#" and not _INDEX_REQUIREMENT.fullmatch(line) for line in lines)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
