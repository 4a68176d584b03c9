"""What our own code needs beside a submission, and how it comes into an environment that has only its own."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

# What the policy server imports, and what an agent may count on, each with what it needs itself.
RUNTIME = (
    "numpy",
    "msgpack",
    "websockets",
    "gymnasium",
    "cloudpickle",
    "farama-notifications",
    "typing-extensions",
)
_DIRECTORY = "runtime"
_PATH_FILE = "zz-orchestrator-runtime.pth"  # read after all that packages bring of this kind


class CannotCopy(Exception):
    """A package of this interpreter does not say which files it consists of."""


def copy_code(target: Path) -> None:
    """Put our package into the directory `target`, as far as it runs beside a submission."""
    ours = Path(__file__).parent
    package = target / ours.parent.name
    (package / ours.name).mkdir(parents=True, exist_ok=True)
    shutil.copy2(ours.parent / "__init__.py", package)
    for path in ours.glob("*.py"):
        shutil.copy2(path, package / ours.name)


def add_runtime_packages(home: Path, *, besides: Iterable[str]) -> None:
    """Copy what our code needs into the environment, but for what it has itself.

    The copies come last on its module path. pip must not see them: it would take them for installed.

    Raises:
        CannotCopy, OSError.
    """
    own = {normalized(name) for name in besides}
    runtime = home / _DIRECTORY
    runtime.mkdir()
    for each in runtime_packages():
        if normalized(each.metadata["Name"]) not in own:
            _copy(each, runtime)
    packages = site_packages(home)
    (packages / _PATH_FILE).write_text(f"{os.path.relpath(runtime, packages)}\n")


def runtime_packages() -> Iterator[Distribution]:
    """The packages of `RUNTIME` as this interpreter has them."""
    for name in RUNTIME:
        with suppress(PackageNotFoundError):
            yield distribution(name)


def site_packages(home: Path) -> Path:
    """Where a virtual environment of this Python has its packages."""
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)}))


def normalized(name: str) -> str:
    """A distribution's name as one compares it."""
    return name.lower().replace("_", "-").replace(".", "-")


def _copy(each: Distribution, target: Path) -> None:
    if each.files is None:
        raise CannotCopy(f"{each.metadata['Name']} does not say which files it consists of")
    for file in each.files:
        source = Path(str(each.locate_file(file)))
        if ".." in file.parts or not source.is_file():  # scripts; compiled files that are not there yet
            continue
        place = target / file
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, place)  # with its time, which compiled files name
