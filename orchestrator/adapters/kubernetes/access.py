"""With which credentials, and over which connections, the API server is asked."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from orchestrator.domain.errors import UsageError

if TYPE_CHECKING:
    from kubernetes.aio.client import ApiClient, Configuration

log = structlog.get_logger(__name__)

SERVICE_ACCOUNT_TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
KUBECONFIG_VARIABLE = "KUBECONFIG"
MAX_CONNECTIONS = 40
RENEWAL_PAUSE_SECONDS = 1.0
TOKEN_SECONDS = 60.0  # a pod's token is replaced in its file long before it expires
# A credential plugin may ask a person's browser, or a slow service.
LOAD_SECONDS = 60.0
_CERTIFICATES = ("host", "ssl_ca_cert", "cert_file", "key_file", "verify_ssl", "tls_server_name", "proxy")


@dataclass(frozen=True, slots=True)
class Credentials:
    """Where they stand: a kubeconfig (None: of the environment, or of the user), or the pod's own account."""

    config_file: Path | None = None
    context: str | None = None

    @property
    def in_cluster(self) -> bool:
        """Whether they are those of the pod that this process runs in."""
        named = self.config_file or self.context or os.environ.get(KUBECONFIG_VARIABLE)
        return not named and SERVICE_ACCOUNT_TOKEN.is_file()


class ClusterAccess:
    """The client for these credentials, read again once the server does not accept them any more."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._client: ApiClient | None = None
        self._retired: ApiClient | None = None
        self._in_cluster = credentials.in_cluster
        self._loaded_at = float("-inf")
        self._lock = asyncio.Lock()

    async def client(self) -> ApiClient:
        """The client.

        Raises:
            UsageError: there are no credentials, or they cannot be read.
        """
        async with self._lock:
            if self._client is None:
                self._client = await self._open()
            elif self._in_cluster and time.monotonic() - self._loaded_at > TOKEN_SECONDS:
                await self._renew(self._client)
            return self._client

    async def renew(self, used_at: float) -> None:
        """Read the credentials again, unless that was done since a call that began at `used_at`."""
        async with self._lock:
            age_seconds = time.monotonic() - self._loaded_at
            if (
                self._client is not None
                and used_at >= self._loaded_at
                and age_seconds > RENEWAL_PAUSE_SECONDS
            ):
                await self._renew(self._client)

    async def _renew(self, current: ApiClient) -> None:
        try:
            fresh = await self._open()
        except UsageError as error:  # somebody is writing it right now
            log.warning("credentials_not_read", why=str(error))
            return
        now, new = current.configuration, fresh.configuration
        if all(getattr(now, name) == getattr(new, name) for name in _CERTIFICATES):
            now.api_key.update(new.api_key)
            await fresh.close()
            return
        # What still runs over the old one's connections is tried again when they are closed, the next time.
        retired, self._retired = self._retired, current
        self._client = fresh
        if retired is not None:
            await retired.close()

    async def close(self) -> None:
        """Let go of every connection; the next call opens new ones."""
        async with self._lock:
            clients, self._client, self._retired = (self._client, self._retired), None, None
            for client in clients:
                if client is not None:
                    await client.close()

    async def _open(self) -> ApiClient:
        configuration = await load(self._credentials)
        self._loaded_at = time.monotonic()
        client_class, _ = await asyncio.to_thread(_imported)
        client: ApiClient = client_class(configuration)
        client.user_agent = "orchestrator"
        return client


async def load(credentials: Credentials) -> Configuration:
    """The configuration of the client library for these credentials.

    Raises:
        UsageError: there are none, or they cannot be read.
    """
    _, configuration_class = await asyncio.to_thread(_imported)
    from kubernetes.aio import config

    configuration: Any = configuration_class()
    configuration.connection_pool_maxsize = MAX_CONNECTIONS
    try:
        if credentials.in_cluster:
            config.load_incluster_config(configuration, try_refresh_token=False)
            return configuration
        async with asyncio.timeout(LOAD_SECONDS):
            await config.load_kube_config(
                _kubeconfig(credentials),
                context=credentials.context,
                client_configuration=configuration,
                persist_config=False,
            )
    except (config.ConfigException, OSError, ValueError, TypeError, TimeoutError) as error:
        raise UsageError(f"no access to a Kubernetes cluster: {error or type(error).__name__}") from error
    return configuration


def _kubeconfig(credentials: Credentials) -> str:
    path = credentials.config_file or os.environ.get(KUBECONFIG_VARIABLE) or Path.home() / ".kube" / "config"
    if not any(Path(each).expanduser().is_file() for each in str(path).split(os.pathsep) if each):
        raise UsageError(
            f"there is no kubeconfig at {path}: set kubernetes_config_file, or {KUBECONFIG_VARIABLE}"
        )
    return str(path)


def _imported() -> tuple[Any, Any]:
    """The classes of the client library, whose import takes seconds."""
    from kubernetes.aio import config  # noqa: F401 - so that it is there without a wait afterwards
    from kubernetes.aio.client import ApiClient, Configuration

    return ApiClient, Configuration
