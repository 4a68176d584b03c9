"""Runs pip within a deadline, shows what it prints, and finds in it what a person has to read."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from orchestrator.submission.children import Children, wait_with_group

COMMON_OPTIONS = (
    *("--no-input", "--no-color", "--disable-pip-version-check", "--progress-bar", "off"),
    *("--retries", "2"),
)
_KEPT_LINES = 400
_LINE_BYTES = 4096
_SHOWN_LINES = 30
_SHOWN_CHARACTERS = 4000
_END_OF_OUTPUT_SECONDS = 5.0

_NOISE = re.compile(
    r"\s*(Looking in |Collecting |Processing |Downloading |Using cached |Obtaining |Requirement already |"
    r"Preparing metadata|Getting requirements |Installing |Building wheel|Created wheel |Stored in |Saved |"
    r"Attempting |Found existing |Successfully |File was already |Created temporary |Running command |"
    r"Cloning |INFO:|note:|hint:|\[notice\]|WARNING:|DEPRECATION:|To fix this you could try|\d\. |"
    r"ERROR: ResolutionImpossible)"
)
_UNREACHABLE = re.compile(r"after connection broken by '(.*)': /")


class PipFailed(Exception):
    """pip did not succeed; the text is what it said of the reason."""


class PipMissing(Exception):
    """There is no pip to run."""


def pip_command(scratch: Path) -> list[str]:
    """How to run a pip: the one beside this interpreter, or one of its own in the directory `scratch`.

    Raises:
        PipMissing: this Python has neither a pip nor the means to make one.
    """
    if find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    try:
        import venv

        venv.create(scratch, with_pip=True, symlinks=True)
    except (ImportError, OSError, subprocess.CalledProcessError) as error:
        raise PipMissing(f"{sys.executable} has no pip, and cannot make one (ensurepip): {error}") from error
    return [str(scratch / "bin" / "python"), "-m", "pip"]


def run_pip(
    command: Sequence[str],
    *,
    children: Children,
    environ: Mapping[str, str],
    cwd: Path,
    deadline: float,
    on_line: Callable[[str], None],
) -> None:
    """Returns when pip has succeeded; each line that it prints is given to `on_line`, from another thread.

    Raises:
        PipFailed: it did not.
        TimeoutError: the deadline passed; it was ended, and the text is its last line.
        Stopping: this process is about to end.
    """
    process = children.start(
        command, cwd=cwd, environ=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    lines: deque[str] = deque(maxlen=_KEPT_LINES)

    def read() -> None:
        assert process.stdout is not None
        with process.stdout as output:
            while line := output.readline(_LINE_BYTES):
                text = line.decode("utf-8", "replace").rstrip()
                lines.append(text)
                on_line(text)

    reader = threading.Thread(target=read, name="pip's output", daemon=True)
    reader.start()
    try:
        code = wait_with_group(process, max(deadline - time.monotonic(), 0.0))
    except subprocess.TimeoutExpired:
        children.end(process)
        raise TimeoutError(next((line.strip() for line in reversed(lines) if line.strip()), "")) from None
    # Something that left the group may hold the other end for ever.
    reader.join(_END_OF_OUTPUT_SECONDS)
    if code != 0:
        raise PipFailed(relevant_lines(list(lines)) or f"(nothing; its exit code was {code})")


def relevant_lines(lines: Sequence[str]) -> str:
    """What of pip's output tells why it failed, each line once and indented by two."""
    kept: list[str] = []
    for line in lines:
        if broken := _UNREACHABLE.search(line):
            reason = broken[1].rpartition(": ")[2].strip("')\"")
            line = f"the package index cannot be reached: {reason}"
        elif _NOISE.match(line) or not line.strip(" │"):
            continue
        if line.strip() not in (other.strip() for other in kept):
            kept.append(line)
    text = "\n".join(f"  {line}" for line in kept[-_SHOWN_LINES:])
    return text if len(text) <= _SHOWN_CHARACTERS else f"  [...]{text[-_SHOWN_CHARACTERS:]}"
