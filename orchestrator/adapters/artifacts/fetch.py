"""Fetches a submission's archive to a local file: checked for size and digest, never for what is in it.

The URL comes from a stranger. So schemes and hosts are listed, addresses must be public and are dialled as
they were judged, redirects are followed one by one under the same rules, and size and time are capped.
"""

from __future__ import annotations

import asyncio
import hashlib
import ssl
import time
from collections.abc import Generator
from contextlib import aclosing, closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import httpx

from orchestrator.adapters.artifacts.sources import CHUNK_BYTES, chunks_of_backend, chunks_of_file
from orchestrator.adapters.artifacts.urls import (
    DEFAULT_PORTS,
    check_host,
    host_of,
    is_listed,
    parse_url,
    resolve,
    shown,
)
from orchestrator.domain.errors import InfrastructureError, SubmissionError, UsageError
from orchestrator.domain.messages import EvalJobMessage

MAX_REDIRECTS = 5
MAX_ADDRESSES = 4
TIMEOUT = httpx.Timeout(None, connect=10.0)  # seconds; all of a fetch has a deadline of its own
# What is hashed and stored are raw bytes, so they should be the archive's own.
REQUEST_HEADERS = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "orchestrator"}
REDIRECTS = (301, 302, 303, 307, 308)
WORTH_ANOTHER_TRY = (408, 425, 429)
ERROR_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """What may be fetched, from where, and how long it may take.

    `schemes`: `https` (and `http`) are fetched here, `file` is read here. Every other scheme is handed to
    fsspec, which reads with the credentials that it finds on this machine: whoever lists one lets every job
    read what the operator can read, as far as `hosts` allows.
    `hosts`: None allows every public host; else `example.org` allows that name and `.example.org` every name
    below it, in redirects as well. For object stores the host is the bucket. `file` knows no hosts.
    `allow_private_addresses` admits private and loopback addresses, never link-local ones.
    `private_hosts`: the same for these hosts alone, spelt as `hosts`: an artifact store in the cluster.
    `ca_file`: PEM file of the certificate authorities to trust instead of the public ones.
    """

    max_bytes: int
    timeout_seconds: float
    schemes: tuple[str, ...]
    hosts: tuple[str, ...] | None = None
    allow_private_addresses: bool = False
    private_hosts: tuple[str, ...] = ()
    ca_file: str | None = None


def check_reference(job: EvalJobMessage, limits: FetchLimits) -> httpx.URL:
    """The URL of the job's archive, if it may be fetched at all: nothing is looked up or dialled.

    Raises:
        SubmissionError: there is none, it is malformed, has expired, or has a scheme that is not allowed.
    """
    if job.artifact_url is None:
        raise SubmissionError("the job names no archive: artifact_url is missing")
    if job.artifact_expires_at is not None and job.artifact_expires_at <= datetime.now(UTC):
        at = job.artifact_expires_at.astimezone(UTC)
        raise SubmissionError(
            f"the archive's URL expired at {at:%Y-%m-%d %H:%M:%S} UTC (artifact_expires_at): "
            "submit a job with a fresh one"
        )
    url = parse_url(job.artifact_url)
    if url.scheme not in limits.schemes:
        allowed = ", ".join(limits.schemes)
        hint = ", and files only for jobs of the local command line" if url.scheme == "file" else ""
        raise SubmissionError(
            f"archives may not be fetched by {url.scheme[:20]}: allowed are {allowed}{hint}"
        )
    return url


