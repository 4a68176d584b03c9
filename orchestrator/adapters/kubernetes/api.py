"""One raw-JSON client of the API server for a process: one call, one watch, and calls that do not give up.

`kubernetes.aio` gives credentials and connections; its typed models cost too much, and its retries do not
cover what an API server does.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import aiohttp
import structlog

from orchestrator.adapters.kubernetes.access import ClusterAccess
from orchestrator.adapters.kubernetes.preflight_api import ApiRefused
from orchestrator.domain.errors import InfrastructureError
from orchestrator.failpoints import reach_async

if TYPE_CHECKING:
    from kubernetes.aio.client import ApiClient

log = structlog.get_logger(__name__)

Json = dict[str, Any]
T = TypeVar("T")

CALL_SECONDS = 10.0
CONNECT_SECONDS = 5.0
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 5.0
LONGEST_RETRY_AFTER_SECONDS = 30.0
# After a restart an API server may not know its roles yet.
RIGHTS_PATIENCE_SECONDS = 15.0
LONGEST_LINE_BYTES = 16 * 2**20
LONGEST_LOG_BYTES = 8 * 2**20
# What an API server answers though nothing is wrong with the call.
_PASSING = frozenset({401, 408, 410, 425, 429, 500, 502, 503, 504})


class ApiUnreachable(InfrastructureError):
    """No answer, half of one, or one that is not the API server's."""


class ApiGarbage(ApiUnreachable):
    """Something answered that is not the API server, or not whole."""


class KubernetesApi:
    """Opens its connections with the first call, and closes them with `close`. For one event loop."""

    def __init__(self, access: ClusterAccess) -> None:
        self._access = access

    async def close(self) -> None:
        """Let go of every connection."""
        await self._access.close()

    async def once(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Json | None = None,
        timeout_seconds: float = CALL_SECONDS,
    ) -> Json:
        """The answer to one call, tried once.

        Raises:
            ApiRefused: the server answered with an error.
            ApiUnreachable: no answer in time that can be read; the call may have been carried out.
        """
        data = await self._bytes(method, path, query, body, timeout_seconds)
        try:
            answer = json.loads(data)
        except ValueError:
            raise ApiGarbage(f"the API server's answer to {method} {path} is no JSON") from None
        if not isinstance(answer, dict):
            raise ApiGarbage(f"the API server's answer to {method} {path} is no object")
        return answer

    async def text(
        self, path: str, *, query: Mapping[str, str], timeout_seconds: float = CALL_SECONDS
    ) -> bytes:
        """The end of what one GET gives that is no JSON, such as a log.

        Raises:
            ApiRefused, ApiUnreachable: as `once`.
        """
        return await self._bytes("GET", path, query, None, timeout_seconds, keep_bytes=LONGEST_LOG_BYTES)

    async def _bytes(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: Json | None,
        timeout_seconds: float,
        keep_bytes: int | None = None,
    ) -> bytes:
        timeout = aiohttp.ClientTimeout(
            total=timeout_seconds, sock_connect=min(CONNECT_SECONDS, timeout_seconds)
        )
        async with self._answer(method, path, query, body, timeout) as response:
            if keep_bytes is None:
                return await response.read()
            kept = bytearray()
            async for chunk in response.content.iter_any():
                kept += chunk
                if len(kept) > 2 * keep_bytes:
                    del kept[:-keep_bytes]
            return bytes(kept[-keep_bytes:])

    async def watch(
        self, path: str, *, query: Mapping[str, str], silence_seconds: float
    ) -> AsyncGenerator[Json, None]:
        """The events of one watch, until the server ends it.

        Raises:
            ApiRefused, ApiUnreachable: as `once`; also what is no event, and a silence of that length.
        """
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=silence_seconds)
        async with self._answer("GET", path, {**query, "watch": "true"}, None, timeout) as response:
            line = bytearray()
            async for chunk in response.content.iter_any():
                first, *others = chunk.split(b"\n")
                line += first
                for part in others:
                    if line.strip():
                        yield _event(bytes(line))
                    line = bytearray(part)
                if len(line) > LONGEST_LINE_BYTES:
                    raise ApiGarbage("the API server sent an event without an end")
            if line.strip():
                raise ApiUnreachable("the API server's watch was cut in the middle of an event")

    @asynccontextmanager
    async def _answer(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: Json | None,
        timeout: aiohttp.ClientTimeout,
    ) -> AsyncGenerator[aiohttp.ClientResponse, None]:
        """The response to a call that was not refused."""
        started_at = time.monotonic()
        try:
            client = await self._access.client()
            async with asyncio.timeout(timeout.total or CALL_SECONDS) as patience:
                response = await _send(client, method, path, query, body, timeout)
                if timeout.total is None:
                    patience.reschedule(None)
                try:
                    if response.status >= 400:
                        raise _refusal(response, await response.content.read(64 * 2**10))
                    yield response
                finally:
                    response.close() if timeout.total is None else response.release()
        except ApiRefused as refused:
            if refused.status == 401:
                await self._access.renew(started_at)
            raise
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            why = str(error) or type(error).__name__
            raise ApiUnreachable(f"the API server does not answer {method} {path}: {why}") from error

    # ------------------------------------------------------------------------- what preflight asks

    async def call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Json | None = None,
        timeout_seconds: float = CALL_SECONDS,
    ) -> Json:
        """The answer, after some tries where a try more does no harm.

        Raises:
            ApiRefused: the server answered with an error.
            InfrastructureError: it cannot be reached in time.
        """
        harmless = method != "POST" or (query or {}).get("dryRun") == "All" or "accessreviews" in path
        return await persistently(
            lambda: self.once(method, path, query=query, body=body, timeout_seconds=timeout_seconds),
            seconds=timeout_seconds if harmless else 0.0,
        )

    async def log(self, namespace: str, pod: str, *, timeout_seconds: float = CALL_SECONDS) -> str:
        """The end of a pod's log.

        Raises:
            ApiRefused, InfrastructureError: as `call`.
        """
        path = f"/api/v1/namespaces/{namespace}/pods/{pod}/log"
        data = await persistently(
            lambda: self.text(path, query={"tailLines": "1000"}, timeout_seconds=timeout_seconds),
            seconds=timeout_seconds,
        )
        return data.decode(errors="replace")


