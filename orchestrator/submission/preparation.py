"""From an unpacked submission to what runs it: an interpreter and its variables."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.submission.archive import AGENT_FILE
from orchestrator.submission.children import Children
from orchestrator.submission.environments import (
    Environment,
    EnvironmentStore,
    EnvironmentTooLarge,
    Record,
)
from orchestrator.submission.installation import CannotInstall, Installer
from orchestrator.submission.requirements import Requirements, Uninstallable, read_requirements
from orchestrator.submission.runtime_packages import copy_code


@dataclass(frozen=True, slots=True)
class EnvironmentOptions:
    """How environments are made. Without `store` one is made for this submission alone, and goes with it."""

    store: Path | None = None
    timeout_seconds: float = 600.0
    keep: int = 10
    max_bytes: int = 20 * 2**30
    from_index: bool = True
    pip_settings: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a submission runs in."""

    python: str
    environ: Mapping[str, str]


def prepare(
    directory: Path,
    archive_sha256: str,
    say: Callable[[str], None],
    *,
    workdir: Path,
    options: EnvironmentOptions,
    children: Children,
) -> Prepared:
    """This interpreter, or that of an environment of the submission's own where it has a requirements.txt.

    `say` is told what goes on, but only where an environment is made or waited for.

    Raises:
        Uninstallable: its requirements cannot be met.
        CannotInstall: no environment can be made, through no fault of the submission.
        Stopping: this process is about to end.
    """
    requirements = read_requirements(directory)
    if requirements is None:
        return Prepared(sys.executable, os.environ)
    scratch = workdir / "preparation"
    scratch.mkdir(exist_ok=True)
    code = workdir / "code"
    copy_code(code)
    installer = Installer(children, scratch, code, options.from_index, options.pip_settings, say)
    environment = _obtain(installer, requirements, workdir, archive_sha256, options)
    # Held for as long as the submission runs: by this program, and by the one that it becomes.
    os.set_inheritable(environment.lock, True)
    names = ", ".join(f"{name} {version}" for name, version in environment.record.packages.items())
    how = "made" if environment.made else "uses an earlier"
    print(f"{how} environment of requirements.txt: {names or 'no packages'}", flush=True)
    if environment.record.trouble and (directory / AGENT_FILE).is_file():
        raise Uninstallable(
            f"agent.py cannot be served with what requirements.txt brings: {environment.record.trouble}"
        )
    return Prepared(str(environment.python), installer.environ(environment.root))


def _obtain(
    installer: Installer,
    requirements: Requirements,
    workdir: Path,
    archive_sha256: str,
    options: EnvironmentOptions,
) -> Environment:
    root = options.store or workdir / "environments"
    store = EnvironmentStore(root, options.keep, options.max_bytes)
    deadline = time.monotonic() + options.timeout_seconds

    def make(home: Path) -> Record:
        installer.say("makes the environment of requirements.txt")
        return installer.make(home, requirements, deadline)

    try:
        return store.obtain(
            installer.key(requirements, archive_sha256),
            make,
            deadline,
            on_wait=lambda: installer.say("waits for another submission that makes the same environment"),
        )
    except EnvironmentTooLarge as error:
        raise Uninstallable(f"what requirements.txt brings is too large: {error}") from None
    except TimeoutError:
        raise CannotInstall(
            f"another process was still making the same environment after {options.timeout_seconds:g} s"
        ) from None
    except OSError as error:
        raise CannotInstall(f"the submission's environment cannot be made: {error}") from error
