"""Runs a command as a hardened pod would: as PID 1, as uid 65532 without a passwd entry, without a
capability, with a root that is read-only but for some directories. It takes a Linux that has namespaces.
"""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

_NAMESPACES = ("--user", "--map-root-user", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
_INSIDE = """
set -e
while [ "$1" != -- ]; do mount --bind "$1" "$1"; shift; done
shift
mount -o remount,bind,ro /
exec unshare --user --map-user=65532 --map-group=65532 "$@"
"""


def in_a_pod(*writable: Path) -> list[str]:
    """What to put before a command, which can write to these directories only; skips where it cannot."""
    command = ["unshare", *_NAMESPACES, "sh", "-c", _INSIDE, "sh", *map(str, writable), "--"]
    if not _possible():
        pytest.skip("no namespaces can be made here")
    return command


@cache
def _possible() -> bool:
    if shutil.which("unshare") is None:
        return False
    tried = ["unshare", *_NAMESPACES, "sh", "-c", _INSIDE, "sh", "--", "true"]
    return subprocess.run(tried, capture_output=True, check=False, timeout=30).returncode == 0


def first_process(unshare: int) -> int:
    """PID 1 of a pod, as it is known out here, given the process that its command has become."""
    (child,) = Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()
    return int(child)
