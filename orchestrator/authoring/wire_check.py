"""Holds a policy server against docs/protocol.md, rule by rule. Blocking; belongs to one thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from orchestrator.authoring import wire_rules as rules
from orchestrator.authoring.findings import Finding
from orchestrator.authoring.measurements import in_words
from orchestrator.authoring.wire_probe import (
    CLOSE_SECONDS,
    CONTROL_KEY,
    MAX_MESSAGE_BYTES,
    SEQUENCE_KEY,
    Answer,
    Came,
    NotOpened,
    ProbeLine,
    ServerUnderTest,
)
from orchestrator.authoring.wire_rules import Rule
from orchestrator.ports import Observation
from orchestrator.submission.wire import packb

QUIET_SECONDS = 0.3
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


class _Broken(Exception):
    """A rule was broken in a way that leaves nothing to look at on this connection."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding)
        self.finding = finding


@dataclass
class WireCheck:
    """One check of a server; `add` gets each finding as it is known."""

    server: ServerUnderTest
    probe: ProbeObservation
    add: Callable[[Finding], None]
    extensions: frozenset[str] = field(default=frozenset(), init=False)
    _spoke_unasked: bool = field(default=False, init=False)

    def run(self) -> bool:
        """Look at every rule; whether episodes can be played with the server."""
        if not self._stage(self._greet):
            return False
        is_playable = self._stage(self._converse)
        for stage in (self._connect_twice, self._part, self._cause_an_error, self._send_no_message):
            self._stage(stage)
        self._stage(self._send_much)
        if not self._spoke_unasked:
            self.add(rules.UNASKED.kept("nothing came that was not asked for"))
        return is_playable

    def _stage(self, stage: Callable[[], None]) -> bool:
        try:
            stage()
        except (_Broken, NotOpened) as error:
            if self.server.is_stopped:
                raise  # what was seen since was our own doing
            self.add(error.finding if isinstance(error, _Broken) else _not_opened_again(error))
            return False
        return True

    # ------------------------------------------------------------------------------------- greeting

    def _greet(self) -> None:
        try:
            with self.server.line() as line:
                self.add(rules.CONNECTION.kept("TCP is accepted"))
                self.add(rules.UPGRADE.kept("a WebSocket opens at /, without compression"))
                self._take_announcement(self._metadata(line))
                self._listen(line)
        except NotOpened as error:
            if not error.is_connected:
                raise _Broken(rules.CONNECTION.broken(error.words)) from error
            self.add(rules.CONNECTION.kept("TCP is accepted"))
            raise _Broken(rules.UPGRADE.broken(error.words)) from error

    def _take_announcement(self, metadata: dict[str, Any]) -> None:
        announced = metadata.get("extensions", [])
        if not isinstance(announced, list) or not all(isinstance(name, str) for name in announced):
            raise _Broken(rules.METADATA.broken("`extensions` is not a list of texts"))
        self.extensions = frozenset(announced) & frozenset(KNOWN_EXTENSIONS)
        names = ", ".join(sorted(self.extensions)) or "none"
        self.add(rules.METADATA.kept(f"a map, before any request; extensions: {names}"))

    def _metadata(self, line: ProbeLine) -> dict[str, Any]:
        answer = line.receive(self.server.connect_seconds)
        if answer.as_map is None:
            advice = "the server speaks first: a binary message with a map, before any request"
            raise _Broken(_rule_of(answer, rules.METADATA).broken(f"first came {answer}", advice))
        return answer.as_map

    # --------------------------------------------------------------------------------- conversation

    def _converse(self) -> None:
        with self.server.line() as line:
            self._metadata(line)
            self._reset(line)
            number, answer = self._act(line)
            if answer.came is Came.TEXT and self.probe.made_up:
                self._skip_replies(answer)
                return
            first = [self._actions(number, answer)]
            self.add(rules.REPLY.kept("a binary message with a map, and `actions` in it"))
            self.add(rules.ENCODING.kept(f"`actions` is {_kind(first[0])}"))
            first += [self._actions(*self._act(line)) for _ in range(ACTS - 1)]
            self._say_of_extensions()
            self._listen(line)
            self._compare(line, first)
            self.add(_size(line.largest_bytes))

    def _skip_replies(self, answer: Answer) -> None:
        why = f"the policy cannot use an observation that was made up: give --benchmark ({answer})"
        for rule in (rules.REPLY, rules.ENCODING, rules.SEQUENCE, rules.SAME_AGAIN, rules.SIZE):
            self.add(rule.not_applicable(why))

    def _reset(self, line: ProbeLine) -> None:
        if "reset" not in self.extensions:
            return
        number, answer = line.reset(EPISODE, SEED)
        due = f'due is a map with "{CONTROL_KEY}": "reset" and "sequence": {number}'
        reply = answer.as_map
        if reply is None or reply.get(CONTROL_KEY) != "reset":
            rule = _rule_of(answer, rules.RESET)
            raise _Broken(rule.broken(f"a reset was answered by {answer}", due))
        if reply.get("sequence") != number:
            seen = f'in the answer to a reset "sequence" is {reply.get("sequence")!r}'
            raise _Broken(rules.RESET.broken(seen, due))

    def _act(self, line: ProbeLine) -> tuple[int | None, Answer]:
        return line.act(self.probe.values, numbered="sequence" in self.extensions)

    def _actions(self, number: int | None, answer: Answer) -> Any:
        reply = answer.as_map
        if reply is None:
            raise _Broken(_rule_of(answer, rules.REPLY).broken(f"an observation was answered by {answer}"))
        if "actions" not in reply:
            raise _Broken(rules.REPLY.broken(f"an observation was answered by {answer}", "`actions` is due"))
        if number is not None and reply.get(SEQUENCE_KEY) != number:
            seen = f'to an observation with "{SEQUENCE_KEY}": {number} the answer has '
            seen += repr(reply[SEQUENCE_KEY]) if SEQUENCE_KEY in reply else "none"
            raise _Broken(rules.SEQUENCE.broken(seen, "an answer repeats the number of its observation"))
        return reply["actions"]

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
            again = self._actions(*self._act(line))
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
        with self.server.line() as first:
            self._metadata(first)
            try:
                with self.server.line() as second:
                    answer = second.receive(self.server.connect_seconds)
            except NotOpened as error:
                answer = Answer(Came.END if error.is_refusal else Came.NOTHING, words=error.words)
            # A refused one must not have disturbed the first.
            still = first.receive(QUIET_SECONDS)
        if still.came is not Came.NOTHING:
            raise _Broken(rules.SECOND.broken(f"a second connection disturbed the first: there came {still}"))
        if answer.as_map is not None:
            self.add(rules.SECOND.kept("is served beside the first"))
        elif answer.came in (Came.END, Came.TEXT):
            self.add(rules.SECOND.kept("is refused at once: jobs may have one worker only"))
        else:
            advice = "serve it, or refuse it at once: a worker waits for its metadata"
            raise _Broken(rules.SECOND.broken(f"beside the first there came {answer}", advice))

    def _part(self) -> None:
        with self.server.line() as line:
            self._metadata(line)
            answer = line.say_goodbye(CLOSE_SECONDS)
        if answer.came is not Came.END:
            raise _Broken(rules.CLOSING.broken(f"to a Close frame there came {answer}"))
        self.add(rules.CLOSING.kept("a Close frame is answered"))

    def _cause_an_error(self) -> None:
        """An observation that is a message, but none that a policy knows: a map without any entry."""
        with self.server.line() as line:
            self._metadata(line)
            self._reset(line)
            _, answer = line.act({}, numbered="sequence" in self.extensions)
        if answer.came is Came.TEXT:
            self.add(rules.ERRORS.kept("a policy that cannot answer says why in a text message"))
        elif answer.as_map is not None:
            self.add(rules.ERRORS.not_applicable("the policy answers an empty observation, too"))
        else:
            advice = "send the error as a text message, then close"
            raise _Broken(
                _rule_of(answer, rules.ERRORS).broken(
                    f"an observation that the policy does not know was answered by {answer}", advice
                )
            )

    def _send_no_message(self) -> None:
        with self.server.line() as line:
            self._metadata(line)
            answer = line.ask(NO_MESSAGE)
        if answer.came in (Came.TEXT, Came.END):
            self.add(rules.NO_MESSAGE.kept("is refused"))
        else:
            seen = f"the byte c1, which is no MessagePack, was answered by {answer}"
            raise _Broken(rules.NO_MESSAGE.broken(seen, "send the error as a text message, or close"))

    def _send_much(self) -> None:
        with self.server.line() as line:
            self._metadata(line)
            self._reset(line)
            observation = {**self.probe.values, "padding": bytes(LARGE_BYTES)}
            _, answer = line.act(observation, numbered="sequence" in self.extensions)
        if answer.came in (Came.TEXT, Came.VALUE):
            self.add(rules.LARGE.kept(f"an observation of {LARGE_BYTES >> 20} MiB is read"))
        else:
            advice = "raise the limit of the WebSocket library to 64 MiB: pictures are large"
            seen = f"an observation of {LARGE_BYTES >> 20} MiB was answered by {answer}"
            raise _Broken(rules.LARGE.broken(seen, advice))

    # ---------------------------------------------------------------------------------- all the time

    def _listen(self, line: ProbeLine) -> None:
        """Make sure that nothing comes that was not asked for."""
        answer = line.receive(QUIET_SECONDS)
        if answer.came is not Came.NOTHING:
            self._spoke_unasked = True
            raise _Broken(rules.UNASKED.broken(f"without a request there came {answer}"))


def _not_opened_again(error: NotOpened) -> Finding:
    return rules.CONNECTION.broken(f"no further connection could be opened: {error.words}")


def _size(largest_bytes: int) -> Finding:
    return rules.SIZE.kept(f"{largest_bytes} bytes at most, of {MAX_MESSAGE_BYTES >> 20} MiB")


def _rule_of(answer: Answer, due: Rule) -> Rule:
    """The rule that a broken answer breaks: that of its frames or its encoding, else the one at hand."""
    if answer.came is not Came.GARBAGE:
        return due
    if "above the size limit" in answer.words or "above the limit of" in answer.words:
        return rules.SIZE
    return rules.FRAMES if answer.words.startswith("not the WebSocket protocol") else rules.ENCODING


def _kind(actions: Any) -> str:
    if isinstance(actions, dict):
        return f"a map of {', '.join(f'{key}: {_kind(part)}' for key, part in actions.items())}"
    if isinstance(actions, np.ndarray | np.generic):
        return f"{actions.dtype} {list(actions.shape)}"
    return type(actions).__name__