async def fetch_archive(job: EvalJobMessage, target: Path, limits: FetchLimits) -> str:
    """Write the job's archive to `target`; its sha256 as hex. After an error nothing new is at `target`.

    The bytes are those that the server sends: a `Content-Encoding` is neither asked for nor undone.

    Raises:
        SubmissionError: there is none, it has expired, is not allowed, not found, too large, too slow, or not
            the one that the job names.
        UsageError: this installation cannot read archives of that scheme (the package to install is named),
            or `ca_file` cannot be read: another try would not help.
        InfrastructureError: the server could not be reached or failed, or our disk did: worth another try.
    """
    url = check_reference(job, limits)
    # A file of its own: a thread that a stalled server keeps can never write into the archive of a later try.
    temporary = target.with_name(f".{target.name}.{uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            received = _Received(file, limits)
            try:
                async with asyncio.timeout(limits.timeout_seconds):
                    await _fetch(url, job.artifact_url or "", received, limits)
            except TimeoutError:
                raise _too_slow(limits) from None
        _check(job, received)
        temporary.replace(target)
    except OSError as error:  # of our own disk; those of the source are told apart where it is read
        raise InfrastructureError(f"the archive cannot be stored: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return received.sha256


class _Received:
    """What came so far: written, counted and hashed, within the limits."""

    def __init__(self, file: BinaryIO, limits: FetchLimits) -> None:
        self._file = file
        self._limits = limits
        self._deadline = time.monotonic() + limits.timeout_seconds
        self._digest = hashlib.sha256()
        self.size_bytes = 0

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def announce(self, size_bytes: int) -> None:
        """Refuse an archive before it is fetched, if it says that it is too large."""
        if size_bytes > self._limits.max_bytes:
            raise SubmissionError(f"the archive is larger than {self._limits.max_bytes} bytes")

    def write(self, chunk: bytes) -> None:
        # In a thread nothing else ends the copy: cancelling its future does not stop it.
        if time.monotonic() > self._deadline:
            raise _too_slow(self._limits)
        self.size_bytes += len(chunk)
        self.announce(self.size_bytes)
        self._digest.update(chunk)
        self._file.write(chunk)


def _too_slow(limits: FetchLimits) -> SubmissionError:
    return SubmissionError(
        f"the archive was not there within {limits.timeout_seconds:g} s: its server is too slow"
    )


def _check(job: EvalJobMessage, received: _Received) -> None:
    size, digest = received.size_bytes, received.sha256
    if job.artifact_size_bytes is not None and size != job.artifact_size_bytes:
        raise SubmissionError(
            f"the archive has {size} bytes, the job says {job.artifact_size_bytes}: "
            "upload it again, or correct artifact_size_bytes"
        )
    if job.artifact_sha256 is not None and digest != job.artifact_sha256.lower():
        raise SubmissionError(
            f"the archive's sha256 is {digest}, the job says {job.artifact_sha256.lower()}: "
            "upload it again, or correct artifact_sha256"
        )


async def _fetch(url: httpx.URL, text: str, received: _Received, limits: FetchLimits) -> None:
    if url.scheme in DEFAULT_PORTS:
        await _download(url, received, limits)
    elif url.scheme == "file":
        await asyncio.to_thread(_copy, chunks_of_file(url), received)
    else:
        check_host(url, limits.hosts)
        await asyncio.to_thread(_copy, chunks_of_backend(text, url), received)


def _copy(chunks: Generator[bytes], received: _Received) -> None:
    with closing(chunks):
        for chunk in chunks:
            # Once nobody waits any more the file is closed, and writing to it ends this thread.
            received.write(chunk)


async def _download(url: httpx.URL, received: _Received, limits: FetchLimits) -> None:
    context = await asyncio.to_thread(_tls_context, limits.ca_file)
    for _ in range(MAX_REDIRECTS + 1):
        if url.scheme not in DEFAULT_PORTS or url.scheme not in limits.schemes:
            raise SubmissionError(f"the archive's URL leads to {shown(url)}, which is not https")
        check_host(url, limits.hosts)
        location = await _get(url, context, received, limits)
        if location is None:
            return
        url = parse_url(location, base=url)
    raise SubmissionError(f"the archive's URL redirects more than {MAX_REDIRECTS} times")


def _tls_context(ca_file: str | None) -> ssl.SSLContext:
    try:
        if ca_file is None:
            return httpx.create_ssl_context(trust_env=False)
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # ssl.SSLError is one
        raise UsageError(f"{ca_file} cannot be read as certificates of authorities: {error}") from error


async def _get(
    url: httpx.URL, context: ssl.SSLContext, received: _Received, limits: FetchLimits
) -> str | None:
    """Where the server redirects to, or None when the archive was received."""
    may_be_private = limits.allow_private_addresses or is_listed(url, limits.private_hosts)
    addresses = await resolve(url, allow_private=may_be_private)
    failure: httpx.TransportError = httpx.ConnectError("no address")
    for address in addresses[:MAX_ADDRESSES]:
        try:
            return await _get_from(address, url, context, received)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            failure = error  # nothing was sent yet; and hosts have addresses that not everybody can reach
        except httpx.HTTPError as error:
            text = f"{type(error).__name__}: {error}"[:ERROR_CHARACTERS]
            raise InfrastructureError(f"the archive's server failed: {text}") from error
    raise _unreachable(url, failure) from failure


def _unreachable(url: httpx.URL, error: BaseException) -> Exception:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            # The server's doing, and the same at every try.
            return SubmissionError(
                f"the archive's host {host_of(url)} has no valid certificate: {cause.verify_message}"
            )
        cause = cause.__cause__ or cause.__context__
    return InfrastructureError(f"the archive's host {host_of(url)} cannot be reached: {type(error).__name__}")


async def _get_from(address: str, url: httpx.URL, context: ssl.SSLContext, received: _Received) -> str | None:
    """Dial `address`, which was judged, in the name of the URL's host: the certificate must be the host's."""
    request = httpx.Request(
        "GET",
        url.copy_with(host=address),
        headers={"Host": url.netloc.decode("ascii"), **REQUEST_HEADERS},
        extensions={"sni_hostname": host_of(url), "timeout": TIMEOUT.as_dict()},
    )
    if url.userinfo:
        request = next(httpx.BasicAuth(url.username, url.password).auth_flow(request))
    # A transport of its own for each request: a kept connection belongs to an address, and would serve
    # another host there without a look at the certificate. No client: it would parse the location itself.
    async with httpx.AsyncHTTPTransport(verify=context, trust_env=False) as transport:
        response = await transport.handle_async_request(request)
        async with aclosing(response):
            if response.status_code in REDIRECTS:
                return _location(response)
            _check_status(response.status_code, url)
            received.announce(int(response.headers.get("content-length", 0)))
            async for chunk in response.aiter_raw(CHUNK_BYTES):
                await asyncio.to_thread(received.write, chunk)
    return None


def _location(response: httpx.Response) -> str:
    location = response.headers.get("location")
    if not location:
        raise SubmissionError(f"the archive's server answered {response.status_code} without a location")
    return str(location)


def _check_status(status: int, url: httpx.URL) -> None:
    if status == 200:
        return
    if status in (401, 403):
        raise SubmissionError(
            f"the archive's server answered {status}: {shown(url)} may not be read, or no longer; "
            "submit a job with a fresh URL"
        )
    if status in (404, 410):
        raise SubmissionError(f"the archive's server answered {status}: there is nothing at {shown(url)}")
    if status >= 500 or status in WORTH_ANOTHER_TRY:
        raise InfrastructureError(f"the archive's server answered {status}")
    raise SubmissionError(f"the archive's server answered {status}, and not with the archive")
