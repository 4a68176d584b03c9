"""What a canary pod's probe reports, with real sockets; a network of its own stands for a closed one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.submission.probe import (
    API,
    BANNER_PREFIX,
    METADATA,
    REPORT_PREFIX,
    UNFILTERED,
    Outcome,
    ProbeReport,
    _ask,
    weaknesses,
)
from orchestrator.submission.sealing import Address
from tests.pod_likeness import in_a_pod

OWN_NETWORK = ("unshare", "--user", "--map-root-user", "--net")


def run_probe(*options: str, api: int, below: tuple[str, ...] = (), nonce: str = "n1") -> ProbeReport:
    environ = os.environ | {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(api)}
    command = [sys.executable, "-m", "orchestrator.submission.probe", "--nonce", nonce, *options]
    done = subprocess.run([*below, *command], env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    report = ProbeReport.find(done.stdout, nonce)
    assert report is not None, done.stdout
    return report


@contextmanager
def dns_server() -> Iterator[int]:
    """Answers every question with an empty answer to it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(20)

        def serve() -> None:
            question, peer = sock.recvfrom(512)
            sock.sendto(question[:2] + b"\x81\x83" + question[4:], peer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield sock.getsockname()[1]
        thread.join()


def test_what_is_reached_in_an_open_network_is_reported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as api, socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        report = run_probe(f"--tcp=a peer={address}", "--seal-timeout=0.3", api=api.getsockname()[1])

    reached = {outcome.name: outcome.reached for outcome in report.outcomes}
    assert reached.pop(METADATA) in (True, False)  # some machines have one
    assert {name: reached[name] for name in (API, "a peer")} == {API: True, "a peer": True}
    assert report.sealed_after_seconds is None
    assert "takes connections" in str(report.open_network)


def test_nothing_is_reached_in_a_closed_network() -> None:
    if subprocess.run([*OWN_NETWORK, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no namespaces can be made here")
    with socket.create_server(("127.0.0.1", 0)) as api:
        options = ("--tcp=a peer=192.0.2.1:80", "--dns=192.0.2.53", "--host=0.0.0.0")
        report = run_probe(*options, api=api.getsockname()[1], below=OWN_NETWORK)

    assert report.open_network is None
    assert report.sealed_after_seconds is not None
    assert not [outcome.name for outcome in report.outcomes if outcome.reached]
    assert {outcome.name for outcome in report.outcomes} == {METADATA, API, "a peer", "DNS", "DNS over TCP"}


def test_a_dns_server_that_answers_is_reached_whatever_it_says() -> None:
    with dns_server() as port:
        assert _ask("DNS", Address("127.0.0.1", port)) == Outcome(
            "DNS", f"127.0.0.1:{port}", True, "answered"
        )


def test_who_connects_is_told_which_canary_this_is_until_it_ends() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "orchestrator.submission.probe", "--nonce", "n2", "--port", str(port)]
    environ = os.environ | {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": "9"}
    process = subprocess.Popen([*command, "--stay", "60"], env=environ, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert ProbeReport.find(process.stdout.readline(), "n2") is not None
        with socket.create_connection(("127.0.0.1", port), 10) as connection:
            assert connection.makefile("rb").readline() == BANNER_PREFIX + b"n2\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_words_of_another_canary_and_spoilt_ones_are_no_report() -> None:
    report = ProbeReport("n3", 0.2, None, (Outcome(API, "10.0.0.1:443", False, "refused"),), ("a",))
    spoilt = ("{", "[]", json.dumps({"nonce": "n3"}))
    log = "\n".join(("noise", *(REPORT_PREFIX + text for text in spoilt), report.line(), ""))

    assert ProbeReport.find(log, "n3") == report
    assert ProbeReport.find(log, "n4") is None
    assert ProbeReport.find("", "n3") is None


def test_what_a_pod_has_that_it_must_not_is_reported(tmp_path: Path) -> None:
    status = "CapEff:\t0000000000000400\nCapBnd:\t0000000000000400\nNoNewPrivs:\t0\nSeccomp:\t0\n"
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "status").write_text(status)
    (tmp_path / "token").touch()

    found = weaknesses(tmp_path, tmp_path / "token", tmp_path)

    assert UNFILTERED in found
    for part in ("capabilities", "no_new_privs", "token", "root can be written"):
        assert any(part in each for each in found)


def test_a_hardened_pod_has_nothing_of_it(tmp_path: Path) -> None:
    for name in ("work", "tmp"):
        (tmp_path / name).mkdir()
    below = in_a_pod(tmp_path / "work", tmp_path / "tmp")
    if shutil.which("setpriv") is None:
        pytest.skip("no setpriv here")

    report = run_probe(api=9, below=(*below, "setpriv", "--no-new-privs"))

    # Namespaces neither filter system calls nor take the capabilities away that a program could gain.
    assert [each for each in report.weaknesses if each != UNFILTERED and "capabilities" not in each] == []
