"""Jobs of an `eval` that was killed: nobody waits for them, so they are cancelled and cleaned up."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from orchestrator.client import AsyncClient
from orchestrator.client.archives import remove_archives
from orchestrator.commands.session import say
from orchestrator.domain.errors import OrchestratorError
from orchestrator.stores import data_directory

# Longer than a lease: the supervisor that was killed with its client may hold the job until then.
END_SECONDS = 60.0


class Orphans:
    """Those that `cancel_orphans` found."""

    def __init__(self, client: AsyncClient, job_ids: Sequence[int]) -> None:
        self._client = client
        self._job_ids = job_ids

    async def see_off(self) -> None:
        """Wait until they have ended, and remove what was packed for them; what is late is left alone."""
        with contextlib.suppress(OrchestratorError):
            await asyncio.gather(
                *(self._client.cancel(job_id, timeout_seconds=END_SECONDS) for job_id in self._job_ids)
            )
            jobs = [(await self._client.get(job_id)).message for job_id in self._job_ids]
            await remove_archives(self._client, jobs, data_directory(self._client.settings) / "artifacts")


async def cancel_orphans(client: AsyncClient) -> Orphans:
    """Ask for their end; to be called before a control plane would take them up again."""
    job_ids = await client.cancel_orphans()
    for job_id in job_ids:
        say(f"cancels job {job_id}: the eval that asked for it was killed")
    return Orphans(client, job_ids)
