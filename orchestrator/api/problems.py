"""Every error of the API in one form (RFC 9457, problem details), and which error has which status."""

from __future__ import annotations

from collections.abc import Mapping

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from orchestrator.domain.errors import (
    InfrastructureError,
    InvalidJob,
    JobIdTaken,
    JobNotFinished,
    KeyReused,
    OrchestratorError,
    SchemaMismatch,
    UnknownJob,
    UsageError,
)

log = structlog.get_logger(__name__)

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = 5
TITLES = {
    400: "Bad request",
    401: "No valid token",
    403: "Not allowed",
    404: "Not found",
    405: "Method not allowed",
    409: "Conflict",
    413: "Too large",
    422: "Not valid",
    500: "Internal error",
    503: "Not available now",
}
# The first that fits counts.
STATUSES: tuple[tuple[type[OrchestratorError], int], ...] = (
    (UnknownJob, 404),
    (JobIdTaken, 409),
    (JobNotFinished, 409),
    (KeyReused, 422),
    (InvalidJob, 422),
    (UsageError, 400),
    (SchemaMismatch, 503),
    (InfrastructureError, 503),
)


class ProblemBody(BaseModel):
    """What an error says: `detail` is for people, and holds what to do."""

    title: str
    status: int
    detail: str


class Problem(Exception):
    """Ends a request with this status."""

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(status, detail, headers)
        self.status = status
        self.detail = detail
        self.headers = headers or {}


def problem_response(status: int, detail: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The answer that says so."""
    body = ProblemBody(title=TITLES.get(status, "Error"), status=status, detail=detail)
    all_headers = dict(headers or {})
    if status == 503:
        all_headers.setdefault("Retry-After", str(RETRY_AFTER_SECONDS))
    return JSONResponse(body.model_dump(), status_code=status, headers=all_headers, media_type=MEDIA_TYPE)


def handle_problems(app: FastAPI) -> None:
    """Have every error of the app answered in this form."""
    app.add_exception_handler(Problem, _on_problem)
    app.add_exception_handler(OrchestratorError, _on_our_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_bug)


async def _on_problem(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Problem)
    return problem_response(error.status, error.detail, error.headers)


async def _on_our_error(request: Request, error: Exception) -> JSONResponse:
    for kind, status in STATUSES:
        if isinstance(error, kind):
            return problem_response(status, _for_strangers(error))
    return await _on_bug(request, error)


def _for_strangers(error: Exception) -> str:
    """The error's words; where the database is stays among us."""
    if isinstance(error, InvalidJob):
        return error.reason  # not with an id that was made for it
    if isinstance(error, UnknownJob):
        return f"there is no job {error.job_id}"
    if isinstance(error, InfrastructureError):
        log.warning("request_not_served", why=str(error))
        return "the database does not answer: send the request again, with the same Idempotency-Key"
    if isinstance(error, JobNotFinished):
        return f"job {error.job_id} has not ended: it is {error.status}"
    return str(error)


async def _on_invalid_request(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    found = [f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()[:5]]
    return problem_response(422, "; ".join(found))


async def _on_http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return problem_response(error.status_code, str(error.detail), error.headers)


async def _on_bug(request: Request, error: Exception) -> JSONResponse:
    log.error("request_failed", method=request.method, path=request.url.path, exc_info=error)
    return problem_response(500, "this is a fault of ours; the log of the replica says more")
