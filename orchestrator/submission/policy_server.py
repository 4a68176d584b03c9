"""Serves a submission's `Agent` on the policy wire: one instance and one thread for each connection.

Started by the submission host with its listening socket and session key, or by hand without either:
`python -m orchestrator.submission.policy_server --directory DIR`, which any openpi client can talk to.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orchestrator.submission.door import DEFAULT_CONNECTIONS, Door
from orchestrator.submission.handshake import HostState, reply, send_message
from orchestrator.submission.listening import listen
from orchestrator.submission.loading import NotAnAgent, describe_exception, describe_frame, load_agent_class
from orchestrator.submission.startup import UnusableKey, end_on_signals, end_process, take_session_key
from orchestrator.submission.transport import ByteStream, ConnectionLost, WebSocket, accept_websocket
from orchestrator.submission.wire import WireError, packb, unpackb

PROTOCOL_VERSION = 1
EXTENSIONS = ["reset", "sequence"]
CONTROL_KEY = "__orchestrator__"
SEQUENCE_KEY = "__sequence__"
MAX_MESSAGE_BYTES = 64 * 2**20
SEND_SECONDS = 60.0
LINGER_AFTER_FAILURE_SECONDS = 60.0
EXIT_NOT_LOADED = 1
EXIT_DISK_FULL = 3


class PolicyServer:
    """The agent of one directory: how it stands, and its connections."""

    def __init__(self, directory: Path, archive_sha256: str | None = None, *, sealed: bool = False) -> None:
        self.directory = directory.resolve()
        self._sealed = sealed
        self._archive_sha256 = archive_sha256
        self._state_changed = threading.Condition()
        self._state = HostState.LOADING
        self._error: str | None = None
        self._loading_thread: int | None = None
        self._make_agent: Callable[[], Any] | None = None
        self._spare_agents: list[Any] = []

    # ------------------------------------------------------------------------------------- loading

    def load(self) -> None:
        """Import the agent and construct it once, in the calling thread; the state says how it went."""
        self._loading_thread = threading.get_ident()
        try:
            make_agent = load_agent_class(self.directory)
            # Shows what the constructor raises now; the first connection gets this very instance.
            agent = make_agent()
        except BaseException as error:  # noqa: BLE001 - it is their code, sys.exit() included
            gap = " " if isinstance(error, NotAnAgent) else "\n"
            self.fail(f"the submission did not load:{gap}{describe_exception(error, self.directory)}")
            return
        with self._state_changed:
            if self._state is HostState.LOADING:
                self._make_agent, self._spare_agents = make_agent, [agent]
                self._state = HostState.SERVING
                self._state_changed.notify_all()

    def fail(self, reason: str) -> None:
        """Answer every request with `reason` from now on, unless the agent is loaded."""
        with self._state_changed:
            if self._state is not HostState.LOADING:
                return
            self._state, self._error = HostState.FAILED, reason
            self._state_changed.notify_all()
        print(reason, file=sys.stderr, flush=True)

    def wait_loaded(self, timeout_seconds: float) -> HostState:
        """How it stands once it is loaded or failed, or the time is over."""
        with self._state_changed:
            self._state_changed.wait_for(lambda: self._state is not HostState.LOADING, timeout_seconds)
            return self._state

    def loading_at(self) -> str:
        """Where in the submission's code the loading stands; "" where it does not stand there."""
        frame = sys._current_frames().get(self._loading_thread or 0)
        return "" if frame is None else describe_frame(frame, self.directory)

    # ----------------------------------------------------------------------------------- connections

    def welcome(self, stream: ByteStream, request: dict[str, Any] | None, deadline: float) -> None:
        """Answer the one request of a connection that holds the key; serve it if it asks for the policy."""
        if request is not None and not self._answer(stream, request, deadline):
            return
        if self._state is not HostState.SERVING:
            return
        websocket = accept_websocket(stream, MAX_MESSAGE_BYTES, deadline)
        self._converse(websocket)

    def _answer(self, stream: ByteStream, request: dict[str, Any], deadline: float) -> bool:
        with self._state_changed:
            state, error = self._state, self._error
        operation = request.get("op")
        ok = state is not HostState.FAILED
        if operation == "policy":
            ok = state is HostState.SERVING
            error = error or (None if ok else "the policy is still loading")
        elif operation == "push":
            if request.get("sha256") != self._archive_sha256:
                ok, error = False, "another archive is here already"
        elif operation != "status":
            ok, error = False, f"unknown operation {str(operation)[:32]!r}"
        where = self.loading_at() if state is HostState.LOADING else ""
        answer = reply(ok, state, error, sealed=self._sealed)
        send_message(stream, answer | ({"where": where} if where else {}), deadline)
        return ok and operation == "policy"

    def _converse(self, websocket: WebSocket) -> None:
        try:
            agent = self._new_agent()
            metadata = {"server": "orchestrator", "version": PROTOCOL_VERSION, "extensions": EXTENSIONS}
            websocket.send(packb(metadata), time.monotonic() + SEND_SECONDS)
            while True:
                request = unpackb(_binary(websocket.receive(None)), writable=True)
                answer = self._reply_to(agent, request)
                websocket.send(answer, time.monotonic() + SEND_SECONDS)
        except (ConnectionLost, TimeoutError):
            websocket.close()
        except WireError as error:
            websocket.close(1002, str(error)[:120])
        except _AgentRaised as raised:
            text = describe_exception(raised.error, self.directory)
            print(text, file=sys.stderr, flush=True)
            if self._archive_sha256 is not None and _is_of_a_full_disk(raised.error):
                # A full disk stays full: the container ends in this episode, and not in one that comes after.
                end_process(EXIT_DISK_FULL)
            self._send_last(websocket, text)

    def _new_agent(self) -> Any:
        with self._state_changed:
            if self._spare_agents:
                return self._spare_agents.pop()
        assert self._make_agent is not None
        try:
            return self._make_agent()
        except BaseException as error:  # noqa: BLE001
            raise _AgentRaised(error) from None

    def _reply_to(self, agent: Any, request: Any) -> bytes:
        if not isinstance(request, dict):
            raise WireError("an observation is a map")
        sequence = request.pop(SEQUENCE_KEY, None)
        try:
            answer = _reset(agent, request) if CONTROL_KEY in request else _act(agent, request)
            if sequence is not None:
                answer[SEQUENCE_KEY] = sequence
            return packb(answer)
        except WireError:
            raise
        except BaseException as error:  # noqa: BLE001
            raise _AgentRaised(error) from None

    def _send_last(self, websocket: WebSocket, text: str) -> None:
        with contextlib.suppress(ConnectionLost, TimeoutError):
            websocket.send(text, time.monotonic() + SEND_SECONDS)
        websocket.close(1011, "the policy raised an exception")


