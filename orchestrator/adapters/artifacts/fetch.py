"""Fetches a submission's archive to a local file: checked for size and digest, never for what is in it.

The URL comes from a stranger. So schemes are listed, addresses must be public, redirects are followed one by
one under the same rules, and size and time are capped.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import shutil
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import httpx

from orchestrator.domain.errors import InfrastructureError, SubmissionError
from orchestrator.domain.messages import EvalJobMessage

MAX_REDIRECTS = 5
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """What may be fetched, and how long it may take."""

    max_bytes: int
    timeout_seconds: float
    schemes: tuple[str, ...]


async def fetch_archive(job: EvalJobMessage, target: Path, limits: FetchLimits) -> str:
    """Write the job's archive to `target`; its sha256 as hex.

    Raises:
        SubmissionError: there is none, it has expired, is not allowed, not found, too large, or not the one
            that the job names.
        InfrastructureError: the server could not be reached or failed: worth another try.
    """
    if job.artifact_url is None:
        raise SubmissionError("the job names no archive: `artifact_url` is missing")
    if job.artifact_expires_at is not None and job.artifact_expires_at <= datetime.now(UTC):
        raise SubmissionError(f"the archive's URL expired at {job.artifact_expires_at:%Y-%m-%d %H:%M:%S} UTC")
    try:
        async with asyncio.timeout(limits.timeout_seconds):
            digest, size = await _fetch(job.artifact_url, target, limits)
    except TimeoutError as error:
        raise SubmissionError(
            f"the archive was not there within {limits.timeout_seconds:g} s: its server is too slow"
        ) from error
    _check(job, digest, size)
    return digest


def _check(job: EvalJobMessage, digest: str, size: int) -> None:
    if job.artifact_size_bytes is not None and size != job.artifact_size_bytes:
        raise SubmissionError(
            f"the archive has {size} bytes, the job says {job.artifact_size_bytes}: upload it again"
        )
    if job.artifact_sha256 is not None and digest != job.artifact_sha256.lower():
        raise SubmissionError(
            f"the archive's sha256 is {digest}, the job says {job.artifact_sha256.lower()}: upload it again"
        )


async def _fetch(url: str, target: Path, limits: FetchLimits) -> tuple[str, int]:
    scheme = urlsplit(url).scheme.lower()
    if scheme not in limits.schemes:
        raise SubmissionError(
            f"archives may not be fetched by {scheme or 'no scheme'}: allowed are {', '.join(limits.schemes)}"
        )
    if scheme == "file":
        return await asyncio.to_thread(_copy_file, Path(unquote(urlsplit(url).path)), target, limits)
    if scheme == "https":
        return await _download(url, target, limits)
    return await asyncio.to_thread(_copy_with_fsspec, url, target, limits)


def _copy_file(source: Path, target: Path, limits: FetchLimits) -> tuple[str, int]:
    try:
        if source.stat().st_size > limits.max_bytes:
            raise SubmissionError(f"the archive is larger than {limits.max_bytes} bytes")
        shutil.copyfile(source, target)
    except OSError as error:
        raise SubmissionError(f"the archive {source} cannot be read: {error.strerror}") from error
    with target.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), target.stat().st_size


def _copy_with_fsspec(url: str, target: Path, limits: FetchLimits) -> tuple[str, int]:
    import fsspec  # imported where it is needed: its backends are heavy

    digest, size = hashlib.sha256(), 0
    try:
        with fsspec.open(url, "rb") as source, target.open("wb") as file:
            while chunk := source.read(CHUNK_BYTES):
                size += len(chunk)
                _check_size(size, limits)
                digest.update(chunk)
                file.write(chunk)
    except FileNotFoundError as error:
        raise SubmissionError(f"there is no archive at {_shown(url)}") from error
    except ImportError as error:
        raise InfrastructureError(f"{urlsplit(url).scheme} archives need another package: {error}") from error
    except OSError as error:
        raise InfrastructureError(f"the archive could not be fetched: {error}") from error
    return digest.hexdigest(), size


async def _download(url: str, target: Path, limits: FetchLimits) -> tuple[str, int]:
    async with httpx.AsyncClient(trust_env=False, timeout=limits.timeout_seconds) as client:
        for _ in range(MAX_REDIRECTS + 1):
            await _check_addresses(url)
            try:
                async with client.stream("GET", url) as response:
                    location = _redirect(response)
                    if location is None:
                        return await _save(response, target, limits)
                    url = urljoin(url, location)
            except httpx.HTTPError as error:
                raise InfrastructureError(f"the archive's server failed: {error!r}") from error
    raise SubmissionError(f"the archive's URL redirects more than {MAX_REDIRECTS} times")


async def _check_addresses(url: str) -> None:
    """Refuse a URL whose host has an address that is not public, before it is dialled."""
    parts = urlsplit(url)
    if parts.scheme.lower() != "https" or parts.hostname is None:
        raise SubmissionError(f"the archive's URL leads to {_shown(url)}, which is not https")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            parts.hostname, parts.port or 443, type=socket.SOCK_STREAM
        )
    except socket.gaierror as error:
        raise InfrastructureError(f"the archive's host {parts.hostname} is not known") from error
    for *_, address in found:
        check_public(str(address[0]), parts.hostname)


def check_public(address: str, host: str) -> None:
    """Refuse addresses inside the network of the control plane.

    Raises:
        SubmissionError: the address is private, loopback, link-local or otherwise not public.
    """
    ip = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if not ip.is_global or ip.is_multicast:
        raise SubmissionError(f"the archive's host {host} has the address {ip}, which is not public")


def _redirect(response: httpx.Response) -> str | None:
    _peer_is_public(response)
    if response.status_code in (301, 302, 303, 307, 308):
        return str(response.headers.get("location", ""))
    if response.status_code in (401, 403, 404, 410):
        raise SubmissionError(f"the archive's server answered {response.status_code}: expired or not there?")
    if response.status_code != 200:
        raise InfrastructureError(f"the archive's server answered {response.status_code}")
    return None


def _peer_is_public(response: httpx.Response) -> None:
    """The name may have been resolved anew since the check: judge the address that was really dialled."""
    stream = response.extensions.get("network_stream")
    peer = stream.get_extra_info("server_addr") if stream is not None else None
    if peer:
        check_public(str(peer[0]), response.url.host)


async def _save(response: httpx.Response, target: Path, limits: FetchLimits) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    with target.open("wb") as file:
        async for chunk in response.aiter_raw(CHUNK_BYTES):
            size += len(chunk)
            _check_size(size, limits)
            digest.update(chunk)
            await asyncio.to_thread(file.write, chunk)
    return digest.hexdigest(), size


def _check_size(size: int, limits: FetchLimits) -> None:
    if size > limits.max_bytes:
        raise SubmissionError(f"the archive is larger than {limits.max_bytes} bytes")


def _shown(url: str) -> str:
    """The URL without query and credentials, which may be secret."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname or ''}{parts.path}"
