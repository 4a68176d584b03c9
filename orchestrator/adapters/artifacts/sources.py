"""Reads archives that no web server holds, chunk by chunk: local files, and object stores through fsspec."""

from __future__ import annotations

import os
import stat
from collections.abc import Generator

import httpx

from orchestrator.adapters.artifacts.urls import host_of, malformed, shown
from orchestrator.domain.errors import InfrastructureError, SubmissionError, UsageError

CHUNK_BYTES = 1 << 20


def chunks_of_file(url: httpx.URL) -> Generator[bytes]:
    """The bytes of a local file, which must be a plain one.

    Raises:
        SubmissionError: it cannot be read, is a directory, pipe or device, or the URL names a host.
    """
    path = url.path
    if host_of(url) not in ("", "localhost"):
        raise malformed("a file has no host: write file:///path")
    try:
        # O_NONBLOCK: opening a pipe would wait for its writer.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as source:
            if not stat.S_ISREG(os.fstat(source.fileno()).st_mode):
                raise SubmissionError(f"the archive {path} is no plain file")
            while chunk := source.read(CHUNK_BYTES):
                yield chunk
    except ValueError:
        raise malformed("its path holds a null character") from None
    except OSError as error:
        raise SubmissionError(f"the archive {path} cannot be read: {error.strerror}") from error


def chunks_of_backend(text: str, url: httpx.URL) -> Generator[bytes]:
    """The bytes behind a URL of one of fsspec's backends; `url` is `text`, parsed.

    Raises:
        SubmissionError: nothing is there that may be read, or the URL chains file systems.
        UsageError: the backend is not installed; the text names what to install.
        InfrastructureError: the backend failed, in whatever way.
    """
    if "::" in text:
        # fsspec would take it for a chain of file systems, the last of them on nobody's list.
        raise SubmissionError("the archive's URL chains several places with `::`: name one")
    try:
        import fsspec  # imported where it is needed: it and its backends are optional and heavy

        fsspec.get_filesystem_class(url.scheme)
    except ImportError as error:  # these words name the package
        raise UsageError(f"{url.scheme} archives need another package here: {error}") from error
    except ValueError as error:
        raise UsageError(f"no installed package reads {url.scheme} archives") from error
    try:
        with fsspec.open(text, "rb") as source:
            while chunk := source.read(CHUNK_BYTES):
                yield chunk
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise SubmissionError(f"there is no archive at {shown(url)} that may be read") from error
    except Exception as error:  # botocore's errors and their like have no other base in common
        # By its type only: such texts quote URLs and requests.
        raise InfrastructureError(
            f"the archive at {shown(url)} could not be fetched: {type(error).__name__}"
        ) from error
