"""The Serve application that `ray_app.yaml` names: the HTTP API, and the control plane behind it."""

from __future__ import annotations

import asyncio
from typing import Any

import structlog
from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.schema import ApplicationStatus

from orchestrator import failpoints
from orchestrator.actors.control_actors import control_options
from orchestrator.api.access import ApiAccess
from orchestrator.api.app import create_api
from orchestrator.domain.errors import UsageError
from orchestrator.logging import bind_process, configure_logging
from orchestrator.served import ServedControlPlane
from orchestrator.settings import Settings, load_settings
from orchestrator.settings_reference import describe_settings

log = structlog.get_logger(__name__)

STATUS_SECONDS = 10.0
# The drain of the control plane takes half a minute at most.
SHUTDOWN_SECONDS = 60.0


@serve.deployment(
    name="ControlPlane",
    num_replicas=1,
    max_ongoing_requests=100,
    max_queued_requests=200,  # for each proxy; by default without end. More are told 503
    user_config={},
    health_check_period_s=10,
    health_check_timeout_s=30,
    graceful_shutdown_timeout_s=SHUTDOWN_SECONDS,
)
@serve.ingress()
class ControlPlaneDeployment:
    """A replica. Its settings are the `ORCHESTRATOR_*` variables of its node, `user_config` above them."""

    def __init__(self) -> None:
        failpoints.enter_process("serve-replica")
        self._access = ApiAccess()
        self._plane = ServedControlPlane(self._access)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(self._access)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve calls it at the start, and when `user_config` has changed.

        What it raises fails the deployment, and is shown by `serve status`.
        """
        settings = served_settings(user_config)
        configure_logging("json", settings.log_level)
        bind_process(replica=serve.get_replica_context().replica_id.unique_id)
        await self._plane.apply(settings)

    async def __del__(self) -> None:
        """Serve awaits it when the replica ends in order: replaced, or with the application."""
        await self._plane.close(drain=await _application_ends())


def served_settings(user_config: dict[str, Any]) -> Settings:
    """The settings of a replica.

    Raises:
        UsageError: one is not allowed; or a secret stands where everybody who sees Serve's page can read it.
    """
    described = describe_settings(Settings)
    for name in user_config:
        if name in described and described[name].secret:
            raise UsageError(
                f"user_config: {name} is a secret, and Serve shows user_config to everybody: "
                f"set ORCHESTRATOR_{name.upper()} for all nodes instead"
            )
    return load_settings(**user_config)


async def _application_ends() -> bool:
    """Whether the whole application is being deleted, and not this replica alone replaced."""
    name = serve.get_replica_context().app_name
    try:
        async with asyncio.timeout(STATUS_SECONDS):
            status = await asyncio.to_thread(serve.status)
    except Exception as error:  # noqa: BLE001 - of Serve, or of the cluster below it
        # Without a controller nobody can tell. Actors that go on lose nothing; `orchestrator down` ends them.
        log.warning("serve_status_unknown", why=str(error))
        return False
    application = status.applications.get(name)
    return application is None or application.status == ApplicationStatus.DELETING


def application(_: dict[str, Any]) -> Application:
    """The application as Serve builds it, on the nodes of the control plane where they are known."""
    deployment: serve.Deployment = ControlPlaneDeployment  # by the decorator
    options = control_options(load_settings().control_resource)
    return deployment.options(ray_actor_options=options).bind()
