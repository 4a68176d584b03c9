"""Takes a submission's archive over an authenticated connection, and answers for what becomes of it."""

from __future__ import annotations

import hashlib
import queue
import secrets
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.submission.archive import ArchiveLimits, ArchiveRefused, unpack
from orchestrator.submission.children import Stopping
from orchestrator.submission.handshake import HostState, reply, send_message
from orchestrator.submission.installation import CannotInstall
from orchestrator.submission.own_server import DoesNotServe, OwnServer
from orchestrator.submission.preparation import Prepared
from orchestrator.submission.relay import Relay
from orchestrator.submission.requirements import Uninstallable
from orchestrator.submission.transport import ByteStream, ConnectionLost

CHUNK_BYTES = 256 * 1024
REPLY_SECONDS = 10.0
SHOWN_CHARACTERS = 200
MAX_REASON_CHARACTERS = 12_000

Prepare = Callable[[Path, str, Callable[[str], None]], Prepared]
"""Given the submission's directory, its archive's sha256 and whom to tell what goes on."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A submission that can be started."""

    directory: Path
    sha256: str
    prepared: Prepared


@dataclass(frozen=True, slots=True)
class Failed:
    """The submission cannot be used, or not here; whoever asks is told why."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The submission's own server has ended with this exit code, negative for a signal."""

    code: int


@dataclass(frozen=True, slots=True)
class Signalled:
    """This process is asked to end."""

    number: int


Event = Ready | Failed | Ended | Signalled


