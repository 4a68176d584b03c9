"""How long a job bears with faults of ours before it is given back."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from orchestrator.domain.errors import InfrastructureError

# Faults in a row, without any outcome in between.
MAX_FRUITLESS_FAULTS = 5
MAX_PAUSE_SECONDS = 5.0


@dataclass
class FruitlessFaults:
    """Counts faults of ours in a row, and makes each wait longer than the one before."""

    pause: Callable[[float], Awaitable[None]] = asyncio.sleep  # waits for so many seconds
    _in_a_row: int = field(default=0, init=False)

    def progress(self) -> None:
        """An episode has got its outcome: what went wrong before was passing."""
        self._in_a_row = 0

    async def count(self, reason: str) -> None:
        """Return after a pause.

        Raises:
            InfrastructureError: there were too many without progress; holds the last reason.
        """
        self._in_a_row += 1
        if self._in_a_row > MAX_FRUITLESS_FAULTS:
            raise InfrastructureError(f"{self._in_a_row} faults without progress; last: {reason}")
        seconds = min(MAX_PAUSE_SECONDS, 0.1 * 2**self._in_a_row)
        await self.pause(seconds * random.uniform(0.5, 1.0))  # noqa: S311
