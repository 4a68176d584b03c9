"""Fetching from a real https server: what arrives, what is refused, and whose fault a failure is."""

from __future__ import annotations

import gzip
import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from orchestrator.adapters.artifacts.fetch import FetchLimits, fetch_archive
from orchestrator.domain.errors import InfrastructureError, SubmissionError, UsageError
from orchestrator.domain.messages import EvalJobMessage
from tests.archive_server import ArchiveServer
from tests.unit.adapters.artifacts.conftest import Resolver

BODY = b"an archive, as far as fetching is concerned" * 100
DIGEST = hashlib.sha256(BODY).hexdigest()


def job(url: str | None, **fields: Any) -> EvalJobMessage:
    return EvalJobMessage.model_validate(
        {
            "job_id": 1,
            "submission_id": "s",
            "env_provider": "gymnasium",
            "benchmark_name": "CartPole-v1",
            "artifact_url": url,
            **fields,
        }
    )


@pytest.fixture
def target(tmp_path: Path) -> Path:
    directory = tmp_path / "scratch"
    directory.mkdir()
    return directory / "archive"


@pytest.fixture
def refused(target: Path) -> Callable[..., Any]:
    """Fetches, expects the error, and that nothing is left of the attempt; the error's text."""

    async def fetch(
        message: EvalJobMessage, limits: FetchLimits, error: type[Exception] = SubmissionError
    ) -> str:
        with pytest.raises(error) as raised:
            await fetch_archive(message, target, limits)
        assert list(target.parent.iterdir()) == []
        return str(raised.value)

    return fetch


# ----------------------------------------------------------------------------------------- what arrives


async def test_an_archive_arrives_whole_and_its_digest_is_told(
    server: ArchiveServer, limits: FetchLimits, target: Path
) -> None:
    url = server.answer("/a.tar.gz?signature=1", BODY)

    digest = await fetch_archive(
        job(url, artifact_sha256=DIGEST.upper(), artifact_size_bytes=len(BODY)), target, limits
    )

    assert (target.read_bytes(), digest) == (BODY, DIGEST)
    assert [path.name for path in target.parent.iterdir()] == ["archive"]


async def test_an_earlier_file_at_the_target_is_replaced(
    server: ArchiveServer, limits: FetchLimits, target: Path
) -> None:
    target.write_bytes(b"of an earlier try, and longer" * 1000)

    await fetch_archive(job(server.answer("/a", BODY)), target, limits)

    assert target.read_bytes() == BODY


async def test_encoded_bytes_are_kept_as_they_were_sent_and_never_asked_for(
    server: ArchiveServer, limits: FetchLimits, target: Path
) -> None:
    packed = gzip.compress(BODY, mtime=0)
    url = server.answer("/a", packed, Content_Encoding="gzip")

    digest = await fetch_archive(job(url), target, limits)

    assert (target.read_bytes(), digest) == (packed, hashlib.sha256(packed).hexdigest())
    assert server.requests[0][1]["Accept-Encoding"] == "identity"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_followed(
    server: ArchiveServer, limits: FetchLimits, target: Path, status: int
) -> None:
    server.answer("/there", BODY)

    await fetch_archive(job(server.redirect("/here", "/there", status)), target, limits)

    assert target.read_bytes() == BODY


async def test_credentials_in_the_url_do_not_go_to_the_host_of_a_redirect(
    server: ArchiveServer, limits: FetchLimits, target: Path
) -> None:
    server.answer("/there", BODY)
    server.redirect("/here", server.url("/there", "127.0.0.1"))
    url = server.url("/here").replace("https://", "https://user:hunter2@")

    await fetch_archive(job(url), target, limits)

    assert ["Authorization" in headers for _, headers in server.requests] == [True, False]


# --------------------------------------------------------------------------------- whom we really dial


