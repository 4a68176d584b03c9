"""A proxy in front of an API server that spoils answers: on order, or by a seeded chance."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Self

import aiohttp
from aiohttp import web

from tests.kubernetes_double.refusals import Refused, gone
from tests.kubernetes_double.requests import read_call
from tests.kubernetes_double.rights import Call

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "content-encoding", "host"}
HTML = "<html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>\n"
FIRST_VERSION = "1000"


class Fault(StrEnum):
    """What becomes of one request."""

    CONFLICT = "409"
    GONE = "410"
    GONE_EVENT = "410 as an event of the watch"
    TOO_MANY_REQUESTS = "429"
    SERVER_ERROR = "500"
    UNAUTHORIZED = "401"
    BAD_GATEWAY = "502 in HTML"
    GARBAGE = "what is no JSON"
    CUT = "cut in the middle"
    HANG = "no answer"
    RESET = "reset before it was done"
    ACK_AND_DROP = "done, and the answer lost"
    STALE_LIST = "a list of the past"
    WATCH_CLOSED = "a watch that is closed at once"


OF_EVERY_CALL = (
    Fault.CONFLICT,
    Fault.GONE,
    Fault.TOO_MANY_REQUESTS,
    Fault.SERVER_ERROR,
    Fault.UNAUTHORIZED,
    Fault.BAD_GATEWAY,
    Fault.GARBAGE,
    Fault.CUT,
    Fault.HANG,
    Fault.RESET,
    Fault.ACK_AND_DROP,
)
OF_WATCHES = (Fault.GONE_EVENT, Fault.WATCH_CLOSED)


def faults_of(verb: str) -> tuple[Fault, ...]:
    """The faults that a call with this verb can meet."""
    if verb == "watch":
        return OF_EVERY_CALL + OF_WATCHES
    return (*OF_EVERY_CALL, Fault.STALE_LIST) if verb == "list" else OF_EVERY_CALL


_STATUSES = {
    Fault.CONFLICT: Refused(409, "Conflict", "Operation cannot be fulfilled: please apply your changes anew"),
    Fault.GONE: gone(),
    Fault.TOO_MANY_REQUESTS: Refused(
        429, "TooManyRequests", "the server has received too many requests", retry_after_seconds=1
    ),
    Fault.SERVER_ERROR: Refused(500, "InternalError", "Internal error occurred: etcdserver: leader changed"),
    Fault.UNAUTHORIZED: Refused(401, "Unauthorized", "Unauthorized"),
}


@dataclass
class Chance:
    """Faults by chance. The seed decides which calls, in the order in which they come."""

    seed: int
    probability: float
    faults: Sequence[Fault] = OF_EVERY_CALL + OF_WATCHES + (Fault.STALE_LIST,)
    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def draw(self, call: Call) -> Fault | None:
        """The fault that this call meets, if it meets one."""
        if self._random.random() >= self.probability:
            return None
        possible = [fault for fault in faults_of(call.verb) if fault in self.faults]
        return self._random.choice(possible) if possible else None


class FaultProxy:
    """The proxy at `url`, from `async with` on. `fired` counts what it did to which calls."""

    def __init__(self, upstream: str, chance: Chance | None = None, *, hang_seconds: float = 120.0) -> None:
        self.chance = chance
        self.fired: Counter[tuple[Call, Fault]] = Counter()
        self._upstream = upstream
        self._hang_seconds = hang_seconds
        self._ordered: list[tuple[Callable[[Call], bool], Fault]] = []
        self._down = False
        self.refused = 0  # calls that came during an outage
        self._lists: dict[str, bytes] = {}  # the first answer to each list
        self._closing = asyncio.Event()
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            connector = aiohttp.TCPConnector(limit=0)
            timeout = aiohttp.ClientTimeout(total=None)
            session = aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False)
            self._session = await stack.enter_async_context(session)
            application = web.Application(client_max_size=4 * 2**20)
            application.router.add_route("*", "/{path:.*}", self._pass_on)
            runner = web.AppRunner(
                application, access_log=None, shutdown_timeout=1, handler_cancellation=True
            )
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            stack.callback(self._closing.set)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)

    # ------------------------------------------------------------------------------------------ orders

    def spoil(self, fault: Fault, times: int = 1, when: Callable[[Call], bool] = lambda call: True) -> None:
        """The next calls for which `when` holds meet this fault, so many times."""
        self._ordered += [(when, fault)] * times

    @contextlib.contextmanager
    def outage(self) -> Iterator[None]:
        """Every connection is reset, old and new, as while a server is down."""
        self._down = True
        try:
            yield
        finally:
            self._down = False

    def _fault_of(self, call: Call) -> Fault | None:
        for order in self._ordered:
            when, fault = order
            if when(call):
                self._ordered.remove(order)
                return fault
        return None if self.chance is None else self.chance.draw(call)

    # ----------------------------------------------------------------------------------------- requests

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        if self._down:
            self.refused += 1
            return _reset(request)
        try:
            call = read_call(request.method, request.path, request.query)
        except Refused:
            return await self._forward(request, body)
        fault = self._fault_of(call)
        if fault is None:
            return await (self._stream if call.verb == "watch" else self._forward)(request, body)
        self.fired[call, fault] += 1
        return await self._spoil(request, body, call, fault)

    async def _spoil(self, request: web.Request, body: bytes, call: Call, fault: Fault) -> web.StreamResponse:
        if (refused := _STATUSES.get(fault)) is not None:
            headers = {} if refused.retry_after_seconds is None else {"Retry-After": "1"}
            return web.json_response(refused.status(), status=refused.code, headers=headers)
        match fault:
            case Fault.BAD_GATEWAY:
                return web.Response(status=502, text=HTML, content_type="text/html")
            case Fault.GARBAGE:
                return web.Response(body=HTML.encode() + b"\xff\xfe\x00\n", content_type="application/json")
            case Fault.HANG:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._closing.wait(), self._hang_seconds)
                return _reset(request)
            case Fault.GONE_EVENT:
                event = {"type": "ERROR", "object": gone().status()}
                return web.Response(text=json.dumps(event) + "\n", content_type="application/json")
            case Fault.WATCH_CLOSED:
                return web.Response(body=b"", content_type="application/json")
            case Fault.STALE_LIST:
                return await self._list_of_the_past(request, body)
            case Fault.ACK_AND_DROP | Fault.CUT:
                return await self._drop(request, body, call, fault)
        return _reset(request)

    async def _drop(self, request: web.Request, body: bytes, call: Call, fault: Fault) -> web.StreamResponse:
        """Do it, and lose the answer, or the second half of it."""
        if call.verb == "watch":
            return await self._stream(request, body, cut_after_bytes=200 if fault is Fault.CUT else 0)
        answer = await self._forward(request, body)
        if fault is Fault.CUT:
            assert isinstance(answer.body, bytes)
            partial = web.StreamResponse(status=answer.status, headers=answer.headers)
            partial.content_length = len(answer.body)
            await partial.prepare(request)
            await partial.write(answer.body[: len(answer.body) // 2])
        return _reset(request)

    async def _list_of_the_past(self, request: web.Request, body: bytes) -> web.Response:
        answer = await self._forward(request, body)
        if answer.status != 200:
            return answer
        assert isinstance(answer.body, bytes)
        past = self._lists.get(_what(request))
        if past is None or past == answer.body:
            listed = json.loads(answer.body)
            past = json.dumps(
                {**listed, "metadata": {"resourceVersion": FIRST_VERSION}, "items": []}
            ).encode()
        return web.Response(body=past, content_type="application/json")

    async def _forward(self, request: web.Request, body: bytes) -> web.Response:
        try:
            async with self._call(request, body) as response:
                answer = await response.read()
                if request.method == "GET" and response.status == 200:
                    self._lists.setdefault(_what(request), answer)
                return web.Response(status=response.status, body=answer, headers=_kept(response.headers))
        except aiohttp.ClientError:
            return _reset(request)

    async def _stream(
        self, request: web.Request, body: bytes, cut_after_bytes: int | None = None
    ) -> web.StreamResponse:
        """Pass a watch on, until either side closes, or so many bytes went through."""
        answer = web.StreamResponse()
        try:
            async with self._call(request, body) as response:
                answer.set_status(response.status)
                answer.headers.update(_kept(response.headers))
                await answer.prepare(request)
                async for chunk in response.content.iter_any():
                    if self._down:
                        return _reset(request)
                    if cut_after_bytes is not None:
                        await answer.write(chunk[:cut_after_bytes] or b"{")
                        return _reset(request)
                    await answer.write(chunk)
                await answer.write_eof()
        except (aiohttp.ClientError, ConnectionError):
            return _reset(request)
        return answer

    @contextlib.asynccontextmanager
    async def _call(self, request: web.Request, body: bytes) -> AsyncIterator[aiohttp.ClientResponse]:
        async with self._session.request(
            request.method, self._upstream + request.raw_path, data=body, headers=_kept(request.headers)
        ) as response:
            yield response


def _kept(headers: object) -> dict[str, str]:
    pairs = headers.items()  # type: ignore[attr-defined]
    return {name: value for name, value in pairs if name.lower() not in HOP_BY_HOP}


def _what(request: web.Request) -> str:
    query = {name: value for name, value in request.query.items() if name not in ("resourceVersion", "limit")}
    return f"{request.path}?{sorted(query.items())}"


def _reset(request: web.Request) -> web.Response:
    """Cut the connection so that the other side sees a reset; the response goes nowhere."""
    transport = request.transport
    if transport is not None:
        connection: socket.socket | None = transport.get_extra_info("socket")
        if connection is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    return web.Response()
