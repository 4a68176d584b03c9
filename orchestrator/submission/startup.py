"""What the submission host and the policy server do first and last as processes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import MutableMapping
from types import FrameType

from orchestrator.submission.handshake import KEY_BYTES

KEY_VARIABLE = "ORCHESTRATOR_SESSION_KEY"
PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


class UnusableKey(Exception):
    """The session key is missing or malformed; the text never shows it."""


def take_session_key(key_fd: int | None, environ: MutableMapping[str, str]) -> bytes | None:
    """The session key from a file descriptor (raw or hex), or from the environment (hex); None without one.

    The descriptor is read to its end and closed, the variable removed: what the agent starts later
    inherits neither. A descriptor is better: `/proc/PID/environ` goes on showing what a process began with.

    Raises:
        UnusableKey: what is there is not a key.
    """
    from_environment = environ.pop(KEY_VARIABLE, None)
    if key_fd is not None:
        with os.fdopen(key_fd, "rb") as stream:
            raw = stream.read(4 * KEY_BYTES)
        return raw if len(raw) == KEY_BYTES else _from_hex(raw.decode("ascii", "replace"))
    return None if from_environment is None else _from_hex(from_environment)


def _from_hex(text: str) -> bytes:
    try:
        key = bytes.fromhex(text.strip())
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise UnusableKey(f"the session key is not {KEY_BYTES} bytes in hexadecimal digits")
    return key


def end_on_signals() -> None:
    """Let SIGTERM and SIGINT end this process at once, whatever the agent's code is doing.

    The kernel's default does it best: it does not wait for the interpreter. But PID 1, which is what we are
    in a container, gets no default actions and needs handlers.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end if os.getpid() == 1 else signal.SIG_DFL)


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


def take_pip_settings(environ: MutableMapping[str, str]) -> dict[str, str]:
    """The variables that tell pip where packages come from; what the submission starts inherits none."""
    names = [name for name in environ if name.startswith("PIP_") or name.lower() in PROXY_VARIABLES]
    return {name: environ.pop(name) for name in names}


def end_by_signal(number: int) -> None:
    """Let the signal end this process, as it would by itself."""
    _flush()
    with contextlib.suppress(OSError):  # SIGKILL has no other action
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # PID 1 of a container, which the kernel spares


def end_process(code: int) -> None:
    """Leave without waiting for threads and exit handlers of the agent."""
    _flush()
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue
