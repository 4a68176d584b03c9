"""The submission host: from its command line to the policy server that it becomes.

The listening socket is handed on through exec, so that no connection is ever refused in between. Where the
submission serves the protocol itself, this program stays in front of it: it asks for the session key, and
passes on.
"""

from __future__ import annotations

import argparse
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NoReturn

from orchestrator.submission.archive import AGENT_FILE, ArchiveLimits
from orchestrator.submission.children import Children
from orchestrator.submission.door import DEFAULT_CONNECTIONS, Door
from orchestrator.submission.listening import listen
from orchestrator.submission.own_server import OwnServer
from orchestrator.submission.policy_server import EXIT_NOT_LOADED, LINGER_AFTER_FAILURE_SECONDS
from orchestrator.submission.preparation import EnvironmentOptions, prepare
from orchestrator.submission.reception import Ended, Event, Ready, Signalled, SubmissionHost
from orchestrator.submission.sealing import Address, CannotSeal, seal_addresses, wait_until_sealed
from orchestrator.submission.startup import (
    UnusableKey,
    end_by_signal,
    end_on_signals,
    end_process,
    take_pip_settings,
    take_session_key,
)

LAST_WORDS_SECONDS = 1.0
LOADING_SECONDS = 5.0
SEAL_SECONDS = 600.0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator.submission.host",
        description="Wait for a submission's archive, then serve it. The session key comes from --key-fd or "
        "from the environment variable ORCHESTRATOR_SESSION_KEY.",
    )
    parser.add_argument("--directory", type=Path, required=True, help="where to unpack; made if missing")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 (the default) takes a free one")
    parser.add_argument("--port-file", type=Path, help="gets the port once connections are accepted")
    parser.add_argument("--key-fd", type=int, help="a descriptor to read the session key from")
    parser.add_argument("--load-timeout", type=float, default=600.0, help="seconds for the agent to load")
    parser.add_argument("--push-timeout", type=float, default=600.0, help="seconds for one push")
    parser.add_argument("--max-archive-bytes", type=int, default=4 * 2**30)
    parser.add_argument("--max-unpacked-bytes", type=int, default=ArchiveLimits().unpacked_bytes)
    parser.add_argument("--max-files", type=int, default=ArchiveLimits().files)
    parser.add_argument("--connections", type=int, default=DEFAULT_CONNECTIONS, help="at most, at once")
    sealing = parser.add_argument_group("proof of a closed network, before the archive is taken")
    sealing.add_argument("--seal", action="store_true", help="until the cluster's API server is out of reach")
    sealing.add_argument(
        "--seal-address", action="append", default=[], metavar="HOST:PORT", help="and this one; repeatable"
    )
    sealing.add_argument("--seal-timeout", type=float, default=SEAL_SECONDS, help="seconds to wait for that")
    defaults = EnvironmentOptions()
    environments = parser.add_argument_group("environments of submissions that have a requirements.txt")
    add = environments.add_argument
    add("--environments", type=Path, help="where they are kept; by default one is made for this submission")
    add("--environment-timeout", type=float, default=defaults.timeout_seconds, help="seconds to make one")
    add("--environments-kept", type=int, default=defaults.keep, help="at most, those in use besides")
    add("--environments-max-bytes", type=int, default=defaults.max_bytes, help="of all of them together")
    add("--no-index", action="store_true", help="install from the wheels of the archive, and nothing else")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until it becomes the policy server, or until the submission's own server ends.

    The exit code is 1 when the submission cannot be used, 2 for wrong usage, and that of `main.py` where it
    ended by itself.
    """
    options = _parse(arguments)
    end_on_signals()
    try:
        session_key = take_session_key(options.key_fd, os.environ)
        if session_key is None:
            raise UnusableKey("there is no session key")
        listener = listen(options.host, options.port)
    except (OSError, UnusableKey) as error:
        print(f"submission host: {error}", file=sys.stderr)
        return 2
    children = Children()
    host = _make_host(options, children)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: host.events.put(Signalled(number)))
    try:
        options.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        host.fail(f"there is no place for the submission: {error}", ours=True)
    Door(listener, session_key, host.welcome, connections=options.connections).open()
    if options.seal:
        threading.Thread(target=_seal, args=(host, options), name="seal", daemon=True).start()
    port = listener.getsockname()[1]
    if options.port_file is not None:
        _write_port(options.port_file, port)  # and no word: what is printed is the submission's log
    else:
        print(f"waiting for an archive on {options.host}:{port}", flush=True)
    event = host.events.get()
    if isinstance(event, Ready) and (event.directory / AGENT_FILE).is_file():
        _become_policy_server(host, listener, session_key, event, options)
    if isinstance(event, Ready):
        event = _stay_before_own_server(host, event, children, options.load_timeout)
    children.end_all()
    if host.failed and not isinstance(event, Signalled):
        event = _linger(host, event)
    return _end_as(event)


def _make_host(options: argparse.Namespace, children: Children) -> SubmissionHost:
    workdir = options.directory.resolve()
    environments = EnvironmentOptions(
        store=options.environments,
        timeout_seconds=options.environment_timeout,
        keep=options.environments_kept,
        max_bytes=options.environments_max_bytes,
        from_index=not options.no_index,
        pip_settings=take_pip_settings(os.environ),
    )
    return SubmissionHost(
        workdir,
        options.max_archive_bytes,
        ArchiveLimits(unpacked_bytes=options.max_unpacked_bytes, files=options.max_files),
        options.push_timeout,
        partial(prepare, workdir=workdir, options=environments, children=children),
        sealing=options.seal,
    )


def _seal(host: SubmissionHost, options: argparse.Namespace) -> None:
    """Let the host take its archive once nothing can be reached from here, or never."""
    try:
        addresses: list[Address] = seal_addresses(os.environ, options.seal_address)
        wait_until_sealed(addresses, options.seal_timeout, host.tell_sealing)
    except CannotSeal as error:
        # Not an exit code: that would be taken for the submission's.
        host.fail(f"the submission host takes no archive: {error}", ours=True)
    except Exception as error:  # noqa: BLE001 - the top of this thread; unsealed is the safe state
        host.fail(f"the submission host cannot seal itself: {type(error).__name__}: {error}", ours=True)
    else:
        host.be_sealed()


def _write_port(path: Path, port: int) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(f"{port}\n")
    partial.replace(path)


def _stay_before_own_server(
    host: SubmissionHost, ready: Ready, children: Children, load_seconds: float
) -> Event:
    """Start `main.py` and let peers talk to it, until it ends or this process has to."""
    server = OwnServer(ready.directory, children, lambda code: host.events.put(Ended(code)))
    try:
        server.start(ready.prepared.python, ready.prepared.environ)
    except OSError as error:
        host.fail(f"main.py cannot be started: {error}", ours=True)
    else:
        loading = threading.Thread(target=host.await_server, args=(server, load_seconds), daemon=True)
        loading.start()
    event = host.events.get()
    if isinstance(event, Ended):
        loading.join(LOADING_SECONDS)  # it tells whether the end came too early
        host.relay.wait_answered(LAST_WORDS_SECONDS)
    return event


def _linger(host: SubmissionHost, event: Event) -> Event:
    """Stay for a while, so that whoever asks is told why the submission cannot be used."""
    until = time.monotonic() + LINGER_AFTER_FAILURE_SECONDS
    while (left := until - time.monotonic()) > 0:
        with suppress(queue.Empty):
            later = host.events.get(timeout=left)
            if isinstance(later, Signalled):
                return later
    return event


def _end_as(event: Event) -> int:
    """End this process by the signal that ended, or has to end, what it stood for; else its exit code."""
    if isinstance(event, Signalled):
        end_by_signal(event.number)
    if isinstance(event, Ended) and event.code < 0:
        end_by_signal(-event.code)
    code = event.code if isinstance(event, Ended) else EXIT_NOT_LOADED
    end_process(code)
    return code


def _become_policy_server(
    host: SubmissionHost,
    listener: socket.socket,
    session_key: bytes,
    ready: Ready,
    options: argparse.Namespace,
) -> NoReturn:
    """Replace this program in the same process; who connects meanwhile waits in the socket's backlog."""
    key_reader, key_writer = os.pipe()
    os.write(key_writer, session_key)
    os.close(key_writer)
    os.set_inheritable(key_reader, True)
    listener.set_inheritable(True)
    program = [
        ready.prepared.python,
        "-u",  # what the agent prints is in the log even when it is killed
        "-P",  # nothing in the submission's directory may stand in for a module of this server
        *("-m", "orchestrator.submission.policy_server"),
        *("--directory", str(ready.directory)),
        *("--listen-fd", str(listener.fileno())),
        *("--key-fd", str(key_reader)),
        *("--archive-sha256", ready.sha256),
        *("--load-timeout", str(options.load_timeout)),
        *("--connections", str(options.connections)),
        *(["--sealed"] if options.seal else []),
    ]
    end_on_signals()
    with suppress(queue.Empty):  # one that came before that
        _end_as(host.events.get_nowait())
    os.execve(ready.prepared.python, program, dict(ready.prepared.environ))  # noqa: S606 - no shell to avoid
