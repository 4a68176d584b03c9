"""What an answer of a server under test has to be: its value, or the rule that it breaks."""

from __future__ import annotations

from typing import Any

from orchestrator.authoring import wire_rules as rules
from orchestrator.authoring.findings import Finding
from orchestrator.authoring.wire_probe import CONTROL_KEY, SEQUENCE_KEY, Answer, Came
from orchestrator.authoring.wire_rules import Rule


class Broken(Exception):
    """A rule was broken in a way that leaves nothing to look at on this connection."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding)
        self.finding = finding


def metadata_of(answer: Answer) -> dict[str, Any]:
    """The metadata. Raises Broken where the answer is none."""
    if answer.as_map is None:
        advice = "the server speaks first: a binary message with a map, before any request"
        raise Broken(_rule_of(answer, rules.METADATA).broken(f"first came {answer}", advice))
    return answer.as_map


def check_acknowledgement(number: int, answer: Answer) -> None:
    """Return where the answer acknowledges reset `number`, else raise Broken."""
    due = f'due is a map with "{CONTROL_KEY}": "reset" and "sequence": {number}'
    reply = answer.as_map
    if reply is None or reply.get(CONTROL_KEY) != "reset":
        raise Broken(_rule_of(answer, rules.RESET).broken(f"a reset was answered by {answer}", due))
    if reply.get("sequence") != number:
        raise Broken(rules.RESET.broken(f"the answer to a reset has {_entry(reply, 'sequence')}", due))


def actions_of(number: int | None, answer: Answer) -> Any:
    """The actions for an observation, which had `number` or none. Raises Broken where there are none."""
    reply = answer.as_map
    if reply is None:
        raise Broken(_rule_of(answer, rules.REPLY).broken(f"an observation was answered by {answer}"))
    if "actions" not in reply:
        raise Broken(rules.REPLY.broken(f"an observation was answered by {answer}", "`actions` is due"))
    if number is not None and reply.get(SEQUENCE_KEY) != number:
        asked = f'an observation with "{SEQUENCE_KEY}": {number}'
        seen = f"the answer to {asked} has {_entry(reply, SEQUENCE_KEY)}"
        raise Broken(rules.SEQUENCE.broken(seen, "an answer repeats the number of its observation"))
    return reply["actions"]


def _rule_of(answer: Answer, due: Rule) -> Rule:
    """The rule that a broken answer breaks: that of its size, frames or encoding, else the one at hand."""
    if answer.is_too_large:
        return rules.SIZE
    if answer.breaks_frames:
        return rules.FRAMES
    return rules.ENCODING if answer.came is Came.GARBAGE else due


def _entry(reply: dict[str, Any], key: str) -> str:
    return f'"{key}": {reply[key]!r}' if key in reply else f'no "{key}"'
