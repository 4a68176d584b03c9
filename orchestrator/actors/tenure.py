"""Whether an actor of the control plane still has its place: a process that stood still may have lost it.

Ray ends a stopped process only some seconds after it has killed its actor, and not at all where a newer
generation's is made beside it. A process that goes on must find out by itself, before it acts on anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
import structlog

from orchestrator.actors.ray_calls import actor_id_of, actor_names, off_loop, own_actor_id
from orchestrator.domain.errors import InfrastructureError

log = structlog.get_logger(__name__)

LOOK_EVERY_SECONDS = 5.0
CONSUMER_PREFIX = "queue-consumer-g"


@dataclass(frozen=True)
class Tenure:
    """The place of the actor `<prefix><generation>`, as the process that asks has it, or not any more.

    It is lost to a newer generation once that has a consumer, which comes last when it takes over: its sink
    is there before the supervisors that send to the older one have drained.
    """

    namespace: str
    prefix: str
    generation: int

    async def is_over(self) -> str | None:
        """Why another one has the place now, or None. A process outside of Ray has no place to lose.

        Raises:
            InfrastructureError: Ray does not answer.
        """
        if not ray.is_initialized() or (own := own_actor_id()) is None:
            return None
        names = await off_loop(actor_names, self.namespace, CONSUMER_PREFIX)
        newest = max((int(name.removeprefix(CONSUMER_PREFIX)) for name in names), default=-1)
        if newest > self.generation:
            return f"generation {newest} is there, and this one is {self.generation}"
        holder = await off_loop(actor_id_of, f"{self.prefix}{self.generation}", self.namespace)
        return None if holder == own else "another actor has the name, or none"

    async def lasts(self) -> None:
        """Returns once it is over; looked at every few seconds, and at once after a standstill."""
        while True:
            await asyncio.sleep(LOOK_EVERY_SECONDS)
            try:
                why = await self.is_over()
            except InfrastructureError as error:
                log.warning("tenure_unknown", actor=f"{self.prefix}{self.generation}", why=str(error))
                continue
            if why is not None:
                log.warning("actor_is_superseded", actor=f"{self.prefix}{self.generation}", why=why)
                return

    async def during(self, work: Coroutine[Any, Any, None]) -> bool:
        """Do the work while it lasts: whether that is over; then the work was cancelled."""
        working = asyncio.create_task(work)
        lasting = asyncio.create_task(self.lasts())
        try:
            await asyncio.wait({working, lasting}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
                return False
            return True
        finally:
            for task in (working, lasting):
                task.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.wait({working, lasting})