async def test_the_address_that_was_judged_is_dialled_in_the_name_of_the_host(
    server: ArchiveServer, limits: FetchLimits, target: Path, resolver: Resolver
) -> None:
    resolver.names["archives.example"] = [["127.0.0.1"], ["169.254.169.254"]]
    server.answer("/a", BODY)

    await fetch_archive(job(server.url("/a", "archives.example.")), target, limits)

    assert resolver.lookups == ["archives.example"]
    assert server.server_names == ["archives.example"]
    assert server.requests[0][1]["Host"] == f"archives.example:{server.port}"


async def test_a_certificate_of_another_host_is_refused_before_a_request_is_sent(
    server: ArchiveServer, limits: FetchLimits, refused: Callable[..., Any], resolver: Resolver
) -> None:
    resolver.names["other.example"] = [["127.0.0.1"]]
    server.answer("/a", BODY)

    text = await refused(job(server.url("/a", "other.example")), limits)

    assert "other.example has no valid certificate" in text
    assert server.requests == []


async def test_a_redirect_to_another_host_of_the_same_address_has_its_certificate_checked(
    server: ArchiveServer, limits: FetchLimits, refused: Callable[..., Any], resolver: Resolver
) -> None:
    resolver.names["other.example"] = [["127.0.0.1"]]
    server.answer("/there", BODY)
    url = server.redirect("/here", server.url("/there", "other.example"))

    text = await refused(job(url), limits)

    assert "other.example has no valid certificate" in text
    assert [path for path, _ in server.requests] == ["/here"]


async def test_an_authority_that_nobody_named_is_not_trusted(
    server: ArchiveServer, limits: FetchLimits, refused: Callable[..., Any]
) -> None:
    text = await refused(job(server.answer("/a", BODY)), replace(limits, ca_file=None))

    assert "localhost has no valid certificate" in text


async def test_proxies_and_authorities_of_the_environment_are_not_used(
    server: ArchiveServer, limits: FetchLimits, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere")

    await fetch_archive(job(server.answer("/a", BODY)), target, limits)

    assert target.read_bytes() == BODY


async def test_the_next_address_is_tried_when_one_cannot_be_reached(
    server: ArchiveServer, limits: FetchLimits, target: Path, resolver: Resolver
) -> None:
    resolver.names["archives.example"] = [["127.0.0.2", "127.0.0.1"]]
    server.answer("/a", BODY)

    await fetch_archive(job(server.url("/a", "archives.example")), target, limits)

    assert target.read_bytes() == BODY


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "2130706433", "0x7f.1"])
async def test_a_private_address_is_refused_before_it_is_dialled(
    server: ArchiveServer, limits: FetchLimits, refused: Callable[..., Any], host: str
) -> None:
    server.answer("/a", BODY)

    text = await refused(job(server.url("/a", host)), replace(limits, allow_private_addresses=False))

    assert "not public" in text
    assert server.connections == 0


async def test_a_private_address_is_dialled_for_the_hosts_that_an_operator_lists(
    server: ArchiveServer, limits: FetchLimits, target: Path, refused: Callable[..., Any]
) -> None:
    server.answer("/a", BODY)
    store = replace(limits, allow_private_addresses=False, private_hosts=("localhost",))

    other = await refused(job(server.url("/a", "127.0.0.1")), store)
    await fetch_archive(job(server.url("/a", "localhost")), target, store)

    assert target.read_bytes() == BODY
    assert "not public" in other


async def test_one_private_address_among_public_ones_is_enough_to_refuse(
    limits: FetchLimits, refused: Callable[..., Any], resolver: Resolver
) -> None:
    resolver.names["archives.example"] = [["8.8.8.8", "10.0.0.1"]]

    text = await refused(job("https://archives.example/a"), replace(limits, allow_private_addresses=False))

    assert "the archive's host archives.example has an address that is not public" in text


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("https://169.254.169.254/latest/meta-data", "169.254.169.254 has an address that is not public"),
        ("https://[64:ff9b::a9fe:a9fe]/", "not public"),
        ("http://localhost/there?token", "leads to http://localhost/there, which is not https"),
        ("file:///etc/passwd", "not https"),
        ("https://localhost:token/", "malformed: its port"),
        ("https://xn--/", "malformed: its host is no name"),
        ("", "without a location"),
    ],
)
async def test_a_redirect_is_held_to_the_same_rules(
    server: ArchiveServer, limits: FetchLimits, refused: Callable[..., Any], location: str, words: str
) -> None:
    allowing_files = replace(limits, schemes=("https", "file"))

    text = await refused(job(server.redirect("/a", location)), allowing_files)

    assert re.search(words, text)
    assert "token" not in text