class SubmissionHost:
    """Takes one archive below `workdir`, and answers for it; the main thread learns by `events`."""

    def __init__(
        self,
        workdir: Path,
        max_archive_bytes: int,
        limits: ArchiveLimits,
        push_seconds: float,
        prepare: Prepare,
        *,
        sealing: bool = False,
    ) -> None:
        self._workdir = workdir
        self._max_archive_bytes = max_archive_bytes
        self._limits = limits
        self._push_seconds = push_seconds
        self._prepare = prepare
        self._lock = threading.Lock()
        self._state = HostState.SEALING if sealing else HostState.WAITING
        self._sealed = False
        self._error: str | None = None
        self._ours = False  # the error
        self._doing = ""
        self._pusher: ByteStream | None = None
        self._sha256: str | None = None
        self._server: OwnServer | None = None
        self.relay = Relay()
        # Simple: the handler of a signal may put into it, whatever the main thread is at.
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    @property
    def failed(self) -> bool:
        """Whether the submission cannot be used."""
        return self._state is HostState.FAILED

    def welcome(self, stream: ByteStream, request: dict[str, Any] | None, deadline: float) -> None:
        """Answer the one request of a connection that holds the key."""
        operation = None if request is None else request.get("op")
        if request is not None and operation == "push":
            self._take_push(stream, request, deadline)
            return
        if operation == "policy" and self._state is HostState.SERVING:
            self._pass_through(stream, deadline)
            return
        answer = self._standing()
        if operation == "policy":
            answer |= {"ok": False, "error": answer["error"] or f"the submission host is {answer['state']}"}
        elif operation != "status":
            answer |= {"ok": False, "error": f"unknown operation {str(operation)[:32]!r}"}
        send_message(stream, answer, deadline)

    def _standing(self) -> dict[str, Any]:
        with self._lock:
            state, error, ours, where = self._state, self._error, self._ours, self._doing
            if state is HostState.LOADING and self._server is not None:
                where = self._server.where
        answer = self._reply(state is not HostState.FAILED, state, error)
        return answer | ({"where": where} if where else {}) | ({"ours": True} if ours else {})

    def _reply(self, ok: bool, state: HostState, error: str | None = None) -> dict[str, Any]:
        return reply(ok, state, error, sealed=self._sealed)

    def tell_sealing(self, what: str) -> None:
        """Why the network is not known to be closed yet."""
        with self._lock:
            if self._state is HostState.SEALING:
                self._doing = what[:SHOWN_CHARACTERS]

    def be_sealed(self) -> None:
        """The network is closed: take an archive from now on."""
        with self._lock:
            if self._state is HostState.SEALING:
                self._state, self._sealed, self._doing = HostState.WAITING, True, ""

    def _pass_through(self, stream: ByteStream, deadline: float) -> None:
        """Let the peer talk to the submission's own server."""
        assert self._server is not None
        try:
            server = self._server.connect(deadline)
        except (ConnectionLost, TimeoutError) as error:
            reason = f"main.py takes no connection: {error}"
            send_message(stream, self._reply(False, HostState.SERVING, reason), deadline)
            return
        try:
            send_message(stream, self._reply(True, HostState.SERVING), deadline)
            self.relay.run(stream, server)
        finally:
            server.close()

    def _tell(self, what: str) -> None:
        """What goes on while the submission's environment is made."""
        with self._lock:
            if self._state in (HostState.LOADING, HostState.PREPARING):
                self._state, self._doing = HostState.PREPARING, what[:SHOWN_CHARACTERS]

    def await_server(self, server: OwnServer, load_seconds: float) -> None:
        """Let this server serve from when on it does; otherwise its reason is told to whoever asks."""
        with self._lock:
            self._server = server
        try:
            server.wait_serving(time.monotonic() + load_seconds)
        except DoesNotServe as error:
            self.fail(str(error), logged=False)  # the log's last words are main.py's own
            return
        except Stopping:
            return
        with self._lock:
            self._state = HostState.SERVING

    def _take_push(self, stream: ByteStream, request: dict[str, Any], deadline: float) -> None:
        size, sha256 = request.get("size"), request.get("sha256")
        if type(size) is not int or size < 0 or not isinstance(sha256, str):
            send_message(stream, self._reply(False, self._state, "a push needs size and sha256"), deadline)
            return
        if size > self._max_archive_bytes:
            self.fail(f"an archive of {size} bytes, above the limit of {self._max_archive_bytes}")
        if not self._become_pusher(stream):
            answer = self._standing()
            if answer["ok"] and answer["state"] != HostState.SEALING and sha256 != self._sha256:
                answer |= {"ok": False, "error": "another archive is here already"}
            send_message(stream, answer, deadline)
            return
        send_message(stream, self._reply(True, HostState.WAITING), deadline)
        path = self._workdir / f"archive-{secrets.token_hex(8)}"
        try:
            self._receive_and_unpack(stream, path, size, sha256)
        finally:
            path.unlink(missing_ok=True)

    def _become_pusher(self, stream: ByteStream) -> bool:
        with self._lock:
            if self._state is not HostState.WAITING:
                return False
            # Who pushes again has given the last connection up, also where its end did not reach us yet.
            if self._pusher is not None:
                self._pusher.abort()
            self._pusher = stream
            return True

    def _receive_and_unpack(self, stream: ByteStream, path: Path, size: int, sha256: str) -> None:
        digest = self._receive(stream, path, size)
        with self._lock:
            if self._state is not HostState.WAITING or self._pusher is not stream:
                return
            if digest == sha256:
                self._state, self._sha256 = HostState.LOADING, sha256
            error = None if digest == sha256 else "the sha256 differs"
            answer = self._reply(error is None, self._state, error)
        try:
            send_message(stream, answer, time.monotonic() + REPLY_SECONDS)
        finally:
            # The pusher may be gone; the archive is held all the same, and whoever asks next is told.
            if digest == sha256:
                self._unpack(path, sha256)

    def _receive(self, stream: ByteStream, path: Path, size: int) -> str:
        deadline = time.monotonic() + self._push_seconds
        digest, left = hashlib.sha256(), size
        buffer = memoryview(bytearray(CHUNK_BYTES))
        with path.open("xb") as target:
            while left:
                count = stream.receive_into(buffer[: min(left, CHUNK_BYTES)], deadline)
                digest.update(buffer[:count])
                target.write(buffer[:count])
                left -= count
        return digest.hexdigest()

    def _unpack(self, path: Path, sha256: str) -> None:
        try:
            directory = unpack(path, self._workdir / "submission", self._limits)
            path.unlink()  # before exec: there is no later
            prepared = self._prepare(directory, sha256, self._tell)
        except ArchiveRefused as refused:
            self.fail(f"the archive was refused: {refused}")
        except Uninstallable as error:
            self.fail(str(error))
        except Stopping:
            return
        except CannotInstall as error:
            self.fail(str(error), ours=True)
        except Exception as error:  # noqa: BLE001 - the top of this thread; else nobody would ever hear of it
            self.fail(f"the submission host failed: {type(error).__name__}: {error}", ours=True)
        else:
            with self._lock:
                self._state, self._doing = HostState.LOADING, ""
            self.events.put(Ready(directory, sha256, prepared))

    def fail(self, reason: str, *, ours: bool = False, logged: bool = True) -> None:
        """Answer every request with `reason` from now on, and tell the main thread; `ours`: not its fault."""
        with self._lock:
            if self._state is HostState.FAILED:
                return
            self._state, self._error, self._ours = HostState.FAILED, reason[:MAX_REASON_CHARACTERS], ours
        if logged:
            print(reason, file=sys.stderr, flush=True)
        self.events.put(Failed())
