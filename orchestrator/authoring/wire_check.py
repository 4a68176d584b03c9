"""Holds a policy server against docs/protocol.md, rule by rule. Blocking; belongs to one thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from orchestrator.authoring import wire_rules as rules
from orchestrator.authoring.findings import Finding
from orchestrator.authoring.measurements import in_words
from orchestrator.authoring.wire_answers import Broken, actions_of, check_acknowledgement, metadata_of
from orchestrator.authoring.wire_probe import (
    CLOSE_SECONDS,
    MAX_MESSAGE_BYTES,
    NO_FRAMES,
    Answer,
    Came,
    NotOpened,
    ProbeLine,
    ServerUnderTest,
)
from orchestrator.ports import Observation
from orchestrator.submission.wire import packb

QUIET_SECONDS = 0.3
RELEASE_SECONDS = 2.0
RELEASE_POLL_SECONDS = 0.05
LARGE_BYTES = 2 * 2**20  # twice what WebSocket libraries take unless they are told
EPISODE, SEED = 3, 1234567
ACTS = 3
NO_MESSAGE = b"\xc1"  # the one byte that MessagePack never uses
KNOWN_EXTENSIONS = ("reset", "sequence")


@dataclass(frozen=True, slots=True)
class ProbeObservation:
    """What is sent to the policy. One that is `made_up` may be none that it knows."""

    values: Observation
    made_up: bool = False


MADE_UP = ProbeObservation({"observation": np.zeros(4, np.float32)}, made_up=True)


@dataclass
class WireCheck:
    """One check of a server; `add` gets each finding as it is known.

    What comes within `quiet_seconds` though nobody asked for it is seen.
    """

    server: ServerUnderTest
    probe: ProbeObservation
    add: Callable[[Finding], None]
    quiet_seconds: float = QUIET_SECONDS
    extensions: frozenset[str] = field(default=frozenset(), init=False)
    _spoke_unasked: bool = field(default=False, init=False)

    def run(self) -> bool:
        """Look at every rule; whether episodes can be played with the server."""
        if not self._stage(self._greet):
            return False
        is_playable = self._stage(self._converse)
        for stage in (self._connect_twice, self._part, self._send_no_message):
            self._stage(stage)
        if is_playable:
            self._stage(self._cause_an_error)
            self._stage(self._send_much)
        else:
            for rule in (rules.ERRORS, rules.LARGE):
                self.add(rule.not_applicable("cannot be told while observations are not answered"))
        if not self._spoke_unasked:
            self.add(rules.UNASKED.kept("nothing came that was not asked for"))
        return is_playable

    def _stage(self, stage: Callable[[], None]) -> bool:
        try:
            stage()
        except (Broken, NotOpened) as error:
            if self.server.is_stopped:
                raise  # what was seen since was our own doing
            self.add(error.finding if isinstance(error, Broken) else _not_opened_again(error))
            return False
        return True

    @contextmanager
    def _greeted(self) -> Iterator[ProbeLine]:
        """A connection whose metadata was read. Who serves one at a time may still be busy with the last."""
        until = time.monotonic() + RELEASE_SECONDS
        while True:
            with self.server.line() as line:
                answer = line.receive(self.server.connect_seconds)
                if answer.came is not Came.END or time.monotonic() > until:
                    metadata_of(answer)
                    yield line
                    return
            time.sleep(RELEASE_POLL_SECONDS)

    # ------------------------------------------------------------------------------------- greeting

    def _greet(self) -> None:
        try:
            with self.server.line() as line:
                self.add(rules.CONNECTION.kept("TCP is accepted"))
                self.add(rules.UPGRADE.kept("a WebSocket opens at /, without compression"))
                metadata = metadata_of(line.receive(self.server.connect_seconds))
                self._take_announcement(metadata)
                self._listen(line)
        except NotOpened as error:
            raise Broken(self._why_not_opened(error)) from error

    def _why_not_opened(self, error: NotOpened) -> Finding:
        if not error.is_connected:
            return rules.CONNECTION.broken(error.words)
        self.add(rules.CONNECTION.kept("TCP is accepted"))
        if error.words.startswith(NO_FRAMES):
            return rules.FRAMES.broken(f"first came what is {error.words}")
        if "extensions" in error.words:
            return rules.UPGRADE.broken("the server chose an extension that was not offered: no compression")
        return rules.UPGRADE.broken(error.words)

    def _take_announcement(self, metadata: dict[str, Any]) -> None:
        announced = metadata.get("extensions", [])
        if not isinstance(announced, list) or not all(isinstance(name, str) for name in announced):
            raise Broken(rules.METADATA.broken("`extensions` is not a list of texts"))
        self.extensions = frozenset(announced) & frozenset(KNOWN_EXTENSIONS)
        names = ", ".join(sorted(self.extensions)) or "none"
        self.add(rules.METADATA.kept(f"a map, before any request; extensions: {names}"))

    # --------------------------------------------------------------------------------- conversation

    def _converse(self) -> None:
        with self._greeted() as line:
            self._reset(line)
            number, answer = self._act(line)
            if answer.came is Came.TEXT and self.probe.made_up:
                why = "the policy does not know an observation that was made up: give --benchmark"
                self.add(rules.REPLY.not_applicable(f"{why} ({answer})"))
                return
            first = [actions_of(number, answer)]
            self.add(rules.REPLY.kept("a binary message with a map, and `actions` in it"))
            self.add(rules.ENCODING.kept(f"`actions` is {_kind(first[0])}"))
            first += [actions_of(*self._act(line)) for _ in range(ACTS - 1)]
            self._say_of_extensions()
            self._listen(line)
            self._compare(line, first)
            size = f"{line.largest_bytes} bytes at most, of {MAX_MESSAGE_BYTES >> 20} MiB"
            self.add(rules.SIZE.kept(size))

    def _reset(self, line: ProbeLine) -> None:
        if "reset" in self.extensions:
            check_acknowledgement(*line.reset(EPISODE, SEED))

    def _act(self, line: ProbeLine) -> tuple[int | None, Answer]:
        return line.act(self.probe.values, numbered="sequence" in self.extensions)

    def _say_of_extensions(self) -> None:
        if "reset" in self.extensions:
            self.add(rules.RESET.kept("is acknowledged"))
        else:
            self.add(rules.RESET.not_applicable("not announced: every episode gets a connection of its own"))
        if "sequence" in self.extensions:
            self.add(rules.SEQUENCE.kept("each answer has the number of its observation"))
        else:
            self.add(rules.SEQUENCE.not_applicable("not announced"))

    def _compare(self, line: ProbeLine, first: list[Any]) -> None:
        """Whether the same reset brings the same actions."""
        if "reset" not in self.extensions:
            self.add(rules.SAME_AGAIN.not_applicable("`reset` is not announced"))
            return
        self._reset(line)
        for step, actions in enumerate(first):
            again = actions_of(*self._act(line))
            if packb(again) != packb(actions):
                seen = (
                    f"after the same reset, observation {step} was answered by {in_words(again)}, "
                    f"and by {in_words(actions)} before"
                )
                self.add(rules.SAME_AGAIN.broken(seen, "a reset makes the policy forget, and seeds it"))
                return
        self.add(rules.SAME_AGAIN.kept("after the same reset the same observations get the same actions"))

    # ------------------------------------------------------------------------- connections and ends

    def _connect_twice(self) -> None:
        with self._greeted() as first:
            try:
                with self.server.line() as second:
                    answer = second.receive(self.server.connect_seconds)
            except NotOpened as error:
                answer = Answer(Came.END if error.is_refusal else Came.NOTHING, reason=error.words)
            # A refused one must not have disturbed the first.
            still = first.receive(self.quiet_seconds)
        if still.came is not Came.NOTHING:
            raise Broken(rules.SECOND.broken(f"a second connection disturbed the first: there came {still}"))
        if answer.as_map is not None:
            self.add(rules.SECOND.kept("is served beside the first"))
        elif answer.came in (Came.END, Came.TEXT):
            self.add(rules.SECOND.kept("is refused at once: jobs may have one worker only"))
        else:
            advice = "serve it, or refuse it at once: a worker waits for its metadata"
            raise Broken(rules.SECOND.broken(f"beside the first there came {answer}", advice))

    def _part(self) -> None:
        with self._greeted() as line:
            answer = line.say_goodbye(CLOSE_SECONDS)
        if answer.came is not Came.END:
            raise Broken(rules.CLOSING.broken(f"to a Close frame there came {answer}"))
        self.add(rules.CLOSING.kept("a Close frame is answered"))

    def _send_no_message(self) -> None:
        with self._greeted() as line:
            answer = line.ask(NO_MESSAGE)
        if answer.came not in (Came.TEXT, Came.END):
            seen = f"the byte c1, which is no MessagePack, was answered by {answer}"
            raise Broken(rules.NO_MESSAGE.broken(seen, "send the error as a text message, or close"))
        self.add(rules.NO_MESSAGE.kept("is refused"))

    def _cause_an_error(self) -> None:
        """An observation that is a message, but none that a policy knows: a map without any entry."""
        with self._greeted() as line:
            self._reset(line)
            _, answer = line.act({}, numbered="sequence" in self.extensions)
        if answer.came is Came.TEXT:
            self.add(rules.ERRORS.kept("a policy that cannot answer says why in a text message"))
        elif "actions" in (answer.as_map or {}):
            self.add(rules.ERRORS.not_applicable("the policy answers an empty observation, too"))
        else:
            seen = f"an observation that the policy cannot know was answered by {answer}"
            raise Broken(rules.ERRORS.broken(seen, "send the error as a text message, then close"))

    def _send_much(self) -> None:
        with self._greeted() as line:
            self._reset(line)
            observation = {**self.probe.values, "padding": bytes(LARGE_BYTES)}
            _, answer = line.act(observation, numbered="sequence" in self.extensions)
        if answer.came not in (Came.TEXT, Came.VALUE):
            seen = f"an observation of {LARGE_BYTES >> 20} MiB was answered by {answer}"
            advice = "raise the limit of the WebSocket library to 64 MiB: pictures are large"
            raise Broken(rules.LARGE.broken(seen, advice))
        self.add(rules.LARGE.kept(f"an observation of {LARGE_BYTES >> 20} MiB is read"))

    # ---------------------------------------------------------------------------------- all the time

    def _listen(self, line: ProbeLine) -> None:
        """Make sure that nothing comes that was not asked for."""
        answer = line.receive(self.quiet_seconds)
        if answer.came is not Came.NOTHING:
            self._spoke_unasked = True
            raise Broken(rules.UNASKED.broken(f"without a request there came {answer}"))


def _not_opened_again(error: NotOpened) -> Finding:
    return rules.CONNECTION.broken(f"no further connection could be opened: {error.words}")


def _kind(actions: Any) -> str:
    if isinstance(actions, dict):
        return f"a map of {', '.join(f'{key}: {_kind(part)}' for key, part in actions.items())}"
    if isinstance(actions, np.ndarray | np.generic):
        return f"{actions.dtype} {list(actions.shape)}"
    return type(actions).__name__
