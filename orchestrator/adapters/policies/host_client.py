"""Hands a submission's archive to the submission host of its container, and waits until it serves."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.domain.errors import InfrastructureError, SubmissionError, SubmissionSilent
from orchestrator.ports import Endpoint, HostClient
from orchestrator.submission.handshake import (
    HandshakeFailed,
    HostState,
    prove_as_client,
    receive_message,
    send_message,
)
from orchestrator.submission.transport import ByteStream, ConnectionLost
from orchestrator.submission.wire import WireError

FIRST_PAUSE_SECONDS = 0.02
LONGEST_PAUSE_SECONDS = 0.5
SEALING_PAUSE_SECONDS = 0.1
REQUEST_SECONDS = 10.0
CHUNK_BYTES = 256 * 1024

# The host itself ends a preparation that takes too long, and says more of it.
PREPARATION_GRACE_SECONDS = 15.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer:
    """How the host says that it stands; `where` the submission stands until it serves, if it is told."""

    state: HostState
    where: str = ""
    sealed: bool = False


@dataclass(frozen=True)
class SubmissionHostClient(HostClient):
    """The host at `endpoint`.

    It is given up for lost when every connection failed for `grace_seconds`; a single one may fail while the
    host turns into the policy server. One that is open but silent is only busy: some imports let no other
    thread run.

    With `require_sealed` it gets nothing before it says that its network was proved to be closed.
    """

    endpoint: Endpoint
    session_key: bytes = field(repr=False)
    grace_seconds: float = 5.0
    environment_timeout_seconds: float = 600.0
    require_sealed: bool = False

    async def push_archive(
        self,
        archive: Path,
        sha256: str,
        timeout_seconds: float,
        tell: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        """Returns when the policy answers; pushing again to a host that has the archive only waits.

        While the host makes the submission's environment, `timeout_seconds` stands still, and `tell` hears
        what goes on, and "" when that is done. They begin anew once a host that seals itself is sealed.

        Raises:
            SubmissionError: the archive was refused, or the policy did not load (with its traceback), also
                not in time.
            SubmissionSilent: the host was lost or did not prove the session key once it held the archive: by
                then it is the submission that answers.
            InfrastructureError: likewise before that, or it was late before that, also with the proof that
                its network is closed.
        """
        start_up = _StartUp(timeout_seconds, self.environment_timeout_seconds)
        pause = FIRST_PAUSE_SECONDS
        answered_at = time.monotonic()
        last = Answer(HostState.WAITING)
        told = ""
        held = False
        while True:
            try:
                step = partial(self._advance, archive, sha256, held, last, start_up.deadline)
                last = await _in_thread(step)
                answered_at = time.monotonic()
            except ConnectionLost as error:
                if time.monotonic() >= min(start_up.deadline, answered_at + self.grace_seconds):
                    raise _loss(held, str(error)) from error
            except TimeoutError:
                answered_at = time.monotonic()
            except (WireError, HandshakeFailed) as error:
                raise _loss(held, str(error)) from error
            if last.state is HostState.SERVING:
                return
            held = held or last.state in (HostState.PREPARING, HostState.LOADING)
            start_up.note(last.state)
            doing = last.where if last.state in (HostState.SEALING, HostState.PREPARING) else ""
            if tell is not None and doing != told:
                await tell(told := doing)
                start_up.note(last.state)  # again: that this took its time is no fault of the submission
            if time.monotonic() >= start_up.deadline:
                raise _lateness(held, start_up.allowed_seconds, last)
            if last.state is HostState.SEALING:
                pause = min(pause, SEALING_PAUSE_SECONDS)
            await asyncio.sleep(min(pause, max(start_up.deadline - time.monotonic(), 0)))
            pause = min(pause * 1.5, LONGEST_PAUSE_SECONDS)

    def _checked(self, answer: Answer) -> Answer:
        if self.require_sealed and answer.state is not HostState.SEALING and not answer.sealed:
            raise InfrastructureError(
                "the submission host takes archives without a proof that its network is closed: "
                "it was started without --seal, or its image is of another version"
            )
        return answer

    def _advance(
        self, archive: Path, sha256: str, held: bool, last: Answer, deadline: float, call: _Call
    ) -> Answer:
        """One connection: push unless the host holds the archive or seals itself; then ask how it stands."""
        soon = min(deadline, time.monotonic() + REQUEST_SECONDS)
        stream = call.connect(self.endpoint, soon)
        prove_as_client(stream, self.session_key, soon)
        if held:
            return _read(_ask(stream, {"op": "status"}, soon))
        if last.state is HostState.SEALING or (self.require_sealed and not last.sealed):
            return self._checked(_read(_ask(stream, {"op": "status"}, soon)))
        size = archive.stat().st_size
        push = {"op": "push", "size": size, "sha256": sha256.lower()}
        answer = self._checked(_read(_ask(stream, push, soon)))
        if answer.state is not HostState.WAITING:
            return answer
        with archive.open("rb") as source:
            while chunk := source.read(CHUNK_BYTES):
                stream.send_all(chunk, deadline)
        return _read(receive_message(stream, deadline))


class _StartUp:
    """The time that a submission has, from when on its host takes it.

    It stands still while its environment is made, which has its own.
    """

    def __init__(self, seconds: float, environment_seconds: float) -> None:
        self.allowed_seconds = seconds
        self.deadline = time.monotonic() + seconds
        self._environment_seconds = environment_seconds
        self._left_seconds: float | None = None
        self._prepared_by = 0.0
        self._sealing = False

    def note(self, state: HostState) -> None:
        """The host has just said that it is in this state."""
        now = time.monotonic()
        if self._sealing and state is not HostState.SEALING:
            self.deadline = now + self.allowed_seconds
        self._sealing = state is HostState.SEALING
        if state is not HostState.PREPARING:
            return
        if self._left_seconds is None:
            self._left_seconds = max(self.deadline - now, 0.0)
            self._prepared_by = now + self._environment_seconds + PREPARATION_GRACE_SECONDS
        self.deadline = min(now + self._left_seconds, self._prepared_by)


def _loss(held: bool, reason: str) -> InfrastructureError:
    return (
        SubmissionSilent(reason) if held else InfrastructureError(f"the submission host was lost: {reason}")
    )


def _lateness(held: bool, timeout_seconds: float, last: Answer) -> SubmissionError | InfrastructureError:
    if last.state is HostState.SEALING:
        return InfrastructureError(
            f"the submission host did not prove within {timeout_seconds:.3g} s that its network is closed"
            f"{f' ({last.where})' if last.where else ''}, so it got no archive. The cluster does not enforce "
            "the NetworkPolicy of the submissions' namespace: see that its network plugin enforces policies, "
            "and that the default-deny policy of kuberay/ is applied there; `orchestrator preflight` shows it"
        )
    if not held:
        return InfrastructureError("the submission host did not take the archive in time")
    stands = f"; it stands at:\n{last.where}" if last.where else ""
    return SubmissionError(f"the submission did not load within {timeout_seconds:.3g} s{stands}")


def _ask(stream: ByteStream, request: dict[str, Any], deadline: float) -> dict[str, Any]:
    send_message(stream, request, deadline)
    return receive_message(stream, deadline)


def _read(answer: dict[str, Any]) -> Answer:
    try:
        state = HostState(str(answer.get("state")))
    except ValueError:
        raise WireError(f"an unknown state {str(answer.get('state'))[:32]!r}") from None
    if state is HostState.FAILED:
        reason = str(answer.get("error") or "the submission did not load")
        raise InfrastructureError(reason) if answer.get("ours") is True else SubmissionError(reason)
    if answer.get("ok") is not True:
        raise WireError(f"it refused: {answer.get('error')}")
    return Answer(state, str(answer.get("where") or ""), answer.get("sealed") is True)


class _Call:
    """Lets the event loop end a blocking call: its connection is cut."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stream: ByteStream | None = None
        self._cancelled = False

    def connect(self, endpoint: Endpoint, deadline: float) -> ByteStream:
        try:
            stream = ByteStream.connect(endpoint.host, endpoint.port, deadline)
        except TimeoutError as error:  # the kernel answers even for a busy host: this one is gone
            raise ConnectionLost(str(error)) from error
        with self._lock:
            self._stream = stream
            if self._cancelled:
                stream.abort()
        return stream

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True
            if self._stream is not None:
                self._stream.abort()

    def close(self) -> None:
        with self._lock:
            if self._stream is not None:
                self._stream.close()
                self._stream = None


async def _in_thread(step: Callable[[_Call], T]) -> T:
    call = _Call()

    def run() -> T:
        try:
            return step(call)
        finally:
            call.close()

    try:
        return await asyncio.to_thread(run)
    except asyncio.CancelledError:
        call.cancel()
        raise
