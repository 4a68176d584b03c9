"""What is known of one pod, from whatever source it comes: its newest state, and the end that counts."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from orchestrator.adapters.kubernetes.evidence import GONE, RUNNING, PodView, judge, node_lost
from orchestrator.ports import Evidence

# A kubelet writes the phase, and with it its own reason, 1 to 3 s after the end of the container.
PHASE_SECONDS = 10.0

NOT_RUNNING_YET = Evidence(running=True, reason="not running yet")


@dataclass
class PodRecord:
    """A pod that somebody in this process cares for. `end` is set once, and never changes."""

    name: str
    view: PodView | None = None
    end: Evidence | None = None
    read_at: float = float("-inf")  # when it was last asked for by its name, on the monotonic clock
    _at_end: PodView | None = None
    _ended_at: float = 0.0
    _ran: bool = False
    _bell: asyncio.Event = field(default_factory=asyncio.Event)

    def see(self, view: PodView) -> None:
        """Take note of a state; older ones than the newest are of no interest."""
        last = self.view
        if last is not None and view.version <= last.version:
            return
        if last is None or view.uid != last.uid:
            self._begin_anew()  # also where it was looked for before it was made
        elif self.end is not None:
            return
        self.view = view
        self._ran = self._ran or view.runs
        if view.has_ended:
            self.end = judge(view, self._at_end, ran=self._ran)
        elif view.terminated is not None:
            if self._at_end is None:
                self._at_end, self._ended_at = view, time.monotonic()
        elif view.is_deleted:
            self.end = judge(view, ran=self._ran)
        self._ring()

    def see_gone(self, uid: str | None = None) -> None:
        """There is no such pod any more; with a `uid`, none of that one."""
        if uid is not None and (self.view is None or self.view.uid != uid):
            return
        if self.end is None:
            ended = self.view is not None and self._at_end is not None
            self.end = judge(self.view, self._at_end, ran=self._ran) if ended and self.view else GONE
            self._ring()

    def _begin_anew(self) -> None:
        self.end, self._at_end, self._ran = None, None, False

    @property
    def evidence(self) -> Evidence | None:
        """How it stands or ended; None where nothing is known, or its end is not known in full yet."""
        if self.end is not None:
            return self.end
        if self.view is None or self._at_end is not None:
            return None
        if self.view.node_is_lost:
            return node_lost()
        return RUNNING if self.view.runs else NOT_RUNNING_YET

    async def settled(self) -> Evidence | None:
        """The same, once an end that is not known in full was given its time."""
        while self.end is None and self._at_end is not None and self.view is not None:
            left = self._ended_at + PHASE_SECONDS - time.monotonic()
            if left <= 0:
                self.end = judge(self.view, self._at_end, ran=self._ran)
            else:
                await self.changes(left)
        return self.evidence

    async def changes(self, seconds: float) -> None:
        """Return with the next change, after that time at the latest."""
        bell = self._bell
        try:
            async with asyncio.timeout(seconds):
                await bell.wait()
        except TimeoutError:
            return

    def _ring(self) -> None:
        bell, self._bell = self._bell, asyncio.Event()
        bell.set()
