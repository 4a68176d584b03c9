"""What preflight works with, against the double of the API server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import aiohttp
import pytest

from orchestrator.adapters.kubernetes.preflight_api import ApiRefused, Json
from orchestrator.domain.errors import InfrastructureError
from tests.kubernetes_double import NAMESPACE, ApiDouble
from tests.unit.kubernetes_double.double_client import a_pod


class PlainApi:
    """`PreflightApi` without any patience."""

    def __init__(self, double: ApiDouble, session: aiohttp.ClientSession) -> None:
        self._double = double
        self._session = session

    async def call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Json | None = None,
        timeout_seconds: float = 10.0,
    ) -> Json:
        return await (await self._request(method, path, query, body)).json()  # type: ignore[no-any-return]

    async def log(self, namespace: str, pod: str, *, timeout_seconds: float = 10.0) -> str:
        path = f"/api/v1/namespaces/{namespace}/pods/{pod}/log"
        return await (await self._request("GET", path, None, None)).text()

    async def _request(self, method: str, path: str, query: Any, body: Any) -> aiohttp.ClientResponse:
        headers = {"Authorization": f"Bearer {self._double.token}"}
        try:
            answer = await self._session.request(
                method, self._double.url + path, params=query, json=body, headers=headers
            )
        except aiohttp.ClientError as error:
            raise InfrastructureError(str(error)) from error
        if answer.status >= 400:
            raise ApiRefused(answer.status, (await answer.json())["message"])
        return answer


class PlainMaker:
    """`PodMaker` of a pod that the double lets in."""

    namespace = NAMESPACE
    canary_selector = "orchestrator.dev/component=canary"

    def anchor(self, container_id: UUID, *, canary: bool) -> Json:
        metadata = self._metadata(container_id, canary)
        return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}

    def pod(
        self, container_id: UUID, anchor_uid: str, *, canary: bool, command: Sequence[str] | None = None
    ) -> Json:
        pod = a_pod(f"submission-{container_id.hex}")
        pod["metadata"] = self._metadata(container_id, canary)
        owner = {"apiVersion": "v1", "kind": "ConfigMap", "name": pod["metadata"]["name"], "uid": anchor_uid}
        if anchor_uid:
            pod["metadata"]["ownerReferences"] = [owner]
        if command is not None:
            pod["spec"]["containers"][0]["command"] = list(command)
        return pod

    def _metadata(self, container_id: UUID, canary: bool) -> Json:
        expires_at = datetime.now(UTC) + timedelta(minutes=10)
        return {
            "name": f"submission-{container_id.hex}",
            "labels": {"orchestrator.dev/component": "canary" if canary else "submission"},
            "annotations": {"orchestrator.dev/expires-at": expires_at.isoformat(timespec="seconds")},
        }


@pytest.fixture
async def double() -> AsyncIterator[ApiDouble]:
    async with ApiDouble() as double:
        yield double


@pytest.fixture
async def api(double: ApiDouble) -> AsyncIterator[PlainApi]:
    async with aiohttp.ClientSession() as session:
        yield PlainApi(double, session)


@pytest.fixture
def maker() -> PlainMaker:
    return PlainMaker()
