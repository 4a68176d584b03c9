"""One watch: what is there first, then every change, bookmarks, and an end after `timeoutSeconds`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Iterator, Mapping

from aiohttp import web

from tests.kubernetes_double.objects import Change, Kind, ObjectStore, selector
from tests.kubernetes_double.refusals import Json, Refused
from tests.kubernetes_double.requests import number
from tests.kubernetes_double.rights import Call

DEFAULT_TIMEOUT_SECONDS = 1800


class Watch:
    """Streams the changes that a watch asked for."""

    def __init__(
        self, store: ObjectStore, kind: Kind, call: Call, query: Mapping[str, str], bookmark_seconds: float
    ) -> None:
        fields = query.get("fieldSelector", "")
        if call.name:
            fields = f"metadata.name={call.name}" + (f",{fields}" if fields else "")
        self._wanted = selector(kind.plural, query.get("labelSelector", ""), fields)
        self._store = store
        self._kind = kind
        self._namespace = call.namespace
        self._given_version = query.get("resourceVersion", "")
        seconds = number(query, "timeoutSeconds")
        self._until = time.monotonic() + (
            seconds if seconds else DEFAULT_TIMEOUT_SECONDS * (1 + random.random())
        )
        bookmarks = query.get("allowWatchBookmarks", "").lower() in ("1", "true")
        self._bookmark_seconds = bookmark_seconds if bookmarks else None

    async def serve(
        self, request: web.Request, closing: asyncio.Event, *, gone_as_status: bool
    ) -> web.StreamResponse:
        """Stream until the time is over, the history is forgotten, or either side closes."""
        try:
            version, first = self._begin()
        except Refused as refused:
            if gone_as_status:
                raise
            version, first = 0, [{"type": "ERROR", "object": refused.status()}]
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.enable_chunked_encoding()
        with contextlib.suppress(ConnectionError):
            await response.prepare(request)
            for event in first:
                await _send(response, event)
            if not (first and first[0]["type"] == "ERROR"):
                await self._follow(response, version, closing)
            await response.write_eof()
        return response

    def _begin(self) -> tuple[int, list[Json]]:
        """From which version on, and what comes before it.

        Raises:
            Refused: 410, that version is forgotten.
        """
        if self._given_version not in ("", "0"):
            version = int(self._given_version)
            self._store.changes_after(version)
            return version, []
        found = self._store.select(self._kind.plural, self._namespace, self._wanted)
        return self._store.version, [{"type": "ADDED", "object": stored} for _, stored in found]

    async def _follow(self, response: web.StreamResponse, version: int, closing: asyncio.Event) -> None:
        bookmark_at = self._next_bookmark()
        closed = asyncio.ensure_future(closing.wait())
        try:
            while time.monotonic() < self._until and not closing.is_set():
                bell, seen = self._store.next_change, self._store.version
                try:
                    events = list(self._events(version))
                except Refused as refused:
                    await _send(response, {"type": "ERROR", "object": refused.status()})
                    return
                for event in events:
                    await _send(response, event)
                # One of the future stays silent until the server has come that far.
                version = max(version, seen)
                if time.monotonic() >= bookmark_at:
                    await _send(response, self._bookmark(version))
                    bookmark_at = self._next_bookmark()
                pause = max(min(self._until, bookmark_at) - time.monotonic(), 0)
                changed = asyncio.ensure_future(bell.wait())
                await asyncio.wait({changed, closed}, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
        finally:
            closed.cancel()
        if self._bookmark_seconds is not None and not closing.is_set():
            await _send(response, self._bookmark(version))  # the real one sends one before it closes

    def _next_bookmark(self) -> float:
        return time.monotonic() + self._bookmark_seconds if self._bookmark_seconds else float("inf")

    def _bookmark(self, version: int) -> Json:
        metadata = {"resourceVersion": str(version), "creationTimestamp": None}
        marked: Json = {"kind": self._kind.kind, "apiVersion": self._kind.api_version, "metadata": metadata}
        if self._kind.plural == "pods":
            marked |= {"spec": {"containers": None}, "status": {}}
        return {"type": "BOOKMARK", "object": marked}

    def _events(self, version: int) -> Iterator[Json]:
        for change in self._store.changes_after(version):
            mine = change.key.plural == self._kind.plural
            if mine and self._namespace in ("", change.key.namespace):
                event = self._event(change)
                if event is not None:
                    yield event

    def _event(self, change: Change) -> Json | None:
        """The change as one who sees only what he selected sees it."""
        before = change.before if change.before is not None and self._wanted(change.before) else None
        after = change.after if change.after is not None and self._wanted(change.after) else None
        if after is not None:
            return {"type": "ADDED" if before is None else "MODIFIED", "object": after}
        if before is None:
            return None
        last = {**before, "metadata": {**before["metadata"], "resourceVersion": str(change.version)}}
        return {"type": "DELETED", "object": last}


async def _send(response: web.StreamResponse, event: Json) -> None:
    await response.write(json.dumps(event, separators=(",", ":")).encode() + b"\n")
