"""The API as an ASGI application; who serves it decides where its database is."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

import orchestrator
from orchestrator.api.access import ApiAccess
from orchestrator.api.body_limit import BodyLimit
from orchestrator.api.problems import handle_problems
from orchestrator.api.routes import health, jobs
from orchestrator.domain.messages import EvalJobMessage

MAX_BODY_BYTES = 1 << 20


def create_api(access: ApiAccess, *, max_body_bytes: int = MAX_BODY_BYTES) -> FastAPI:
    """The application; requests are answered with 503 while `access` has no database."""
    app = FastAPI(
        title="Orchestrator",
        version=orchestrator.__version__,
        description="Evaluation jobs: submit, list, read, cancel, result.",
        # The pages of FastAPI load scripts from elsewhere; the schema itself is at /openapi.json.
        docs_url=None,
        redoc_url=None,
    )
    app.state.access = access
    app.include_router(health)
    app.include_router(jobs)
    handle_problems(app)
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    app.openapi = lambda: _schema(app)  # type: ignore[method-assign]
    return app


def _schema(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        # The body of a job is parsed as the queue's is, and so unknown to FastAPI.
        message = EvalJobMessage.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas = schema.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(message.pop("$defs", {}))
        message["required"] = [name for name in message.get("required", []) if name != "job_id"]
        schemas["EvalJobMessage"] = message
        app.openapi_schema = schema
    return app.openapi_schema
