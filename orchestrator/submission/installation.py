"""Makes the environment of one submission: a virtual environment with what it requires, and nothing of ours.

What our own code needs beside a submission is copied from this interpreter's packages, in the versions in
use, to the end of the module path: a version that the submission requires goes before it.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import Distribution, distributions
from pathlib import Path

from orchestrator.submission.children import Children, wait_with_group
from orchestrator.submission.environments import KEY_CHARACTERS, Record
from orchestrator.submission.pip import COMMON_OPTIONS, PipFailed, PipMissing, pip_command, run_pip
from orchestrator.submission.requirements import Requirements, Uninstallable, wheel_files
from orchestrator.submission.runtime_packages import (
    CannotCopy,
    add_runtime_packages,
    normalized,
    runtime_packages,
    site_packages,
)

FORMAT = 1  # of an environment: raised when one that was made before would not do
_PROBED_MODULE = "orchestrator.submission.policy_server"
_OFFLINE = "http://offline.invalid:9"  # whatever would use the network all the same fails at once
_SHOWN_WHEELS = 10
_SHOWN_CHARACTERS = 500
# What would have pip, or the programs that it starts, look at more than the submission says.
_DROPPED_VARIABLES = ("PYTHONPATH", "PYTHONSTARTUP", "VIRTUAL_ENV")


class CannotInstall(Exception):
    """No environment can be made here, through no fault of the submission."""


@dataclass(frozen=True)
class Installer:
    """Makes environments with the means of this process.

    `code` is a directory with our own package alone, `pip_settings` what pip shall find in its environment
    when it may use an index.
    """

    children: Children
    scratch: Path
    code: Path
    from_index: bool
    pip_settings: Mapping[str, str]
    say: Callable[[str], None]

    def key(self, requirements: Requirements, archive_sha256: str) -> str:
        """Equal where `make` would make the same environment."""
        parts = [
            f"format {FORMAT}",
            sys.version,
            sysconfig.get_platform(),
            sys.base_prefix,
            *(f"{each.metadata['Name']}=={each.version}" for each in runtime_packages()),
            requirements.digest(archive_sha256),
        ]
        return sha256("\n".join(parts).encode()).hexdigest()[:KEY_CHARACTERS]

    def make(self, home: Path, requirements: Requirements, deadline: float) -> Record:
        """Fill the empty directory `home`.

        Raises:
            Uninstallable: the requirements cannot be met, also not in time.
            CannotInstall: it is not the submission's fault.
            Stopping: this process is about to end.
        """
        try:
            import venv  # where it is needed: some systems have it in a package of its own

            venv.create(home, with_pip=False, symlinks=True)
            self._install(home, requirements, deadline)
            packages = {each.metadata["Name"]: each.version for each in _installed(home)}
            _refuse_editable(home)
            add_runtime_packages(home, besides=packages)
        except (OSError, ImportError, CannotCopy) as error:
            raise CannotInstall(f"the submission's environment cannot be made: {error}") from error
        self.say("tries the policy server in the environment")
        return Record(packages, self._trouble(home, packages, deadline))

    def environ(self, home: Path) -> dict[str, str]:
        """The variables for a program that runs in the environment."""
        return {
            **os.environ,
            "PYTHONPATH": str(self.code),
            "VIRTUAL_ENV": str(home),
            "PATH": os.pathsep.join((str(home / "bin"), os.environ.get("PATH", os.defpath))),
        }

    def _install(self, home: Path, requirements: Requirements, deadline: float) -> None:
        file = requirements.file.relative_to(requirements.directory)
        what = f"installs {file}"
        self.say(what)
        sources = [] if self.from_index else ["--no-index"]
        if requirements.wheels is not None:
            sources = ["--no-index", "--find-links", requirements.wheels.name]

        def show(line: str) -> None:
            print(line, flush=True)
            if line.strip():
                self.say(f"{what}: {line.strip()}")

        began = time.monotonic()
        try:
            run_pip(
                [
                    *pip_command(self.scratch / "pip"),
                    *("--python", str(home / "bin" / "python"), "install"),
                    *(*COMMON_OPTIONS, "--no-cache-dir", "--no-warn-script-location", *sources),
                    *("-r", str(file)),
                ],
                children=self.children,
                environ=self._pip_environ(offline=bool(sources)),
                cwd=requirements.directory,
                deadline=deadline,
                on_line=show,
            )
        except PipMissing as error:
            raise CannotInstall(str(error)) from error
        except TimeoutError as error:
            seconds = time.monotonic() - began
            raise Uninstallable(
                f"requirements.txt was not installed in time ({seconds:.0f} s); pip was at: {error}\n"
                "bring the wheels (orchestrator submission pack --vendor), or raise the setting "
                "environment_timeout_seconds"
            ) from None
        except PipFailed as error:
            if f"[Errno {errno.ENOSPC}]" in str(error):
                raise CannotInstall(f"the disk is full; pip says:\n{error}") from None
            raise Uninstallable(self._explained(str(error), requirements)) from None

    def _pip_environ(self, *, offline: bool) -> dict[str, str]:
        environ = {
            name: value
            for name, value in os.environ.items()
            if name not in _DROPPED_VARIABLES and not name.startswith("PIP_")
        }
        if not offline:
            return environ | dict(self.pip_settings)
        proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY", "ALL_PROXY"), _OFFLINE)
        return environ | proxies | {"PIP_CONFIG_FILE": os.devnull}

    def _explained(self, said: str, requirements: Requirements) -> str:
        wheels = requirements.wheels
        if wheels is None and self.from_index:
            return f"requirements.txt cannot be installed; pip says:\n{said}"
        if wheels is None:
            return (
                f"requirements.txt cannot be installed without a package index, and none may be used here: "
                f"bring the wheels (orchestrator submission pack --vendor); pip says:\n{said}"
            )
        brought = [path.name for path in wheel_files(wheels)]
        shown = ", ".join(brought[:_SHOWN_WHEELS]) or "no wheel"
        more = f" and {len(brought) - _SHOWN_WHEELS} more" if len(brought) > _SHOWN_WHEELS else ""
        version = f"{sys.implementation.name} {sys.version_info.major}.{sys.version_info.minor}"
        return (
            f"requirements.txt cannot be installed from wheels/ alone; pip says:\n{said}\n"
            f"wheels/ holds {shown}{more}; this is {version} on {sysconfig.get_platform()}"
        )

    def _trouble(self, home: Path, packages: Mapping[str, str], deadline: float) -> str:
        """Why our policy server does not run in the environment, "" where it does."""
        with tempfile.TemporaryFile(dir=self.scratch) as output:
            process = self.children.start(
                [str(home / "bin" / "python"), "-P", "-c", f"import {_PROBED_MODULE}"],
                cwd=self.scratch,
                environ=self.environ(home),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            try:
                code = wait_with_group(process, max(deadline - time.monotonic(), 1.0))
            except subprocess.TimeoutExpired:
                self.children.end(process)
                raise Uninstallable("the policy server did not come up in time in its environment") from None
            output.seek(0)
            lines = output.read().decode("utf-8", "replace").strip().splitlines()
        if code == 0:
            return ""
        if code != 1:  # ended from outside: it may go well the next time
            raise Uninstallable(f"the policy server ended in its environment: exit code {code}")
        own = {normalized(name): version for name, version in packages.items()}
        ours = {normalized(each.metadata["Name"]): each.version for each in runtime_packages()}
        brought = [f"{name} {own[name]} ({ours[name]} is known to work)" for name in ours if name in own]
        reason = lines[-1][:_SHOWN_CHARACTERS] if lines else "no reason given"
        if not brought:
            return reason
        return f"{reason}\nit brings {', '.join(brought)}: ask for another version, or leave it out"


def _installed(home: Path) -> list[Distribution]:
    return sorted(
        distributions(path=[str(site_packages(home))]), key=lambda each: normalized(each.metadata["Name"])
    )


def _refuse_editable(home: Path) -> None:
    """An environment outlives the directory of the submission that it was made for."""
    for each in _installed(home):
        origin = each.read_text("direct_url.json")
        if origin is not None and json.loads(origin).get("dir_info", {}).get("editable"):
            raise Uninstallable(
                f"requirements.txt installs {each.metadata['Name']} as editable (-e), which a submission "
                "cannot: leave the -e out, or put its code beside agent.py"
            )