async def _send(
    client: ApiClient,
    method: str,
    path: str,
    query: Mapping[str, str] | None,
    body: Json | None,
    timeout: aiohttp.ClientTimeout,
) -> aiohttp.ClientResponse:
    method, url, headers, body, form = await client.param_serialize(
        method,
        path,
        query_params=list((query or {}).items()),
        header_params={"Accept": "application/json, */*"},
        body=body,
        auth_settings=["BearerToken"],
    )
    call = f"kubernetes.{method.lower()}"
    await reach_async(f"{call}.before", _cut)
    answer = await client.call_api(method, url, headers, body, form, _request_timeout=timeout)
    response: aiohttp.ClientResponse = answer.response
    try:
        await reach_async(f"{call}.after", _cut)
    except BaseException:
        response.close()
        raise
    return response


def _cut() -> NoReturn:
    raise aiohttp.ClientConnectionError("a failpoint cut the connection")


def _event(line: bytes) -> Json:
    try:
        event = json.loads(line)
        if event["type"] == "ERROR":
            status = event["object"]
            raise ApiRefused(int(status.get("code") or 500), str(status.get("message") or "no reason given"))
        if not isinstance(event["object"], dict):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ApiGarbage("the API server sent something else than an event of a watch") from None
    return dict(event)


def _refusal(response: aiohttp.ClientResponse, data: bytes) -> ApiRefused:
    """What the server has against it, from its Status; a proxy in between may answer in HTML."""
    reason, message = "", f"HTTP {response.status}"
    try:
        status = json.loads(data)
        reason, message = str(status.get("reason") or ""), str(status.get("message") or message)
    except (ValueError, AttributeError):
        pass
    after = response.headers.get("Retry-After", "")
    return ApiRefused(response.status, message, reason, float(after) if after.isdigit() else None)


def is_passing(error: ApiRefused | ApiUnreachable) -> bool:
    """Whether the same call may succeed a little later."""
    if isinstance(error, ApiUnreachable):
        return True
    return error.status in _PASSING or (error.status == 409 and error.reason == "Conflict")


def is_of_rights(error: ApiRefused) -> bool:
    """Whether the account may not do this, or the server does not know yet that it may."""
    return error.status == 403 and " cannot " in error.message


def _may_pass(error: ApiRefused, passed_seconds: float, seconds: float) -> bool:
    if is_of_rights(error):
        return passed_seconds < min(seconds, RIGHTS_PATIENCE_SECONDS)
    return is_passing(error)


async def persistently(
    attempt: Callable[[], Awaitable[T]],
    *,
    seconds: float,
    tell: Callable[[str], Awaitable[None]] | None = None,
) -> T:
    """What `attempt` gives in the end, tried for so long; `tell` hears why it takes its time.

    Raises:
        ApiRefused: the answer is an error that does not pass.
        InfrastructureError: the time is over; the text has the last reason.
    """
    started_at = time.monotonic()
    pause = FIRST_PAUSE_SECONDS
    while True:
        try:
            return await attempt()
        except (ApiRefused, ApiUnreachable) as error:
            passed = time.monotonic() - started_at
            if isinstance(error, ApiRefused) and not _may_pass(error, passed, seconds):
                raise
            if passed >= seconds:
                if isinstance(error, ApiRefused) and seconds == 0:
                    raise
                raise InfrastructureError(
                    f"the API server was of no help for {passed:.0f} s: {error}"
                ) from error
            if tell is not None:
                await tell(f"waits for the Kubernetes API: {error}")
            after = getattr(error, "retry_after_seconds", None)
        wait = min(after, LONGEST_RETRY_AFTER_SECONDS) if after is not None else 0.0
        wait = max(wait, pause) * random.uniform(1.0, 1.5)  # noqa: S311 - spreads callers, hides nothing
        await asyncio.sleep(min(wait, max(0.0, seconds - passed) + FIRST_PAUSE_SECONDS))
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