class _AgentRaised(Exception):
    """Carries what the submission's code raised past our own handlers."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


def _is_of_a_full_disk(error: BaseException) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return isinstance(error, OSError) and error.errno in full


def _binary(message: bytes | bytearray | str) -> bytes | bytearray:
    if isinstance(message, str):
        raise WireError("an observation came as a text message")
    return message


def _act(agent: Any, request: dict[str, Any]) -> dict[str, Any]:
    observation = request["observation"] if request.keys() == {"observation"} else request
    started_at = time.perf_counter()
    actions = agent.act(observation)
    if isinstance(actions, dict) and "actions" in actions:
        return dict(actions)
    milliseconds = (time.perf_counter() - started_at) * 1000
    return {"actions": actions, "server_timing": {"infer_ms": milliseconds}}


def _reset(agent: Any, request: dict[str, Any]) -> dict[str, Any]:
    episode, seed = request.get("episode"), request.get("seed")
    control = request[CONTROL_KEY]
    # By type first: an array would compare element by element.
    if type(control) is not str or control != "reset" or type(episode) is not int or type(seed) is not int:
        raise WireError("an unknown control message")
    reset = getattr(agent, "reset", None)
    if reset is not None:
        reset(episode, seed)
    return {CONTROL_KEY: "reset", "sequence": request.get("sequence")}


# ------------------------------------------------------------------------------------------- process


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator.submission.policy_server", description="Serve the Agent of a directory."
    )
    parser.add_argument("--directory", type=Path, required=True, help="holds agent.py")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--listen-fd", type=int, help="an inherited listening socket, for host and port")
    parser.add_argument("--key-fd", type=int, help="a descriptor to read the session key from")
    parser.add_argument("--archive-sha256", help="what was pushed, so that pushing it again succeeds")
    parser.add_argument("--sealed", action="store_true", help="its network was proved to be closed")
    parser.add_argument("--load-timeout", type=float, default=600.0, help="seconds")
    parser.add_argument("--connections", type=int, default=DEFAULT_CONNECTIONS, help="at most, at once")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until a signal; the exit code is 1 when the agent does not load, 2 for wrong usage."""
    options = _parse(arguments)
    end_on_signals()
    try:
        session_key = take_session_key(options.key_fd, os.environ)
        if options.listen_fd is None:
            listener = listen(options.host, options.port)
        else:
            listener = socket.socket(fileno=options.listen_fd)
            listener.set_inheritable(False)  # not for processes that the agent starts
    except (OSError, UnusableKey) as error:
        print(f"policy server: {error}", file=sys.stderr)
        return 2
    server = PolicyServer(options.directory, options.archive_sha256, sealed=options.sealed)
    door = Door(listener, session_key, server.welcome, connections=options.connections)
    if session_key is not None:
        door.open()  # who holds the key may ask how the loading goes
    _watch_loading(server, options.load_timeout, lingers=session_key is not None)
    server.load()
    if session_key is None and server.wait_loaded(0) is HostState.SERVING:
        door.open()
        host, port = listener.getsockname()[:2]
        print(f"serving {options.directory} on {host}:{port}", flush=True)
    threading.Event().wait()  # a signal ends the process, or the watcher when nothing was loaded
    return 0


def _watch_loading(server: PolicyServer, timeout_seconds: float, *, lingers: bool) -> None:
    """End the process when the agent did not load in time, after the reason could be asked for."""

    def watch() -> None:
        if server.wait_loaded(timeout_seconds) is HostState.LOADING:
            words = f"the submission did not load within {timeout_seconds:g} s; it stands at:"
            server.fail(f"{words}\n{server.loading_at()}")
        if server.wait_loaded(0) is HostState.FAILED:
            time.sleep(LINGER_AFTER_FAILURE_SECONDS if lingers else 0)
            end_process(EXIT_NOT_LOADED)

    threading.Thread(target=watch, name="watch loading", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
