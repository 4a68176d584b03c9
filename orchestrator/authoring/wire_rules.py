"""The rules of docs/protocol.md that a server can be seen to keep, each with the section that says it."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.authoring.findings import Finding, Mark

PAGE = "docs/protocol.md"


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule; its findings name the section only where it was broken."""

    name: str
    section: int

    def kept(self, text: str) -> Finding:
        return Finding(Mark.OK, self.name, text)

    def broken(self, seen: str, advice: str = "") -> Finding:
        return Finding(Mark.WRONG, self.name, seen, advice=advice, see=f"{PAGE}, section {self.section}")

    def not_applicable(self, why: str) -> Finding:
        return Finding(Mark.SKIPPED, self.name, why)


CONNECTION = Rule("connection", 1)
UPGRADE = Rule("upgrade", 1)
FRAMES = Rule("frames", 2)
METADATA = Rule("metadata", 3)
ENCODING = Rule("encoding", 4)
REPLY = Rule("reply", 5)
UNASKED = Rule("one reply each", 5)
RESET = Rule("reset", 6)
SAME_AGAIN = Rule("same again", 6)
SEQUENCE = Rule("sequence", 6)
ERRORS = Rule("errors", 7)
NO_MESSAGE = Rule("what is no message", 7)
LARGE = Rule("large messages", 8)
SIZE = Rule("size of replies", 8)
SECOND = Rule("second connection", 9)
CLOSING = Rule("closing", 10)
