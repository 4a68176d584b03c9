"""The embedded server's data: made by initdb, and freed of what a killed server left running on it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil

from orchestrator.adapters.postgres.server_files import (
    SCRATCH_PREFIX,
    Account,
    ServerFiles,
    sync_directory,
    write_atomically,
)
from orchestrator.domain.errors import InfrastructureError

# End all sessions and write a checkpoint; end without one; end by force. Each with the seconds it may take.
STOP_STEPS = ((signal.SIGINT, 10.0), (signal.SIGQUIT, 5.0), (signal.SIGKILL, 5.0))
_PR_SET_PDEATHSIG = 1


def create_cluster(files: ServerFiles, binaries: Path, account: Account) -> None:
    """Make the database cluster unless it is there; a half-made one never takes its place.

    Raises:
        InfrastructureError: initdb failed.
    """
    if files.pgdata.exists():
        return
    write_atomically(files.password, secrets.token_urlsafe(24), mode=0o600, account=account)
    scratch = Path(tempfile.mkdtemp(dir=files.data_dir, prefix=SCRATCH_PREFIX))
    account.own(scratch)
    done = subprocess.run(
        [
            *(str(binaries / "initdb"), "-D", str(scratch), "--username=orchestrator"),
            *("--auth=scram-sha-256", f"--pwfile={files.password}", "--encoding=UTF8"),
            *("--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
        ],
        stdin=subprocess.DEVNULL,
        cwd="/",
        env=server_environment(),
        user=account.uid,
        group=account.gid,
        extra_groups=account.groups,
        preexec_fn=ends_with_parent(signal.SIGKILL),
        check=False,
    )
    if done.returncode != 0:
        raise InfrastructureError(f"initdb ended with code {done.returncode}")
    scratch.rename(files.pgdata)
    sync_directory(files.data_dir)


def stop_leftovers(pgdata: Path) -> None:
    """End what a killed guardian or postmaster left running on this data, and remove its stale pid file."""
    postmaster = postmaster_file(pgdata)[:1]
    for how, seconds in STOP_STEPS:
        left = server_processes(pgdata)
        # Only a postmaster understands a fast stop; a session takes that signal as "cancel the query".
        addressed = [process for process in left if how != signal.SIGINT or str(process.pid) in postmaster]
        for process in addressed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(how)
        if addressed:
            psutil.wait_procs(left, timeout=seconds)
    # No process works on the data, so the file is stale. PostgreSQL itself would be taken in by any process
    # that has got the old pid since.
    (pgdata / "postmaster.pid").unlink(missing_ok=True)


def postmaster_file(pgdata: Path) -> list[str]:
    """The lines of `postmaster.pid`: the pid first, the state in the eighth; none when there is no file."""
    try:
        return [line.strip() for line in (pgdata / "postmaster.pid").read_text().splitlines()]
    except OSError:
        return []


def server_environment() -> dict[str, str]:
    """Nothing of our own environment: PGPORT, PGDATA and their like would change what the server does."""
    return {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}


def ends_with_parent(how: signal.Signals) -> Callable[[], None] | None:
    """A `preexec_fn` for a process that gets the signal when this one dies, by whatever cause.

    Only for processes with a single thread, as it runs between fork and exec. None where nothing can do it.
    """
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    parent = os.getpid()

    def prepare() -> None:
        # It runs after the change of user, which would undo it.
        libc.prctl(_PR_SET_PDEATHSIG, how)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def server_processes(pgdata: Path) -> list[psutil.Process]:
    """The postgres processes of this data: each has it as its working directory."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.name().startswith("postgres") and process.cwd() == str(pgdata):
                found.append(process)
        except psutil.Error:
            continue  # gone meanwhile, or somebody else's
    return found
