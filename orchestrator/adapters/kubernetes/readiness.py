"""Waits until a pod's submission host accepts connections, and says what keeps it from that."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from orchestrator.adapters.kubernetes.api import ApiUnreachable
from orchestrator.adapters.kubernetes.evidence import (
    PodView,
    Waiting,
    is_of_the_image,
    newest_trouble,
    patience_seconds,
    words,
)
from orchestrator.adapters.kubernetes.manifests import RPC_PORT
from orchestrator.adapters.kubernetes.objects import AttemptObjects
from orchestrator.adapters.kubernetes.pod_record import PodRecord
from orchestrator.adapters.kubernetes.preflight_api import ApiRefused
from orchestrator.adapters.kubernetes.watch import PodWatch
from orchestrator.domain.errors import InfrastructureError, UsageError
from orchestrator.ports import Endpoint

LOOK_SECONDS = 1.0
UNHEARD_SECONDS, UNWATCHED_SECONDS = 15.0, 3.0
CONNECT_SECONDS = 3.0
FIRST_DIAL_PAUSE_SECONDS, LONGEST_DIAL_PAUSE_SECONDS = 0.05, 0.5
# A pod begins within a second; what takes longer is worth a look at its events.
FIRST_EVENTS_SECONDS, LONGEST_EVENTS_SECONDS = 0.5, 10.0

Tell = Callable[[str], Awaitable[None]]


class Ended(Exception):
    """It ended before: `PodRecord` says how."""


@dataclass
class Patience:
    """The time that is left. What waits for room, or for the API server, has a time of its own."""

    seconds: float
    room_seconds: float
    api_seconds: float
    _spent: float = 0.0
    _spent_on_room: float = 0.0
    _spent_on_api: float = 0.0
    _looked_at: float = field(default_factory=time.monotonic)

    def spend(self, why: str, *, on_room: bool = False, on_api: bool = False) -> None:
        """Count the time since the last call for what was waited for meanwhile.

        Raises:
            InfrastructureError: that was too long; says what for.
        """
        now = time.monotonic()
        passed, self._looked_at = now - self._looked_at, now
        if on_room:
            self._spent_on_room += passed
            if self._spent_on_room >= self.room_seconds:
                raise InfrastructureError(f"there was no room for {self.room_seconds:g} s: {why}")
        elif on_api:
            self._spent_on_api += passed
            if self._spent_on_api >= self.api_seconds:
                raise InfrastructureError(f"the API server was away for {self.api_seconds:g} s: {why}")
        else:
            self._spent += passed
            if self._spent >= self.seconds:
                said = f"; the last that was known: {why}" if why else ""
                raise InfrastructureError(
                    f"the submission host did not listen within {self.seconds:g} s{said}"
                )


@dataclass
class Readiness:
    """One wait for one pod."""

    objects: AttemptObjects
    watch: PodWatch
    record: PodRecord
    patience: Patience
    own_image: str  # of the installation: another one is the job's own
    tell: Tell | None = None
    _told: set[str] = field(default_factory=set)
    _last_word: str = ""
    _waits: dict[str, float] = field(default_factory=dict)  # since when, by reason
    _asked_at: float = field(default_factory=time.monotonic)
    _events_at: float | None = None
    _events_pause: float = FIRST_EVENTS_SECONDS

    async def endpoint(self) -> Endpoint:
        """Where it listens.

        Raises:
            Ended: it has ended, or is being deleted, or its node is lost.
            InfrastructureError: the time is over, or it can never begin.
            UsageError: it can never begin because of the image that the job itself names.
        """
        pause = FIRST_DIAL_PAUSE_SECONDS
        while True:
            view = self.record.view
            if (evidence := await self.record.settled()) is not None and not evidence.running:
                raise Ended
            if view is not None and view.runs and view.ip:
                if await accepts(view.ip):
                    return Endpoint(view.ip, RPC_PORT)
                await self._pass_time(pause, view)
                pause = min(2 * pause, LONGEST_DIAL_PAUSE_SECONDS)
                continue
            if view is not None:
                await self._look(view)
            await self._pass_time(LOOK_SECONDS if view is None or view.unschedulable else 0.25, view)

    async def _pass_time(self, seconds: float, view: PodView | None) -> None:
        await self.record.changes(seconds)
        await self._ask_if_unheard()
        unschedulable = view is not None and bool(view.unschedulable) and not view.is_scheduled
        away = self.watch.is_away and not (view is not None and view.runs)
        if away:
            await self.say("waits for the Kubernetes API server")
        self.patience.spend(self._last_word, on_room=unschedulable and not away, on_api=away)

    async def _ask_if_unheard(self) -> None:
        """Ask for the pod itself, now and then, should the watch be cut off or silent without knowing it."""
        pause = UNHEARD_SECONDS if self.watch.is_live else UNWATCHED_SECONDS
        if time.monotonic() - max(self.record.read_at, self._asked_at) < pause:
            return
        self._asked_at = time.monotonic()
        with contextlib.suppress(ApiRefused, ApiUnreachable):
            await self.watch.read(self.record.name)

    async def _look(self, view: PodView) -> None:
        """Say what a pod waits for that does not run."""
        if view.unschedulable and not view.is_scheduled:
            await self.say(f"waits for a node: {view.unschedulable}")
            return
        waiting = view.waiting
        if waiting is not None and (seconds := patience_seconds(waiting)) is not None:
            await self.say(f"waits for its container: {waiting}")
            since = self._waits.setdefault("container", time.monotonic())
            if time.monotonic() - since >= seconds:
                raise self._never(view, waiting)
            return
        self._waits.clear()
        if view.is_scheduled:
            await self._look_at_events(view)

    def _never(self, view: PodView, waiting: Waiting) -> InfrastructureError | UsageError:
        why = f"the container cannot begin: {waiting}"
        # The installation's own image may be there again for the next attempt; a job's is the job's affair.
        of_the_job = is_of_the_image(waiting) and view.image != self.own_image
        return (
            UsageError(f"{why}; the job asks for image {view.image}")
            if of_the_job
            else InfrastructureError(why)
        )

    async def _look_at_events(self, view: PodView) -> None:
        """Why a pod stays in ContainerCreating stands in its events alone."""
        now = time.monotonic()
        if self._events_at is None:
            self._events_at = now + self._events_pause
        if now < self._events_at:
            return
        self._events_pause = min(2 * self._events_pause, LONGEST_EVENTS_SECONDS)
        self._events_at = now + self._events_pause
        try:
            trouble = newest_trouble(await self.objects.events(view.name))
        except (ApiRefused, ApiUnreachable) as error:
            trouble = words(f"its events cannot be read: {error}") if isinstance(error, ApiRefused) else ""
        if trouble:
            await self.say(f"waits for its container: {trouble}")

    async def say(self, why: str) -> None:
        """Tell each reason once; the last one stands in the error when the time is over."""
        self._last_word = why
        if why not in self._told:
            self._told.add(why)
            if self.tell is not None:
                await self.tell(why)


async def accepts(host: str) -> bool:
    """Whether somebody accepts connections on the RPC port there. A refusal proves nothing."""
    return await dial(host) is True


async def dial(host: str) -> bool | None:
    """True if somebody accepts, False if the connection is refused, None if nobody answers at all."""
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(host, RPC_PORT)
    except ConnectionError:
        return False
    except (OSError, TimeoutError):
        return None
    writer.close()
    return True
