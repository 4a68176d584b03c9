"""One look at everything: the checks in the order in which they may be made."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from orchestrator.adapters.postgres.server_files import default_data_dir
from orchestrator.diagnosis.database import diagnose_database
from orchestrator.diagnosis.findings import Diagnosis, Leftover, State, diagnose, in_a_thread
from orchestrator.diagnosis.leftovers import early_checks, late_checks
from orchestrator.diagnosis.machine import machine_checks
from orchestrator.diagnosis.ray_checks import ray_checks
from orchestrator.domain.errors import OrchestratorError
from orchestrator.logging import get_logger
from orchestrator.settings import Settings

log = get_logger()


async def examine(settings: Settings, stack: AsyncExitStack) -> list[Diagnosis]:
    """What all checks find. What has to stay open for the leftovers to be cleared is on the stack."""
    data_dir = (settings.data_dir or default_data_dir()).expanduser().resolve()
    embedded = settings.database_url is None
    machine, ray, early = await asyncio.gather(
        diagnose(machine_checks(data_dir)), diagnose(ray_checks()), diagnose(early_checks(data_dir))
    )
    server = next(one.finding for one in early if one.name == "embedded server")
    postgres, database = await diagnose_database(
        settings, data_dir, stack, embedded_is_clear=server.state is State.OK
    )
    late = await diagnose(late_checks(data_dir, database, embedded=embedded))
    return [*machine, *ray, *postgres, *early, *late]


async def clear(leftovers: list[Leftover]) -> tuple[list[Leftover], list[Leftover]]:
    """Clear them one after another: what is gone, and what is not, as it is in use or resists."""
    gone: list[Leftover] = []
    kept: list[Leftover] = []
    for leftover in leftovers:
        try:
            cleared = await in_a_thread(leftover.clear)
        except (OrchestratorError, OSError, TimeoutError) as error:
            log.warning("leftover_not_cleared", what=leftover.what, why=str(error))
            cleared = False
        (gone if cleared else kept).append(leftover)
    return gone, kept
