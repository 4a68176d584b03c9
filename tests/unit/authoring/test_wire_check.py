"""The rules of docs/protocol.md, each broken by a server of its own; the reports word for word."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.authoring import wire_rules
from orchestrator.authoring.findings import Mark, Report
from orchestrator.authoring.wire_check import MADE_UP, ProbeObservation, WireCheck
from orchestrator.authoring.wire_probe import ServerUnderTest
from orchestrator.ports import Endpoint
from tests.golden_texts import check_golden
from tests.unit.authoring import wrong_servers
from tests.unit.authoring.reports import as_text
from tests.unit.authoring.wrong_servers import RightServer, running_server, scripted_connections

PATIENT = 30.0
HASTY = 4.0  # for servers that never answer
QUIET = 0.05
OBSERVATION = ProbeObservation({"observation": np.zeros(4, np.float32)})


def wire_report(
    port: int,
    *,
    connect_seconds: float = PATIENT,
    reply_seconds: float = PATIENT,
    quiet_seconds: float = QUIET,
    probe: ProbeObservation = OBSERVATION,
) -> Report:
    report = Report("server")
    server = ServerUnderTest(Endpoint("127.0.0.1", port), connect_seconds, reply_seconds)
    WireCheck(server, probe, report.add, quiet_seconds).run()
    return report


def normalised(report: Report) -> str:
    text = re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:PORT", as_text(report))
    return re.sub(r"(\(message too big\))[^\[]*", r"\1 ", text)  # the rest is the library's


def broken(report: Report) -> list[str]:
    return [finding.name for finding in report.findings if finding.mark is Mark.WRONG]


@pytest.mark.parametrize(
    ("server", "rules", "options"),
    [
        ("RightServer", [], {}),
        ("PlainServer", [], {}),
        ("OneAtATime", [], {}),
        ("SilentServer", ["metadata"], {"connect_seconds": HASTY}),
        ("TextMetadata", ["metadata"], {}),
        ("ListMetadata", ["metadata"], {}),
        ("JsonMetadata", ["encoding"], {}),
        ("WrongExtensions", ["metadata"], {}),
        ("TalkativeServer", ["one reply each"], {"quiet_seconds": PATIENT}),
        ("NoActions", ["reply"], {}),
        ("BareActions", ["reply"], {}),
        ("TextReply", ["reply"], {}),
        ("ObjectArray", ["encoding"], {}),
        ("ShortArray", ["encoding"], {}),
        ("OldNumber", ["sequence"], {}),
        ("NoNumber", ["sequence"], {}),
        ("ResetAsObservation", ["reset"], {}),
        ("ResetWithoutNumber", ["reset"], {}),
        ("ForgetfulReset", ["same again"], {}),
        ("SilentError", ["errors"], {}),
        ("BinaryError", ["what is no message", "errors"], {}),
        ("SmallMessages", ["large messages"], {}),
        ("Queueing", ["second connection"], {"connect_seconds": HASTY}),
    ],
)
def test_a_server_is_told_which_rule_it_breaks(
    server: str, rules: list[str], options: dict[str, Any]
) -> None:
    with running_server(getattr(wrong_servers, server)()) as port:
        report = wire_report(port, **options)

    name = re.sub(r"(?<!^)(?=[A-Z])", "_", server).lower()
    check_golden("check", f"server_{name}", normalised(report))
    assert broken(report) == rules


def test_a_second_reply_is_noticed() -> None:
    with running_server(wrong_servers.TwoReplies()) as port:
        report = wire_report(port, quiet_seconds=1.0)

    assert "one reply each" in broken(report)


@pytest.mark.parametrize(
    ("script", "rules"),
    [
        ("answers_http", ["upgrade"]),
        ("is_no_web_server", ["upgrade"]),
        ("hangs_up", ["upgrade"]),
        ("compresses", ["upgrade"]),
        ("masks_its_frames", ["frames"]),
        ("sends_a_gigabyte", ["size of replies"]),
        ("ignores_the_end", ["closing"]),
    ],
)
def test_a_peer_that_speaks_no_such_protocol_is_told_so(script: str, rules: list[str]) -> None:
    with scripted_connections(getattr(wrong_servers, script)) as port:
        report = wire_report(port)

    check_golden("check", f"server_{script}", normalised(report))
    assert set(rules) <= set(broken(report))


def test_nobody_at_the_address_is_one_plain_line() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        report = wire_report(probe.getsockname()[1])

    check_golden("check", "server_nobody", normalised(report))


def test_a_policy_that_refuses_what_was_made_up_is_not_blamed() -> None:
    class Picky(RightServer):
        def act(self, connection: Any, request: Any, random: Any) -> None:
            raise KeyError("camera")

    with running_server(Picky()) as port:
        report = wire_report(port, probe=MADE_UP)

    check_golden("check", "server_made_up", normalised(report))
    assert report.is_right


def test_every_rule_names_a_section_of_the_page() -> None:
    page = (Path(__file__).parents[3] / wire_rules.PAGE).read_text()
    rules = [rule for rule in vars(wire_rules).values() if isinstance(rule, wire_rules.Rule)]

    assert len(rules) > 10
    assert all(re.search(rf"^## {rule.section}\. ", page, re.MULTILINE) for rule in rules)
