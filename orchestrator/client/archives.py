"""Archives that are files of this machine: packed by `eval` into the data directory, and removed after."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from orchestrator.domain.messages import EvalJobMessage


class KnowsUnfinishedJobs(Protocol):
    """What is asked of a client here."""

    async def unfinished_artifacts(self) -> set[str]: ...


def local_archive(message: EvalJobMessage) -> Path | None:
    """The file that the job's archive is, where it is a local one."""
    url = urlsplit(message.artifact_url or "")
    return Path(unquote(url.path)) if url.scheme == "file" else None


async def remove_archives(
    client: KnowsUnfinishedJobs, jobs: Sequence[EvalJobMessage], archives: Path
) -> None:
    """Delete what was packed into the directory `archives` for the jobs and is not needed by another."""
    needed = await client.unfinished_artifacts()
    for job in jobs:
        path = local_archive(job)
        if path is not None and path.parent == archives and job.artifact_url not in needed:
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        archives.rmdir()