async def test_plain_http_is_held_to_the_same_rules_where_an_operator_lists_it(
    plain_server: ArchiveServer, limits: FetchLimits, target: Path, refused: Callable[..., Any]
) -> None:
    plain_server.answer("/a", BODY)
    url = plain_server.url("/a").replace("https://", "http://")

    not_listed = await refused(job(url), limits)
    private = await refused(job(url), replace(limits, schemes=("http",), allow_private_addresses=False))
    await fetch_archive(job(url), target, replace(limits, schemes=("http",)))

    assert not_listed == "archives may not be fetched by http: allowed are https"
    assert "the archive's host localhost has an address that is not public" in private
    assert target.read_bytes() == BODY
    assert plain_server.connections == 1


async def test_hosts_that_are_not_listed_are_refused_in_redirects_as_well(
    server: ArchiveServer, limits: FetchLimits, refused: Callable[..., Any]
) -> None:
    server.answer("/there", BODY)
    url = server.redirect("/here", server.url("/there", "127.0.0.1"))

    text = await refused(job(url), replace(limits, hosts=("localhost", ".example.org")))
    at_once = await refused(job(url), replace(limits, hosts=(".example.org",)))

    assert text == "archives may not be fetched from 127.0.0.1: allowed are localhost, .example.org"
    assert at_once == "archives may not be fetched from localhost: allowed are .example.org"
    assert [path for path, _ in server.requests] == ["/here"]


async def test_a_redirect_loop_ends(
    server: ArchiveServer, limits: FetchLimits, refused: Callable[..., Any]
) -> None:
    text = await refused(job(server.redirect("/a", "/a")), limits)

    assert text == "the archive's URL redirects more than 5 times"
    assert len(server.requests) == 6


# ------------------------------------------------------------------------------------ what is not kept


async def test_another_digest_than_the_job_says_is_refused(
    server: ArchiveServer, limits: FetchLimits, refused: Callable[..., Any]
) -> None:
    text = await refused(job(server.answer("/a", BODY), artifact_sha256="0" * 64), limits)

    assert DIGEST in text
    assert "0" * 64 in text


async def test_another_size_than_the_job_says_is_refused(
    server: ArchiveServer, limits: FetchLimits, refused: Callable[..., Any]
) -> None:
    text = await refused(job(server.answer("/a", BODY), artifact_size_bytes=7), limits)

    assert text.startswith(f"the archive has {len(BODY)} bytes, the job says 7: upload it again")


async def test_an_archive_that_says_it_is_too_large_is_refused(
    server: ArchiveServer, limits: FetchLimits, refused: Callable[..., Any]
) -> None:
    text = await refused(job(server.answer("/a", BODY)), replace(limits, max_bytes=len(BODY) - 1))

    assert text == f"the archive is larger than {len(BODY) - 1} bytes"


async def test_an_archive_that_never_says_how_large_it_is_is_cut_off(
    server: ArchiveServer, limits: FetchLimits, refused: Callable[..., Any]
) -> None:
    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not server.stopping.is_set():
            handler.wfile.write(b"x" * 65536)

    server.answers["/a"] = endless

    text = await refused(job(server.url("/a")), replace(limits, max_bytes=3_000_000))

    assert text == "the archive is larger than 3000000 bytes"


async def test_a_slow_server_is_given_up_at_the_limit(
    server: ArchiveServer, limits: FetchLimits, refused: Callable[..., Any]
) -> None:
    def stall(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "100")
        handler.end_headers()
        handler.wfile.write(b"x")
        server.stopping.wait(10)

    server.answers["/a"] = stall

    text = await refused(job(server.url("/a")), replace(limits, timeout_seconds=0.5))

    assert text == "the archive was not there within 0.5 s: its server is too slow"


