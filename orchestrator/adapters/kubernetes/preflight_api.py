"""What preflight asks of the API server, and how pods like a submission's are made for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import UUID

Json = dict[str, Any]


class ApiRefused(Exception):
    """The API server answered with an error; the text is its message."""

    def __init__(
        self, status: int, message: str, reason: str = "", retry_after_seconds: float | None = None
    ) -> None:
        super().__init__(status, message, reason, retry_after_seconds)
        self.status = status
        self.message = message
        self.reason = reason
        self.retry_after_seconds = retry_after_seconds

    def __str__(self) -> str:
        return self.message


class PreflightApi(Protocol):
    """One raw call each. Raises: ApiRefused; InfrastructureError when it cannot be reached in time."""

    async def call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Json | None = None,
        timeout_seconds: float = 10.0,
    ) -> Json:
        """The JSON of the answer."""
        ...

    async def log(self, namespace: str, pod: str, *, timeout_seconds: float = 10.0) -> str:
        """The end of a pod's log."""
        ...


class PodMaker(Protocol):
    """Makes the objects of a container attempt, hardened as a submission's."""

    @property
    def namespace(self) -> str: ...

    @property
    def canary_selector(self) -> str:
        """The labels of all canaries of our own."""
        ...

    def anchor(self, container_id: UUID, *, canary: bool) -> Json: ...

    def pod(
        self, container_id: UUID, anchor_uid: str, *, canary: bool, command: Sequence[str] | None = None
    ) -> Json:
        """With a `command` in the place of the submission host's."""
        ...


@dataclass(frozen=True, slots=True)
class Paths:
    """Where the objects of one namespace are."""

    namespace: str

    def of(self, plural: str, name: str = "") -> str:
        """Of pods, configmaps or events."""
        return f"/api/v1/namespaces/{self.namespace}/{plural}{f'/{name}' if name else ''}"

    @property
    def network_policies(self) -> str:
        return f"/apis/networking.k8s.io/v1/namespaces/{self.namespace}/networkpolicies"
