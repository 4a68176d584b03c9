"""Starts the shim of a container, with an environment that holds nothing of ours."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import orchestrator
from orchestrator import failpoints
from orchestrator.adapters.process.processes import MARKER, end_all, marked_with
from orchestrator.adapters.process.scratch import ContainerDirectory, ShimSpec
from orchestrator.adapters.process.shim import STARTED
from orchestrator.domain.errors import InfrastructureError
from orchestrator.submission.preparation import EnvironmentOptions

HOST = "127.0.0.1"
_KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "PYTHONHOME", "LD_LIBRARY_PATH")
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
_START_TIMEOUT_SECONDS = 60.0
_SHOWN_ERROR_BYTES = 4096

HostCommand = Callable[[Path, Path, int], Sequence[str]]
"""The command line of a submission host, given its port file, its directory and the descriptor of its key."""


def submission_host_command(
    port_file: Path, directory: Path, key_fd: int, environments: EnvironmentOptions | None = None
) -> list[str]:
    """The command line of our own submission host; `environments`: how it makes those of submissions."""
    command = [
        *(sys.executable, "-m", "orchestrator.submission.host"),
        *("--host", HOST, "--port-file", str(port_file)),
        *("--directory", str(directory), "--key-fd", str(key_fd)),
    ]
    if environments is not None:
        command += ["--environments", str(environments.store)] if environments.store is not None else []
        command += ["--environment-timeout", str(environments.timeout_seconds)]
        command += ["--environments-kept", str(environments.keep)]
        command += ["--environments-max-bytes", str(environments.max_bytes)]
        command += [] if environments.from_index else ["--no-index"]
    return command


def launch(
    directory: ContainerDirectory, session_key: bytes, make_shim_spec: Callable[[int], ShimSpec]
) -> None:
    """Make the directory and start the shim in it; returns when the shim has reported.

    `make_shim_spec` receives the descriptor on which the host reads the session key.

    Raises:
        InfrastructureError: it did not start; its processes are ended, its files are left.
        OSError: likewise.
    """
    directory.make()
    with _key_pipe(session_key) as key_fd, directory.shim_log_file.open("wb") as errors:
        directory.write_spec(make_shim_spec(key_fd))
        with failpoints.around("process.spawn"):
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "orchestrator.adapters.process.shim",
                    str(directory.root),
                    str(key_fd),
                ],
                env=environment_of(directory, threads=1),
                cwd=directory.root,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                pass_fds=[key_fd],
                start_new_session=True,
            )
    try:
        answer, _ = process.communicate(timeout=_START_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        answer = b""
        process.kill()
        process.communicate()
    if answer != STARTED:
        end_all(lambda: marked_with(directory.marker), _START_TIMEOUT_SECONDS)
        reason = directory.shim_log_file.read_bytes()[-_SHOWN_ERROR_BYTES:].decode(errors="replace")
        raise InfrastructureError(
            f"the container's shim did not start: {reason.strip() or 'no reason given'}"
        )


@contextlib.contextmanager
def _key_pipe(session_key: bytes) -> Iterator[int]:
    reader, writer = os.pipe()
    try:
        os.write(writer, session_key.hex().encode())  # fits into the pipe: this never waits for the reader
        os.close(writer)
        yield reader
    finally:
        os.close(reader)


def environment_of(directory: ContainerDirectory, threads: int) -> dict[str, str]:
    """The whole environment of a container's processes.

    Also the shim's: a process of the same user can read it, so none of our secrets may be there.
    """
    environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    # A `python` that the submission starts is the interpreter, with the packages, that it runs in itself.
    environment["PATH"] = os.pathsep.join(
        (os.path.dirname(sys.executable), environment.get("PATH", os.defpath))
    )
    environment |= dict.fromkeys(_THREAD_VARIABLES, str(threads))
    environment |= {
        MARKER: directory.marker,
        "HOME": str(directory.home),
        "TMPDIR": str(directory.temporary),
        "PYTHONUNBUFFERED": "1",  # else the last words before a crash are lost
        "PYTHONFAULTHANDLER": "1",
    }
    if python_path := _python_path():
        environment["PYTHONPATH"] = os.pathsep.join(python_path)
    return environment


def _python_path() -> list[str]:
    # Ray puts the code of a runtime environment on `sys.path` only; a new interpreter has to be told.
    inherited = [os.path.abspath(part) for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    ours = str(Path(orchestrator.__file__).parent.parent)
    return inherited if ours in (*inherited, sysconfig.get_path("purelib")) else [*inherited, ours]
