"""The one list-and-watch of a process over all submissions' pods; it feeds the records that are followed."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import aclosing
from typing import Any

import structlog

from orchestrator.adapters.kubernetes.api import ApiGarbage, ApiUnreachable, KubernetesApi
from orchestrator.adapters.kubernetes.evidence import PodView, view_of
from orchestrator.adapters.kubernetes.manifests import CONTAINER, selector_of
from orchestrator.adapters.kubernetes.pod_record import PodRecord
from orchestrator.adapters.kubernetes.preflight_api import ApiRefused, Paths

log = structlog.get_logger(__name__)

Json = dict[str, Any]

SHORTEST_WATCH_SECONDS, LONGEST_WATCH_SECONDS = 25, 35
# Beyond the time that the server was given: a connection that is dead in silence shows in nothing else.
SILENCE_SECONDS = 10.0
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 5.0
LIST_SECONDS = 15.0
READS_AT_ONCE = 8


class PodWatch:
    """Runs from the first `follow` until `close`. Only pods that are followed take memory."""

    def __init__(self, api: KubernetesApi, namespace: str) -> None:
        self._api = api
        self._paths = Paths(namespace)
        self._records: dict[str, PodRecord] = {}
        self._task: asyncio.Task[None] | None = None
        self._away_since: float | None = None
        self._hears = False
        self._version: str | None = None  # to go on from; None where all has to be listed

    @property
    def is_live(self) -> bool:
        """Whether changes are heard of as they come, as far as the watch knows."""
        return self._hears and self._away_since is None

    @property
    def is_away(self) -> bool:
        """Whether the API server does not answer, as far as the watch knows."""
        return self._away_since is not None

    def follow(self, name: str) -> PodRecord:
        """The record of that pod, kept up to date from now on; what was before has to be asked for."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="pod watch")
        return self._records.setdefault(name, PodRecord(name))

    def view(self, name: str) -> PodView | None:
        """What is known of that pod, if it is followed."""
        record = self._records.get(name)
        return None if record is None else record.view

    def forget(self, name: str) -> None:
        """Follow that pod no more; whoever waits for it hears that it is gone."""
        record = self._records.pop(name, None)
        if record is not None:
            record.see_gone()

    async def close(self) -> None:
        """End the watch."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})

    async def read(self, name: str) -> None:
        """Ask for one pod: unlike what is watched, the answer is never older than the question.

        Raises:
            ApiRefused, ApiUnreachable.
        """
        record = self._records.get(name)
        try:
            pod = await self._api.once("GET", self._paths.of("pods", name))
            view = _view_of(pod)
        except ApiRefused as refused:
            if refused.status != 404:
                raise
            if record is not None:
                record.see_gone()
            return
        if record is not None:
            record.read_at = time.monotonic()
            record.see(view)

    # ------------------------------------------------------------------------------------- the loop

    async def _run(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while True:
            began_at = time.monotonic()
            try:
                if self._version is None:
                    self._version = await self._list()
                await self._watch(self._version)
            except (ApiRefused, ApiUnreachable) as error:
                # A connection that was cut has lost nothing; a silent one, or one to another, may have.
                was_cut = not isinstance(error, ApiRefused | ApiGarbage)
                if not was_cut or isinstance(error.__cause__, TimeoutError):
                    self._version = None
                self._failed(error)
            except Exception as error:
                self._version = None
                log.exception("pod_watch_failed", why=str(error))
            # Also after a watch that ended well, but at once: a server may close each as soon as it is open.
            lasted = time.monotonic() - began_at
            pause = (
                FIRST_PAUSE_SECONDS
                if lasted > LONGEST_PAUSE_SECONDS
                else min(2 * pause, LONGEST_PAUSE_SECONDS)
            )
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - spreads callers

    def _failed(self, error: ApiRefused | ApiUnreachable) -> None:
        if isinstance(error, ApiRefused) and error.status == 410:
            return  # not a failure: its history is as long as it is
        if self._away_since is None:
            self._away_since = time.monotonic()
            log.warning("pod_watch_interrupted", why=str(error))

    def _heard(self) -> None:
        self._hears = True
        if self._away_since is not None:
            log.info("pod_watch_resumed", after_seconds=round(time.monotonic() - self._away_since, 1))
            self._away_since = None

    async def _list(self) -> str:
        """Take note of all there is; the version to watch from."""
        query = {"labelSelector": selector_of(None, CONTAINER)}
        listed = await self._api.once(
            "GET", self._paths.of("pods"), query=query, timeout_seconds=LIST_SECONDS
        )
        try:
            version = str(listed["metadata"]["resourceVersion"])
            items = {pod["metadata"]["name"]: pod for pod in listed.get("items") or []}
        except (KeyError, TypeError) as error:
            raise ApiGarbage("the API server's list is none") from error
        for name, pod in items.items():
            if (record := self._records.get(name)) is not None:
                record.see(_view_of(pod))
        self._heard()
        # A list may be of the past: what it lacks is asked for by its name, before it counts as gone.
        await self._read_missing([name for name in self._records if name not in items])
        return version

    async def _read_missing(self, names: list[str]) -> None:
        places = asyncio.Semaphore(READS_AT_ONCE)

        async def read(name: str) -> None:
            record = self._records.get(name)
            if record is not None and record.view is not None and record.end is None:
                async with places:
                    await self.read(name)

        for result in await asyncio.gather(*map(read, names), return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    async def _watch(self, version: str) -> None:
        """One watch from that version to its end."""
        seconds = random.randint(SHORTEST_WATCH_SECONDS, LONGEST_WATCH_SECONDS)  # noqa: S311
        query = {
            "labelSelector": selector_of(None, CONTAINER),
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(seconds),
        }
        began_at, heard = time.monotonic(), False
        events = self._api.watch(
            self._paths.of("pods"), query=query, silence_seconds=seconds + SILENCE_SECONDS
        )
        async with aclosing(events):
            async for event in events:
                heard = True
                self._heard()
                self._version = self._take(event)
        self._heard()
        # A server says at least a bookmark before it ends a watch, unless the version is one that it has not
        # come to yet: then it would stay silent for ever.
        lasted_whole = time.monotonic() - began_at > SHORTEST_WATCH_SECONDS / 2
        if lasted_whole and not heard:
            self._version = None

    def _take(self, event: Json) -> str:
        pod, kind = event["object"], event["type"]
        try:
            metadata = pod["metadata"]
            version, name = str(metadata["resourceVersion"]), metadata.get("name")
        except (KeyError, TypeError, AttributeError) as error:
            raise ApiGarbage("the API server sent an event of nothing") from error
        record = self._records.get(name) if name and kind != "BOOKMARK" else None
        if record is not None:
            view = _view_of(pod)
            record.see(view)
            if kind == "DELETED":
                record.see_gone(view.uid)
        return version


def _view_of(pod: Json) -> Any:
    try:
        return view_of(pod)
    except ValueError as error:
        raise ApiGarbage(f"the API server sent {error}") from error
