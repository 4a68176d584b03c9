"""What an archive's URL may be, and which addresses may be dialled for it."""

from __future__ import annotations

import pytest

from orchestrator.adapters.artifacts.urls import check_address, check_host, parse_url, shown
from orchestrator.domain.errors import SubmissionError

SECRETS = ("hunter2", "token")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://example.org:hunter2/a?token", "its port is no number"),
        ("https://user:hunter2/x@example.org/a", "its port is no number"),
        ("https://example.org:99999/a?token", "its port is no number"),
        ("https://example.org:0/a", "its port is no number"),
        ("https://user:hunter2@ℂ.example/a?token", "its host is no name"),
        ("https://user:hunter2@" + "ü" * 80 + ".example/?token", "its host is no name"),
        ("https://user:hunter2@1.2.3.999/?token", "its host is no IP address"),
        ("https://[::1/a", "malformed"),
        ("https://exam\x00ple.org/?token", "a character that is not printable"),
        ("https://example.org/\n?token", "a character that is not printable"),
        ("https://example.org/" + "a" * 70_000, "it is too long"),
        ("//example.org/a?token", "it has no scheme"),
        ("/some/path?token", "it has no scheme"),
        ("", "it has no scheme"),
    ],
)
def test_a_malformed_url_is_refused_without_showing_its_secrets(url: str, words: str) -> None:
    with pytest.raises(SubmissionError, match=r"^the archive's URL is malformed: ") as refused:
        parse_url(url)

    assert words in str(refused.value)
    assert not any(secret in str(refused.value) for secret in SECRETS)
    assert refused.value.__suppress_context__ or refused.value.__context__ is None


@pytest.mark.parametrize("location", ["https://example.org:abc/", "https://[::1", "//[::1/x", "\x00"])
def test_a_redirect_to_a_malformed_url_is_refused(location: str) -> None:
    with pytest.raises(SubmissionError, match="malformed"):
        parse_url(location, base=parse_url("https://example.org/a"))


def test_a_host_is_compared_and_looked_up_in_one_form() -> None:
    url = parse_url("HTTPS://Bücher.EXAMPLE.:8443/a b")

    assert (url.scheme, url.raw_host, url.port) == ("https", b"xn--bcher-kva.example", 8443)


def test_a_url_is_shown_without_query_and_credentials_and_shortened() -> None:
    url = parse_url("https://user:hunter2@example.org/%1B" + "a" * 500 + "?token=1#token")

    assert shown(url).startswith("https://example.org/%1Baaa")
    assert len(shown(url)) < 210
    assert not any(secret in shown(url) for secret in SECRETS)


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("example.org", None),
        ("example.org", ("example.net", "EXAMPLE.org")),
        ("a.b.example.org", (".example.org",)),
        ("example.org.", ("example.org",)),
        ("xn--bcher-kva.example", ("xn--bcher-kva.example",)),
    ],
)
def test_a_host_on_the_list_is_allowed(host: str, allowed: tuple[str, ...] | None) -> None:
    check_host(parse_url(f"https://{host}/"), allowed)


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("example.org", ()),
        ("example.org", (".example.org",)),
        ("a.example.org", ("example.org",)),
        ("badexample.org", ("example.org", ".example.org")),
        ("example.org.evil.example", ("example.org",)),
    ],
)
def test_a_host_that_is_not_on_the_list_is_refused(host: str, allowed: tuple[str, ...]) -> None:
    with pytest.raises(SubmissionError, match="archives may not be fetched from"):
        check_host(parse_url(f"https://{host}/"), allowed)


@pytest.mark.parametrize(
    "url", ["https:///a", "https:token", "https://./a", "https://" + "a." * 200 + "example/"]
)
def test_a_url_without_a_possible_host_is_malformed(url: str) -> None:
    with pytest.raises(SubmissionError, match="malformed"):
        check_host(parse_url(url), None)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "10.0.0.1",
        "100.64.0.1",
        "127.0.0.1",
        "168.63.129.16",
        "169.254.169.254",
        "172.16.0.1",
        "192.0.0.9",
        "192.168.1.1",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::7f00:1",
        "::10.0.0.1",
        "::8.8.8.8",
        "::ffff:127.0.0.1",
        "::ffff:0:7f00:1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b::10.0.0.1",
        "64:ff9b:1::808:808",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",
        "2001:db8::1",
        "2002:7f00:1::1",
        "2002:a9fe:a9fe::",
        "2002:808:808::1",
        "3fff::1",
        "5f00::1",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1%eth0",
        "fec0::1",
        "ff0e::1",
    ],
)
def test_an_address_inside_some_network_is_not_public(address: str) -> None:
    with pytest.raises(SubmissionError, match="has an address that is not public") as refused:
        check_address(address, "example.org")

    assert address not in str(refused.value)


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2606:4700:4700::1111"],
)
def test_a_public_address_may_be_dialled(address: str) -> None:
    check_address(address, "example.org")


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "10.1.2.3", "fd12::1", "8.8.8.8"])
def test_private_addresses_may_be_allowed(address: str) -> None:
    check_address(address, "example.org", allow_private=True)


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254",
        "64:ff9b::a9fe:a9fe",
        "2002:a9fe:a9fe::1",
        "64:ff9b:1::a9fe:a9fe",
        "::a9fe:a9fe",
        "fe80::1",
        "0.0.0.0",
        "::",
        "224.0.0.1",
    ],
)
def test_link_local_addresses_are_refused_even_where_private_ones_are_allowed(address: str) -> None:
    with pytest.raises(SubmissionError, match="not public"):
        check_address(address, "example.org", allow_private=True)
