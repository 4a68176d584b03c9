"""Collects the wheels of a submission's requirements, so that it can be installed without a network."""

from __future__ import annotations

import email
import hashlib
import os
import sys
import sysconfig
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.adapters.artifacts.contents import unreadable
from orchestrator.domain.errors import InfrastructureError, UsageError
from orchestrator.submission.children import Children
from orchestrator.submission.pip import COMMON_OPTIONS, PipFailed, PipMissing, pip_command, run_pip
from orchestrator.submission.requirements import (
    REQUIREMENTS_FILE,
    WHEELS_DIRECTORY,
    CollectedWheel,
    collected_list,
    wheel_files,
)

# 1980-01-01, the oldest time that a zip can hold: wheels that are built here get it, and so the same bytes.
_BUILD_TIME = "315532800"


@dataclass(frozen=True, slots=True)
class Target:
    """The Python and the platforms that the wheels are for; by default those of this interpreter."""

    python_version: str | None = None
    platforms: tuple[str, ...] = ()

    @property
    def is_here(self) -> bool:
        return self.python_version is None and not self.platforms

    def __str__(self) -> str:
        version = self.python_version or f"{sys.version_info.major}.{sys.version_info.minor}"
        return f"Python {version} on {', '.join(self.platforms) or sysconfig.get_platform()}"


def collect_wheels(
    source: Path,
    scratch: Path,
    target: Target,
    *,
    children: Children,
    seconds: float,
    on_line: Callable[[str], None],
) -> Path:
    """A directory below `scratch` with the wheels of `source`'s requirements.txt and the list of them.

    Wheels in the directory `wheels` of `source` are used, too. Where this very interpreter is the target,
    what comes as source code is built; otherwise only what comes as a wheel can be collected.

    Raises:
        UsageError: there is no requirements.txt, or it cannot be met; the text has pip's words.
        InfrastructureError: there is no pip, or it took too long.
    """
    if not (source / REQUIREMENTS_FILE).is_file():
        raise UsageError(f"{source} has no requirements.txt: there is nothing to collect wheels of")
    collected = scratch / WHEELS_DIRECTORY
    collected.mkdir()
    temporary = scratch / "temporary"  # a pip that is ended does not remove its own
    temporary.mkdir()
    try:
        run_pip(
            [*pip_command(scratch / "pip"), *_pip_arguments(source, collected, target)],
            children=children,
            environ=_environ(os.environ, temporary),
            cwd=source,
            deadline=time.monotonic() + seconds,
            on_line=on_line,
        )
    except PipFailed as error:
        raise UsageError(
            f"the wheels of {source / REQUIREMENTS_FILE} cannot be collected for {target}; "
            f"pip says:\n{error}{_hint(str(error), target)}"
        ) from None
    except PipMissing as error:
        raise InfrastructureError(str(error)) from error
    except TimeoutError as error:
        raise InfrastructureError(
            f"collecting the wheels took longer than {seconds:g} s; pip was at: {error}"
        ) from None
    wheels = [_described(path) for path in wheel_files(collected)]
    (collected / REQUIREMENTS_FILE).write_text(collected_list(source / REQUIREMENTS_FILE, wheels))
    return collected


def _pip_arguments(source: Path, collected: Path, target: Target) -> list[str]:
    brought = source / WHEELS_DIRECTORY
    own = ["--find-links", WHEELS_DIRECTORY] if wheel_files(brought) else []
    common = [*COMMON_OPTIONS, *own, "-r", REQUIREMENTS_FILE]
    if target.is_here:
        return ["wheel", "--wheel-dir", str(collected), *common]
    arguments = ["download", "--dest", str(collected), "--only-binary", ":all:", *common]
    if target.python_version is not None:
        arguments += ["--python-version", target.python_version]
    for platform in target.platforms:
        arguments += ["--platform", platform]
    return arguments


def _environ(environ: Mapping[str, str], temporary: Path) -> dict[str, str]:
    dropped = ("PYTHONPATH", "PIP_REQUIRE_VIRTUALENV")
    kept = {name: value for name, value in environ.items() if name not in dropped}
    return {"SOURCE_DATE_EPOCH": _BUILD_TIME, **kept, "TMPDIR": str(temporary)}


def _hint(said: str, target: Target) -> str:
    if "(from versions: none)" in said and not target.is_here:
        return (
            "\nFor another Python or platform only wheels can be collected, no source code: build those "
            "there (pip wheel), and put them into the directory wheels/ of the submission."
        )
    return ""


def _described(path: Path) -> CollectedWheel:
    """The wheel by its own metadata: its file name spells versions otherwise."""
    try:
        with zipfile.ZipFile(path) as wheel:
            name = next(each for each in wheel.namelist() if each.endswith(".dist-info/METADATA"))
            metadata = email.message_from_bytes(wheel.read(name))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return CollectedWheel(metadata["Name"], metadata["Version"], digest)
    except OSError as error:
        raise unreadable(error, path) from error
    except (zipfile.BadZipFile, StopIteration, KeyError):
        raise UsageError(f"{path.name} is no wheel") from None
