"""The proxy spoils exactly what it was told to, and passes the rest on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import aiohttp
import pytest

from tests.kubernetes_double import ApiDouble
from tests.kubernetes_double.fault_proxy import Chance, Fault, FaultProxy, faults_of
from tests.kubernetes_double.rights import Call
from tests.unit.kubernetes_double.double_client import Client, a_config_map


@pytest.fixture
async def proxy(double: ApiDouble) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(double.url) as proxy:
        yield proxy


@pytest.fixture
def through(proxy: FaultProxy, client: Client, monkeypatch: pytest.MonkeyPatch) -> Client:
    """The client, by way of the proxy."""
    monkeypatch.setattr(client.double, "url", proxy.url)
    return client


async def test_what_is_not_spoiled_goes_through_as_it_is(through: Client) -> None:
    created = await through.create(a_config_map("one"))
    listed = await through.call("GET", "configmaps")
    events = [event async for event in through.watch("configmaps", timeoutSeconds="1")]

    assert (created.status, len(listed.json["items"]), len(events)) == (201, 1, 1)


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (Fault.CONFLICT, 409),
        (Fault.GONE, 410),
        (Fault.TOO_MANY_REQUESTS, 429),
        (Fault.SERVER_ERROR, 500),
        (Fault.UNAUTHORIZED, 401),
        (Fault.BAD_GATEWAY, 502),
    ],
)
async def test_a_refusal_reaches_one_call_and_the_server_never_sees_that(
    proxy: FaultProxy, through: Client, fault: Fault, status: int
) -> None:
    proxy.spoil(fault, when=lambda call: call.verb == "create")

    spoiled = await through.create(a_config_map("one"))
    left = through.double.names("configmaps")
    again = await through.create(a_config_map("one"))

    assert (spoiled.status, left, again.status) == (status, [], 201)
    assert sum(proxy.fired.values()) == 1
    assert ("Retry-After" in spoiled.headers) is (status == 429)


@pytest.mark.parametrize(
    ("fault", "done"), [(Fault.RESET, []), (Fault.ACK_AND_DROP, ["one"]), (Fault.CUT, ["one"])]
)
async def test_a_lost_answer_tells_nothing_of_whether_it_was_done(
    proxy: FaultProxy, through: Client, fault: Fault, done: list[str]
) -> None:
    proxy.spoil(fault)

    with pytest.raises(aiohttp.ClientError):
        await through.create(a_config_map("one"))

    assert through.double.names("configmaps") == done


async def test_a_hanging_call_is_never_answered(proxy: FaultProxy, through: Client) -> None:
    proxy.spoil(Fault.HANG)

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(through.call("GET", "pods"), 0.2)

    assert (await through.call("GET", "pods")).status == 200


async def test_a_stale_list_shows_what_was_and_its_version_of_then(
    proxy: FaultProxy, through: Client
) -> None:
    first = (await through.call("GET", "configmaps")).json
    await through.create(a_config_map("one"))
    proxy.spoil(Fault.STALE_LIST)

    stale = (await through.call("GET", "configmaps")).json

    assert stale == first


@pytest.mark.parametrize("fault", [Fault.WATCH_CLOSED, Fault.GONE_EVENT, Fault.GARBAGE])
async def test_a_watch_ends_as_ordered(proxy: FaultProxy, through: Client, fault: Fault) -> None:
    proxy.spoil(fault, when=lambda call: call.verb == "watch")
    events: list[object] = []

    try:
        async for event in through.watch("configmaps"):
            events.append(event)
    except json.JSONDecodeError:
        events.append("no JSON")

    assert events in ([], ["no JSON"]) or events[0]["object"]["code"] == 410  # type: ignore[index]


async def test_an_outage_resets_everything_until_it_is_over(proxy: FaultProxy, through: Client) -> None:
    with proxy.outage(), pytest.raises(aiohttp.ClientError):
        await through.call("GET", "pods")

    assert (await through.call("GET", "pods")).status == 200


def test_one_seed_draws_the_same_faults_again() -> None:
    calls = [Call(verb, "", "pods", "", "x") for verb in ("list", "watch", "create", "get", "delete")] * 20

    draws = [
        [chance.draw(call) for call in calls] for chance in (Chance(7, 0.3), Chance(7, 0.3), Chance(8, 0.3))
    ]

    assert draws[0] == draws[1] != draws[2]
    assert all(
        drawn is None or drawn in faults_of(call.verb) for call, drawn in zip(calls, draws[0], strict=True)
    )
