from __future__ import annotations

import threading

from orchestrator.diagnosis.findings import Check, Finding, State, diagnose
from orchestrator.domain.errors import InfrastructureError


async def test_a_check_that_fails_or_hangs_is_a_finding_and_holds_up_no_other() -> None:
    let_go = threading.Event()

    def fails() -> Finding:
        raise KeyError("nothing there, postgresql://user:hunter2@host/db")

    def refuses() -> Finding:
        raise InfrastructureError("the server is away")

    def hangs() -> Finding:
        let_go.wait(60)
        return Finding.ok("too late")

    async def awaited() -> Finding:
        return Finding.ok("by waiting")

    checks = [
        Check("a", "fails", fails),
        Check("a", "refuses", refuses),
        Check("a", "hangs", hangs, deadline_seconds=0.05),
        Check("a", "awaited", awaited),
        Check("a", "blocks", lambda: Finding.ok("at once")),
    ]

    found = await diagnose(checks)
    let_go.set()

    assert [one.name for one in found] == ["fails", "refuses", "hangs", "awaited", "blocks"]
    assert [one.finding.state for one in found] == [State.BROKEN] * 3 + [State.OK] * 2
    assert found[0].finding.what.startswith("could not be looked at: KeyError: ")
    assert "hunter2" not in found[0].finding.what
    assert found[1].finding.what == "the server is away"
    assert found[2].finding.what == "no answer within 0.05 s"