async def test_a_connection_that_ends_in_the_middle_is_worth_another_try(
    server: ArchiveServer, limits: FetchLimits, refused: Callable[..., Any]
) -> None:
    url = server.answer("/a", BODY, Content_Length=str(len(BODY) + 1))

    text = await refused(job(url), limits, InfrastructureError)

    assert "the archive's server failed: RemoteProtocolError" in text


@pytest.mark.parametrize("status", [401, 403, 404, 410])
async def test_an_archive_that_is_not_there_is_the_submissions_fault(
    server: ArchiveServer, limits: FetchLimits, refused: Callable[..., Any], status: int
) -> None:
    url = server.answer("/a?signature=secret", status=status)

    text = await refused(job(url), limits)

    assert text.startswith(f"the archive's server answered {status}: ")
    assert "https://localhost/a" in text
    assert "secret" not in text


@pytest.mark.parametrize("status", [204, 300, 400, 416])
async def test_an_answer_that_is_no_archive_is_the_submissions_fault(
    server: ArchiveServer, limits: FetchLimits, refused: Callable[..., Any], status: int
) -> None:
    text = await refused(job(server.answer("/a", status=status)), limits)

    assert text == f"the archive's server answered {status}, and not with the archive"


@pytest.mark.parametrize("status", [408, 429, 500, 503])
async def test_a_failing_server_is_worth_another_try(
    server: ArchiveServer, limits: FetchLimits, refused: Callable[..., Any], status: int
) -> None:
    text = await refused(job(server.answer("/a", status=status)), limits, InfrastructureError)

    assert text == f"the archive's server answered {status}"


async def test_a_host_that_cannot_be_reached_is_worth_another_try(
    limits: FetchLimits, refused: Callable[..., Any], resolver: Resolver
) -> None:
    resolver.names["archives.example"] = [["127.0.0.1"]]

    text = await refused(job("https://archives.example:1/a"), limits, InfrastructureError)

    assert text == "the archive's host archives.example cannot be reached: ConnectError"


# ------------------------------------------------------------------------------- before anything is sent


async def test_a_job_without_an_archive_is_refused(limits: FetchLimits, refused: Callable[..., Any]) -> None:
    assert "artifact_url is missing" in await refused(job(None), limits)


async def test_an_expired_url_is_not_dialled(
    server: ArchiveServer, limits: FetchLimits, refused: Callable[..., Any]
) -> None:
    expired = datetime.now(UTC) - timedelta(seconds=1)

    text = await refused(job(server.answer("/a", BODY), artifact_expires_at=expired), limits)

    assert text.startswith(f"the archive's URL expired at {expired:%Y-%m-%d %H:%M:%S} UTC")
    assert server.connections == 0


async def test_a_malformed_url_is_the_submissions_fault(
    limits: FetchLimits, refused: Callable[..., Any]
) -> None:
    text = await refused(job("https://user:hunter2/@example.org/?token"), limits)

    assert text == "the archive's URL is malformed: its port is no number from 1 to 65535"


async def test_a_scheme_that_is_not_listed_is_refused(
    limits: FetchLimits, refused: Callable[..., Any]
) -> None:
    assert "may not be fetched by s3: allowed are https" in await refused(job("s3://bucket/a"), limits)


async def test_authorities_that_cannot_be_read_are_a_matter_of_usage(
    limits: FetchLimits, refused: Callable[..., Any], tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("no certificate")

    for ca_file in (wrong, tmp_path / "missing.pem"):
        text = await refused(job("https://127.0.0.1/a"), replace(limits, ca_file=str(ca_file)), UsageError)
        assert str(ca_file) in text


async def test_a_target_that_cannot_be_written_is_our_fault(
    server: ArchiveServer, limits: FetchLimits, tmp_path: Path
) -> None:
    with pytest.raises(InfrastructureError, match="the archive cannot be stored"):
        await fetch_archive(job(server.answer("/a", BODY)), tmp_path / "missing" / "archive", limits)
