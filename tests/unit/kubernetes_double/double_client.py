"""A bare client of the double, and the pods that it creates."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from tests.kubernetes_double import ApiDouble
from tests.kubernetes_double.refusals import Json

WAITING = "import signal; signal.pause()"
OBEDIENT = (
    "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); print('up', flush=True);"
)
OBEDIENT += "signal.pause()"
LABEL = "example.org/test"


def a_pod(name: str, script: str = WAITING, **spec: Any) -> Json:
    """A pod that is let in, whose container runs this Python script."""
    container = {
        "name": "submission",
        "image": "example.org/image@sha256:" + "0" * 64,
        "command": ["python", "-u", "-c", script],
        "workingDir": "/work",
        "volumeMounts": [{"name": "work", "mountPath": "/work"}],
        "resources": {"limits": {"cpu": "1", "memory": "256Mi", "ephemeral-storage": "64Mi"}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {LABEL: "yes"}},
        "spec": {
            "serviceAccountName": "submission",
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
            "dnsPolicy": "None",
            "dnsConfig": {"nameservers": ["127.0.0.1"]},
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 65532,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
            "volumes": [{"name": "work", "emptyDir": {"sizeLimit": "32Mi"}}],
            **spec,
        },
    }


def a_config_map(name: str, **data: str) -> Json:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def owned_by(child: Json, owner: Json) -> Json:
    reference = {
        "apiVersion": "v1",
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
    }
    return {**child, "metadata": {**child["metadata"], "ownerReferences": [reference]}}


class Answer:
    """What came back."""

    def __init__(self, status: int, body: bytes, headers: Any) -> None:
        self.status = status
        self.body = body
        self.headers = headers

    @property
    def json(self) -> Json:
        found: Json = json.loads(self.body)
        return found


class Client:
    """Requests of one namespace."""

    def __init__(self, double: ApiDouble, session: aiohttp.ClientSession) -> None:
        self.double = double
        self._session = session

    async def call(
        self, method: str, path: str, body: Json | None = None, *, token: str | None = None, **query: str
    ) -> Answer:
        async with self._session.request(
            method,
            self._url(path),
            params=query,
            json=body,
            headers={"Authorization": f"Bearer {token or self.double.token}"},
        ) as response:
            return Answer(response.status, await response.read(), response.headers)

    async def create(self, body: Json, **query: str) -> Answer:
        plural = {"Pod": "pods", "ConfigMap": "configmaps"}[body["kind"]]
        return await self.call("POST", plural, body, **query)

    async def watch(self, plural: str, **query: str) -> AsyncIterator[Json]:
        """Events until the server closes."""
        async with (
            asyncio.timeout(20),
            self._session.get(
                self._url(plural),
                params={"watch": "true", **query},
                headers={"Authorization": f"Bearer {self.double.token}"},
            ) as response,
        ):
            if response.status != 200:
                yield {"type": "STATUS", "object": await response.json()}
                return
            async for line in response.content:
                yield json.loads(line)

    def _url(self, path: str) -> str:
        if path.startswith("/"):
            return self.double.url + path
        return f"{self.double.url}/api/v1/namespaces/{self.double.namespace}/{path}"
