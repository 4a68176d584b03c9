"""An environment with the published openpi-client, made once and cached: its numpy pin excludes ours."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

import platformdirs

OPENPI_CLIENT = "openpi-client==0.1.2"


class NotInstalled(Exception):
    """pip could not install it; holds what it printed."""


def openpi_interpreter() -> Path:
    """Its interpreter.

    Raises:
        NotInstalled: the client cannot be installed.
    """
    version = "".join(map(str, sys.version_info[:2]))
    cache = Path(platformdirs.user_cache_dir("orchestrator-tests"))
    home = cache / f"{OPENPI_CLIENT.replace('==', '-')}-py{version}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{home.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "complete").exists():
            shutil.rmtree(home, ignore_errors=True)
            _install(home)
            (home / "complete").touch()
    return home / "bin" / "python"


def _install(home: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True, timeout=300)
    # It imports typing_extensions without requiring it. Its numpy has no wheels for Python 3.13, where the
    # client itself works with a newer one.
    wanted = [OPENPI_CLIENT, "typing_extensions"]
    if sys.version_info >= (3, 13):
        wanted = ["--no-deps", *wanted, "numpy", "msgpack", "websockets"]
    pip = [str(home / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install"]
    done = subprocess.run(
        [*pip, "--retries", "2", "--only-binary", ":all:", *wanted],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if done.returncode != 0:
        shutil.rmtree(home, ignore_errors=True)
        raise NotInstalled(f"{OPENPI_CLIENT} cannot be installed:\n{(done.stdout + done.stderr)[-2000:]}")
